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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from compiler.fusions import Declined

if TYPE_CHECKING:
    import torch

NAME = "compiler_padding_free"
# Groups of sequences that attention pads to their own longest. More leave less padding, and make the matrices smaller.
GROUPS = 6
# The rewritten model answers as the original to within this, in units of the output's scale; beyond, it is declined.
TOLERANCE = 1e-4
# What a model's code raises that is not made for another batch.
FAILURES = (NotImplementedError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)


class Layout(Protocol):
    """Where the tokens of a batch stand once they are packed, and what is done with them there."""

    def __init__(self, mask: torch.Tensor) -> None:
        """`mask` is the attention mask, int64 `[batch, sequence]`; above 0 at real tokens."""

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
        real = mask > 0
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


class Marked:
    """The layout as operators without an implementation, which a backend replaces in the graph that it exports.

    One trace then serves both ways: computed on packed tokens, or, where nothing is padded, on all of them, `[1, batch ×
    sequence]`, for which packing is a reshape.
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
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Query, key and value are `[1, heads, tokens, size]`; returns `[1, tokens, heads, size]`."""
        if self.layout is None:
            raise RuntimeError("the attention of packed tokens runs inside of `packed` only")
        if is_causal or getattr(module, "is_causal", False) or key.shape[1] != query.shape[1]:
            raise NotImplementedError("attention that is causal or shares keys between heads")
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
        outer: Any = module
        implementation = base.config._attn_implementation
        own = [(part, vars(part).get("forward"), part.forward) for part in dict.fromkeys((base, outer))]
        inner = own[0][2]
        offset = _padding_offset(base)
        layers = _layers(base)

        def forward(
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
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

        def whole(*args: Any, **kwargs: Any) -> Any:
            output = head(*args, **kwargs)
            if (here := ATTENTION.layout) is None:
                raise RuntimeError("the model did not call its base model")
            for name, value in list(output.items()):
                if hasattr(value, "shape"):
                    output[name] = _unpacked_output(here, value)
            return output

        base.set_attn_implementation(NAME)
        base.forward = forward
        if self.whole:
            head = outer.forward
            outer.forward = whole
        try:
            yield module
        finally:
            ATTENTION.layout = None
            for part, instance, _ in own:
                vars(part).pop("forward", None)
                if instance is not None:
                    part.forward = instance
            base.set_attn_implementation(implementation)


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


def rewrite(module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> PaddingFree | Declined:
    """How the model runs on packed tokens, after it was held against the original on batches with padding right, left and
    in the middle; or why it does not."""
    import torch

    ids = example["input_ids"]
    wide = ids[:1].expand(6, -1).contiguous()
    mask = torch.ones_like(wide)
    length = wide.shape[1]
    mask[1, length // 2 :] = 0
    mask[2, : length // 3] = 0
    mask[3, 2:] = 0
    mask[4, length // 3 : length // 2] = 0
    inputs = {name: value[:1].expand(6, -1).contiguous() for name, value in example.items()}
    inputs |= {"input_ids": wide, "attention_mask": mask}
    try:
        with torch.inference_mode():
            expected = {name: value for name, value in module(**inputs).items() if isinstance(value, torch.Tensor)}
    except FAILURES as error:
        return Declined(f"it does not run on another batch than its example ({_brief(error)})")
    by_token = all(value.shape[:2] == mask.shape for value in expected.values())
    refusal = Declined("")
    for whole in (True, False) if by_token else (False,):
        found = _check(module, inputs, expected, whole)
        if isinstance(found, PaddingFree):
            return found
        refusal = found
    return refusal


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _check(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], whole: bool
) -> PaddingFree | Declined:
    import torch

    mask = inputs["attention_mask"]
    ATTENTION.calls = 0
    try:
        with torch.inference_mode(), PaddingFree(0, whole).applied(module) as rewritten:
            actual = rewritten(**inputs)
    except FAILURES as error:
        return Declined(f"it does not run on packed tokens ({_brief(error)})")
    if not ATTENTION.calls:
        return Declined("its attention does not go through transformers' attention interface")
    for name, value in expected.items():
        if value.shape != actual[name].shape:
            return Declined(f"{name} of packed tokens has another shape")
        if value.shape[:2] != mask.shape:
            continue
        difference = float((value - actual[name])[mask > 0].abs().max())
        if not difference <= TOLERANCE * max(1.0, float(value.abs().max())):
            return Declined(f"{name} of packed tokens differs by {difference:.2g}")
    return PaddingFree(ATTENTION.calls, whole)
