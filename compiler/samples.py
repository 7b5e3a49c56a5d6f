"""Samples: real text, tokenized over a matrix of shapes, for the original and every artifact alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compiler.errors import ConfigError, SourceError, StageError
from compiler.numerics import Case
from compiler.tasks import Words
from compiler.types import LEAST_TEXTS, Model

# What kind of padding a sample has; `TEXT` are the lines of the text as a user would batch them.
NONE, RIGHT, LEFT, TEXT = "no padding", "right padding", "left padding", "text"
# Texts whose answers are held against the original's, not their tokens; only int8 is asked for them.
ACCURACY = "accuracy"
# The longest sample, without padding, when the model's positions allow more than the configured shapes ask for.
LONGEST = 512
# Samples without padding that are there whatever the shapes are, behind those of the shapes: a short and the longest.
EXTRA = 2
# Lines of text that are all run, in batches of so many.
MAX_LINES, BATCH = 256, 8
# The lines that the accuracy of int8 is measured on, in batches of so many, or of fewer where a batch's logits for all words
# of a vocabulary would have more than so many numbers.
MAX_ACCURACY_LINES, ACCURACY_BATCH, MAX_LOGITS = 1024, 32, 1 << 27
# How many characters words have at most on average, where a script has spaces between them.
LONG_WORDS = 20


def cases(
    model: Model, texts: Sequence[tuple[str, ...]], batches: Sequence[int], sequences: Sequence[int] | None
) -> list[Case]:
    """Real text, tokenized: every batch × sequence of the shapes without padding, padded right and left; odd, short and
    longest shapes; and every line of the text, as many as `MAX_LINES`, in batches padded to their own longest.

    Raises:
        ConfigError: a sequence is longer than the model has positions, or the text is empty for the tokenizer.
        SourceError: the tokenizer gives ids that the model has no embedding for.
    """
    most = model.positions
    if sequences is None:
        sequences = sorted({length if most is None else min(length, most) for length in (16, 128)})
    for length in sequences:
        if most is not None and length > most:
            raise ConfigError(f"shapes.sequence: {length} is longer than the model's {most} positions; at most {most}")
    longest = max(sequences)
    shapes = [(batch, sequence, padding) for batch in batches for sequence in sequences for padding in (NONE, RIGHT, LEFT)]
    odd = max(longest - 1 - longest % 2, 5)
    shapes += [(3, odd, RIGHT), (3, odd, LEFT), (1, 5, NONE)]
    shapes += [(1, min(most or LONGEST, max(LONGEST, longest)), NONE)]
    texts = with_masks(model, texts)
    filler = _Filler(model, texts)
    if not any(filler.lengths):
        raise ConfigError("data.validation: no line of it holds a word that the tokenizer knows; give real text")
    found: list[Case] = []
    for number, (batch, sequence, padding) in enumerate(shapes):
        start = number * batch
        chosen = [texts[(start + row) % len(texts)] for row in range(batch)]
        if padding == NONE:
            chosen = [filler.fill(text, (start + row) % len(texts), sequence) for row, text in enumerate(chosen)]
        side = "left" if padding == LEFT else "right"
        found.append(Case(padding, tokenize(model, chosen, sequence, side)))
    # Every line once, as a user would batch them: what is rare in one shape must not escape.
    for start in range(0, min(len(texts), MAX_LINES), BATCH):
        found.append(Case(TEXT, together(model, texts[start : start + BATCH])))
    if model.task == "multiple-choice":  # another number of choices than the text has
        fewer = {name: np.ascontiguousarray(value[:, :1]) for name, value in found[-1].inputs.items()}
        found.append(Case(TEXT, fewer))
    _check_ids(model, found)
    return found


def accuracy_cases(model: Model, texts: Sequence[tuple[str, ...]]) -> list[Case]:
    """The first `MAX_ACCURACY_LINES` texts, in their order."""
    texts = with_masks(model, texts[:MAX_ACCURACY_LINES])
    size = batch_size(model, ACCURACY_BATCH)
    found = [Case(ACCURACY, together(model, texts[start : start + size])) for start in range(0, len(texts), size)]
    _check_ids(model, found)
    if model.task == "fill-mask":
        masks = sum(int((case.inputs["input_ids"] == model.tokenizer.mask_token_id).sum()) for case in found)
        if masks < LEAST_TEXTS:
            raise ConfigError(
                f"data.validation: {masks} masked words within the {length_of_texts(model)} tokens that the model takes of a "
                f"text are too few to judge int8 by; give at least {LEAST_TEXTS}"
            )
    return found


def batch_size(model: Model, most: int) -> int:
    """How many texts are in a batch: fewer than `most` where their logits for a whole vocabulary would fill the memory."""
    if model.task != "fill-mask":
        return most
    config: Any = model.module.config
    words: int = config.vocab_size
    return min(most, max(1, MAX_LOGITS // (length_of_texts(model) * words)))


def tokenize(model: Model, texts: Sequence[tuple[str, ...]], sequence: int, side: str) -> dict[str, np.ndarray[Any, Any]]:
    """Texts as int64 `[batch, sequence]`, cut and padded to exactly that length; of a text and its choices
    `[batch, choices, sequence]`."""
    sizes: tuple[int, ...] = (len(texts), sequence)
    if model.task == "multiple-choice":
        sizes = (len(texts), len(texts[0]) - 1, sequence)
    encoded = model.tokenizer(
        *_columns(model, texts),
        truncation="longest_first",
        max_length=sequence,
        padding="max_length",
        padding_side=side,
        return_tensors="np",
        return_token_type_ids="token_type_ids" in model.inputs or None,
        return_attention_mask=True,
        is_split_into_words=_split(texts),
    )
    return {name: np.ascontiguousarray(encoded[name], dtype=np.int64).reshape(sizes) for name in model.inputs}


def length_of_texts(model: Model) -> int:
    """How many tokens texts are cut to, where a user would batch them."""
    return min(model.positions or LONGEST, LONGEST)


def together(model: Model, texts: Sequence[tuple[str, ...]]) -> dict[str, np.ndarray[Any, Any]]:
    """Texts as a user would batch them, int64 `[batch, sequence]`: padded on the right to the longest of them, and cut to
    `LONGEST` or what the model takes."""
    inputs = tokenize(model, texts, length_of_texts(model), "right")
    length = int(inputs["attention_mask"].sum(axis=-1).max())
    return {name: np.ascontiguousarray(value[..., :length]) for name, value in inputs.items()}


def shortened(model: Model, texts: Sequence[tuple[str, ...]], kind: str) -> str:
    """What a user is told of texts that `together` cuts, which are of some `kind`; empty when it cuts none."""
    most = length_of_texts(model)
    encoded = model.tokenizer(*_columns(model, texts), verbose=False, is_split_into_words=_split(texts))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    cut = sum(length > most for length in lengths)
    return f"{cut} of {len(lengths)} {kind} texts have more than {most} tokens and are cut" if cut else ""


def _split(texts: Sequence[tuple[str, ...]]) -> bool:
    """Whether texts are given as lists of words: all of a file are, or none."""
    return isinstance(texts[0][0], Words)


def _columns(model: Model, texts: Sequence[tuple[str, ...]]) -> list[list[Any]]:
    """Texts as a tokenizer takes them: all first parts, and all second ones where there are some, or the lists of their words.
    A text is there once with each of its choices."""
    if _split(texts):
        return [[list(text.words) for (text,) in texts if isinstance(text, Words)]]
    if model.task == "multiple-choice":
        texts = [(text, choice) for text, *choices in texts for choice in choices]
    return [list(column) for column in zip(*texts, strict=True)]


def masked_places(model: Model, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """For fill-mask, where the masked tokens are, bool `[batch, sequence]`."""
    return ids == model.tokenizer.mask_token_id if model.task == "fill-mask" else None


class _Filler:
    """Texts that are long enough for a number of tokens, by adding the texts that follow them."""

    def __init__(self, model: Model, texts: Sequence[tuple[str, ...]]) -> None:
        self.texts = [text[-1] for text in texts]
        encoded = model.tokenizer(self.texts, add_special_tokens=False, verbose=False)["input_ids"]
        self.lengths = [len(ids) for ids in encoded]

    def fill(self, text: tuple[str, ...], number: int, sequence: int) -> tuple[str, ...]:
        """A text whose last part, the `number`th of all, has more than `sequence` tokens; of several choices, each has."""
        parts, length = [text[-1]], self.lengths[number]
        while length < 2 * sequence:
            number = (number + 1) % len(self.texts)
            parts.append(self.texts[number])
            length += self.lengths[number]
        if isinstance(text[0], Words):
            return (Words(word for part in parts if isinstance(part, Words) for word in part.words),)
        joined = " ".join(parts)
        return (*text[:1], *(f"{choice} {joined}" for choice in text[1:])) if len(text) > 2 else (*text[:-1], joined)


def with_masks(model: Model, texts: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """For fill-mask, texts with a masked word: where `[MASK]` or `<mask>` stands, or else the middle one."""
    if model.task != "fill-mask":
        return list(texts)
    mask = model.tokenizer.mask_token
    if mask is None:
        raise SourceError("task: the tokenizer has no mask token, so fill-mask does not fit this checkpoint")
    named = [re.sub(r"\[MASK\]|<mask>", lambda _: mask, text) for (text,) in texts]
    return [(text if mask in text else _masked(model, text, mask),) for text in named]


def _masked(model: Model, text: str, mask: str) -> str:
    """A text with the middle word masked, or the middle character of a script without spaces; where that is cut off, one
    that is nearer to the end that is kept."""
    words, space = text.split(" "), " "
    if without_spaces(text):
        words, space = [*text], ""
    from_end = len(words) // 2
    while True:
        place = from_end if model.tokenizer.truncation_side == "right" else len(words) - 1 - from_end
        found = space.join([*words[:place], mask, *words[place + 1 :]])
        ids = model.tokenizer(found, truncation=True, max_length=length_of_texts(model))["input_ids"]
        if from_end == 0 or model.tokenizer.mask_token_id in ids:
            return found
        from_end //= 2


def without_spaces(text: str) -> bool:
    """Whether a text's script has no spaces between words."""
    return len(text) > LONG_WORDS * len(text.split())


def _check_ids(model: Model, found: Sequence[Case]) -> None:
    config: Any = model.module.config
    largest = max(int(case.inputs["input_ids"].max()) for case in found)
    if largest >= config.vocab_size:
        raise SourceError(
            f"the tokenizer gives id {largest}, the model has {config.vocab_size} embeddings: they do not belong together"
        )


def read_cases(samples: Path, known: Mapping[str, Any]) -> list[Case]:
    """The samples of a `samples.safetensors`, as `compiler.stages.load.reference` described them. Raises StageError when it
    holds others."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    names = [tensor["name"] for tensor in known["signature"]["inputs"]]
    try:
        arrays = load_file(samples)
        listed = [{name: arrays[f"{number:03d}.{name}"] for name in names} for number in range(len(known["cases"]))]
    except (SafetensorError, KeyError) as error:
        raise StageError(
            f"{samples}: does not hold what validation.json describes ({error}); the release is damaged"
        ) from error
    found = []
    for number, (described, inputs) in enumerate(zip(known["cases"], listed, strict=True)):
        for tensor in known["signature"]["inputs"]:
            array = inputs[tensor["name"]]
            if array.dtype.name != tensor["dtype"] or array.ndim != len(tensor["shape"]):
                wanted = f"{tensor['dtype']} [{', '.join(map(str, tensor['shape']))}]"
                raise StageError(f"{samples}: sample {number} is not {wanted}; the release is damaged")
        counts, real = (
            {name.removeprefix(start): value.astype(bool) for name, value in arrays.items() if name.startswith(start)}
            for start in (f"{number:03d}.counts.", f"{number:03d}.real.")
        )
        shapes = {name: tuple(shape) for name, shape in described.get("shapes", {}).items()}
        found.append(Case(described["name"], inputs, counts, real, shapes))
    return found
