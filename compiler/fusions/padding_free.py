"""No work on padding: the encoder runs on the real tokens alone, `[1, tokens, hidden]`.

A batch's real tokens are packed one after the other, the sequences in order of their length. Everything but attention is
indifferent to that. Attention runs in a few groups of sequences of similar length, each padded only to its own longest. At
the end the tokens go back to their places, and padding is zeros. All indices are computed inside the graph, from the
attention mask, so the model is called as before.

It needs no code of a model's own: transformers' attention interface hands over queries, keys and values, and its models take
`position_ids`. Whether a model's answers stay the same is checked, not assumed (`rewrite`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from compiler.fusions import Declined

if TYPE_CHECKING:
    import torch

NAME = "compiler_padding_free"
# Of the operators that stand for it in a graph that is traced: see `markers`.
NAMESPACE = "padding_free"
# Groups of sequences that attention pads to their own longest. More leave less padding, and make the matrices smaller.
GROUPS = 6
# The rewritten model answers as the original to within this, in units of the output's scale; beyond, it is declined.
TOLERANCE = 1e-4
# The length, in tokens, of the texts that the model is held against, unless it has a window that is longer.
TRIAL_LENGTH = 24
# Arguments of transformers' attention interface that change its answer, and that packed tokens do not have.
CHANGES = ("softcap", "s_aux", "position_bias")


class Layout(Protocol):
    """Where the tokens of a batch stand once they are packed, and what is done with them there."""

    def __init__(self, mask: torch.Tensor) -> None:
        """`mask` is the attention mask, `[batch, sequence]`; 0 at padding, anything else at real tokens."""

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence]` as `[1, tokens]`."""

    def unpack(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, width]` as `[batch, sequence, width]`, zeros where there is no token."""

    def columns(self) -> torch.Tensor:
        """int64 `[1, tokens]`, the column that each token came from."""

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        """Query, key and value are `[1, heads, tokens, size]`; returns `[1, tokens, heads, size]`. Each token sees those of
        its own sequence, and with a `window` above 0 only those less than so many columns away."""


class Packed:
    """The layout computed by torch, in the trace.

    Attributes:
        places: int64 `[tokens]`, each packed token's place in the flattened `[batch × sequence]`.
        column: int64 `[tokens]`, its column.
        groups: for each group, `rows` int64 `[sequences × longest]`, the packed token at each place (anything where there
            is none), `valid` bool `[sequences, longest]`, and `back` int64 `[tokens of the group]`, the places that hold one.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        import torch

        self.batch, self.sequence = mask.shape
        real = mask != 0
        lengths = real.sum(dim=1)
        order = torch.argsort(lengths)
        packed = torch.nonzero(real[order].reshape(-1)).squeeze(1)
        self.column = packed % self.sequence
        self.places = order[packed // self.sequence] * self.sequence + self.column
        lengths = lengths[order]
        starts = torch.cumsum(lengths, dim=0) - lengths
        size = (self.batch + GROUPS - 1) // GROUPS
        self.groups = []
        for number in range(GROUPS):
            own = lengths[number * size : (number + 1) * size]
            first = starts[number * size : (number + 1) * size]
            # A batch smaller than the number of groups leaves some empty; their longest is 0.
            longest = torch.cat([own, own.new_zeros(1)]).max()
            column = torch.arange(longest)  # type: ignore[call-overload]  # a tensor, so that the trace keeps it
            valid = column[None, :] < own[:, None]
            rows = ((first[:, None] + column[None, :]) * valid).reshape(-1)
            self.groups.append((rows, valid, torch.nonzero(valid.reshape(-1)).squeeze(1)))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(-1).index_select(0, self.places)[None]

    def unpack(self, hidden: torch.Tensor) -> torch.Tensor:
        whole = hidden.new_zeros((self.batch * self.sequence, hidden.shape[-1]))
        return whole.index_copy(0, self.places, hidden[0]).reshape(self.batch, self.sequence, hidden.shape[-1])

    def columns(self) -> torch.Tensor:
        return self.column[None]

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        import torch

        heads, size = query.shape[1], query.shape[3]
        query, key, value = (part[0].transpose(0, 1).reshape(-1, heads * size) for part in (query, key, value))
        outputs = []
        for rows, valid, back in self.groups:
            count, longest = valid.shape
            q, k, v = (
                part.index_select(0, rows).reshape(count, longest, heads, size).transpose(1, 2) for part in (query, key, value)
            )
            mask = valid[:, None, None, :]
            if window:
                column = self.column.index_select(0, rows).reshape(count, longest)
                mask = mask & ((column[:, :, None] - column[:, None, :]).abs() < window)[:, None]
            output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            outputs.append(output.transpose(1, 2).reshape(-1, heads * size).index_select(0, back))
        return torch.cat(outputs).reshape(1, -1, heads, size)


class Dense:
    """The layout of a batch without padding: tokens stay in their order, and packing is a reshape."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.batch, self.sequence = mask.shape

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(1, -1)

    def unpack(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.reshape(self.batch, self.sequence, hidden.shape[-1])

    def columns(self) -> torch.Tensor:
        import torch

        return torch.arange(self.sequence).expand(self.batch, -1).reshape(1, -1)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        import torch

        heads, size = query.shape[1], query.shape[3]
        query, key, value = (
            part[0].transpose(0, 1).reshape(self.batch, self.sequence, heads, size).transpose(1, 2)
            for part in (query, key, value)
        )
        mask = None
        if window:
            column = torch.arange(self.sequence)
            mask = ((column[:, None] - column[None, :]).abs() < window)[None, None]
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return output.transpose(1, 2).reshape(1, -1, heads, size)


class Marked:
    """The layout as operators without an implementation, which a backend replaces in the graph that it exports.

    One trace then serves both ways, as `Packed` does and, where nothing is padded, as `Dense` does.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        from compiler.fusions.markers import MARKERS

        self.mask = mask
        self.markers = MARKERS

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = self.markers.pack(values, self.mask)
        return packed

    def unpack(self, hidden: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = self.markers.unpack(hidden, self.mask)
        return whole

    def columns(self) -> torch.Tensor:
        columns: torch.Tensor = self.markers.columns(self.mask)
        return columns

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        attended: torch.Tensor = self.markers.attention(query, key, value, self.mask, scale, window)
        return attended


class _Attention:
    """transformers' attention interface, on packed tokens. `layout` is that of the batch that is running."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.calls = 0

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **other: Any,
    ) -> tuple[torch.Tensor, None]:
        """Query, key and value are `[1, heads, tokens, size]`; returns `[1, tokens, heads, size]`."""
        if self.layout is None:
            raise RuntimeError("a bug: attention of packed tokens was called outside of `PaddingFree.applied`")
        if is_causal or getattr(module, "is_causal", False) or key.shape[1] != query.shape[1]:
            raise NotImplementedError("attention that is causal or shares keys between heads")
        for name in CHANGES:
            if other.get(name) is not None:
                raise NotImplementedError(f"attention with {name}")
        self.calls += 1
        scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        return self.layout.attention(query, key, value, scale, sliding_window or 0), None


ATTENTION = _Attention()


@dataclass(frozen=True)
class PaddingFree:
    """A model that can run on packed tokens. `count` is of its attentions; `whole` says that its head can too, so that
    tokens go back to their places in the outputs alone, not behind the encoder."""

    count: int
    whole: bool

    @contextlib.contextmanager
    def applied(self, module: torch.nn.Module, layout: type[Layout] = Packed) -> Iterator[torch.nn.Module]:
        """The model on packed tokens, for as long as the context lasts; the module is as before after it."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(NAME, ATTENTION)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
        base: Any = module.base_model
        parts = dict.fromkeys((base, module))
        own = {part: vars(part).get("forward") for part in parts}
        # Each part has a config of its own, or shares one.
        configs = {id(part.config): part.config for part in base.modules() if hasattr(part, "config")}
        implementations = [(config, config._attn_implementation) for config in configs.values()]
        given: list[torch.Tensor] = []
        try:
            base.set_attn_implementation(NAME)
            base.forward = self._packed_base(base, layout, given)
            if module is not base:
                module.forward = self._packed_head(module.forward, given)
            elif self.whole:
                base.forward = self._packed_head(base.forward, given)
            yield module
        finally:
            ATTENTION.layout = None
            for part, forward in own.items():
                vars(part).pop("forward", None)
                if forward is not None:
                    part.forward = forward
            for config, implementation in implementations:
                config._attn_implementation = implementation

    def _packed_base(self, base: Any, layout: type[Layout], given: list[torch.Tensor]) -> Callable[..., Any]:
        """The base model's forward, called as ever, that packs what it is given. `given` holds the mask of the whole model's
        call, when that is another module."""
        inner = base.forward
        offset = _padding_offset(base)
        layers = _layers(base)

        def forward(
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            if given and attention_mask is not given[0]:
                raise NotImplementedError("a head that gives its encoder another attention mask")
            here = layout(attention_mask)
            positions = here.columns()
            if offset is not None:
                # RoBERTa and its kin count the tokens that are not padding, from `padding_idx + 1`.
                real = (input_ids != offset).long()
                positions = here.pack(real.cumsum(dim=1) * real + offset)
            if token_type_ids is not None:
                kwargs["token_type_ids"] = here.pack(token_type_ids)
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            ATTENTION.layout = here
            # What follows the layers (a pooler) looks at tokens by their place, so they go back before it.
            hook = None
            if not self.whole and layers is not None:
                hook = layers.register_forward_hook(lambda *args: _unpacked(here, args[2]))
            try:
                output = inner(input_ids=here.pack(input_ids), position_ids=positions, **kwargs)
            finally:
                if hook is not None:
                    hook.remove()
            return output if self.whole or layers is not None else _unpacked(here, output)

        return forward

    def _packed_head(self, inner: Callable[..., Any], given: list[torch.Tensor]) -> Callable[..., Any]:
        """The whole model's forward; where the head runs on packed tokens, these go back to their places in its outputs."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given[:] = [kwargs["attention_mask"]]
            output = inner(*args, **kwargs)
            if self.whole:
                if (here := ATTENTION.layout) is None:
                    raise NotImplementedError("a model that does not call its base model")
                for name, value in list(output.items()):
                    if hasattr(value, "shape"):
                        output[name] = _unpacked_output(here, value)
            return output

        return forward


def _unpacked(layout: Layout, output: Any) -> Any:
    output["last_hidden_state"] = layout.unpack(output["last_hidden_state"])
    return output


def _unpacked_output(layout: Layout, value: torch.Tensor) -> torch.Tensor:
    if value.dim() == 2:  # one number a token
        return layout.unpack(value[..., None])[..., 0]
    return layout.unpack(value)


def _layers(base: torch.nn.Module) -> torch.nn.Module | None:
    """The part of the model that holds the list of layers; None where the model holds it itself."""
    import torch

    parts = [part for part in base.children() if any(isinstance(inner, torch.nn.ModuleList) for inner in part.children())]
    return parts[0] if len(parts) == 1 else None


def _padding_offset(base: torch.nn.Module) -> int | None:
    """`padding_idx` of the table of positions, where there is one."""
    import torch

    for name, part in base.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(part, torch.nn.Embedding):
            return part.padding_idx
    return None


def rewrite(
    module: torch.nn.Module, example: Mapping[str, torch.Tensor], special: Sequence[int] = (), *, left: bool = False
) -> PaddingFree | Declined:
    """How the model runs on packed tokens, after it was held against the original on batches with padding right, left and
    in the middle; or why it does not.

    Args:
        example: inputs that the model runs on.
        special: the ids of special tokens, padding's first, of which a model may make more than their embedding.
        left: whether texts are padded on the left, where models that answer for the text by its first token find padding.
    """
    import torch

    try:
        inputs = _trial(module, example, special)
        mask = inputs["attention_mask"]
        with torch.inference_mode():
            expected = {name: value for name, value in module(**inputs).items() if isinstance(value, torch.Tensor)}
            shorter = module(**{name: value[:, :-1] for name, value in inputs.items()})
    except Exception as error:  # a model's code may raise anything
        return Declined(f"it does not run on another batch than its example ({_brief(error)})")
    by_token = {name for name, value in expected.items() if value.dim() > 1 and value.shape[1] != shorter[name].shape[1]}
    if left and by_token != set(expected):
        return Declined("texts are padded on the left, where its answer for the text looks for a token")
    # Padding in front of a text is no place that its answer is read from.
    counts = {name: mask != 0 if name in by_token else mask[:, 0] != 0 for name in expected}
    refusal = Declined("")
    for whole in (True, False) if by_token == set(expected) else (False,):
        found = _check(module, inputs, expected, counts, whole)
        if isinstance(found, PaddingFree):
            return found
        refusal = found
    return refusal


def _trial(module: Any, example: Mapping[str, torch.Tensor], special: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch in which every row differs, in its tokens, in its special tokens and in what is padded: more rows than groups,
    so that groups have padding of their own, and longer than a sliding window."""
    import torch

    config = module.config
    table = module.get_input_embeddings()
    vocabulary = int(table.weight.shape[0])
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None) or 0
    most = getattr(config, "max_position_embeddings", None) or TRIAL_LENGTH
    # Some models keep the first places for themselves.
    length = min(max(TRIAL_LENGTH, window + 9), max(most - 4, 4))
    rows = 2 * GROUPS + 3
    generator = torch.Generator().manual_seed(0)
    special = [token for token in special if 0 <= token < vocabulary]
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    padding = special[0] if special else 0
    ids = torch.where(ids == padding, (ids + 1) % vocabulary, ids)
    for row in range(rows):
        for place, token in enumerate(special[1:]):
            count = (row + place) % 4
            ids[row, torch.randperm(length, generator=generator)[:count]] = token
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        short = 1 + (row * 7) % (length - 1)
        if row % 4 == 3:
            mask[row, : length - short] = 0
        elif row % 4 == 2:
            mask[row, 1 + short // 2 : 1 + short // 2 + (length - short) // 2] = 0
        else:
            mask[row, short:] = 0
    inputs = {name: value[:1, :1].expand(rows, length).contiguous() for name, value in example.items()}
    return inputs | {"input_ids": torch.where(mask != 0, ids, padding), "attention_mask": mask}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _check(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    counts: Mapping[str, torch.Tensor],
    whole: bool,
) -> PaddingFree | Declined:
    """Hold the model on packed tokens against what is `expected`, where it `counts`; and, on the rows without padding, the
    model as it runs where nothing is padded."""
    import torch

    full = inputs["attention_mask"].all(dim=1)
    for layout, rows in ((Packed, torch.ones_like(full)), (Dense, full)):
        ATTENTION.calls = 0
        try:
            with torch.inference_mode(), PaddingFree(0, whole).applied(module, layout) as rewritten:
                actual = rewritten(**{name: value[rows] for name, value in inputs.items()})
        except Exception as error:  # a model's code may raise anything
            return Declined(f"it does not run on packed tokens ({_brief(error)})")
        if not ATTENTION.calls:
            return Declined("its attention does not go through transformers' attention interface")
        for name, value in expected.items():
            if value[rows].shape != actual[name].shape:
                return Declined(f"{name} of packed tokens has another shape")
            difference = float((value[rows] - actual[name])[counts[name][rows]].abs().max())
            if not difference <= TOLERANCE * max(1.0, float(value.abs().max())):
                return Declined(f"{name} of packed tokens differs by {difference:.2g}")
    return PaddingFree(ATTENTION.calls, whole)
