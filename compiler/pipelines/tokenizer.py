"""A release's tokenizer, by the `tokenizers` library alone: transformers would bring torch, and seconds."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError, ReleaseError
from compiler.runtime import CompiledModel
from compiler.sources import TOKENIZER_FILES

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

log = logging.getLogger("compiler")

TOKENIZER = "tokenizer.json"
# Classes of transformers that take tokenizer.json as it is; the others build parts of it anew from tokenizer_config.json.
AS_IT_IS = {"PreTrainedTokenizerFast", "TokenizersBackend"}
# Where neither tokenizer_config.json nor special_tokens_map.json names a special token: transformers' defaults.
USUAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
# A tokenizer without a limit says 1e30.
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Tokenizer:
    """`backend` neither cuts nor pads. `limit` is the most tokens of a text, special ones included; None: any number.
    `specials` are the ids of pad, unk, cls, sep and mask that there are. `padding_side` is `right` or `left`."""

    backend: tokenizers.Tokenizer
    limit: int | None
    specials: Mapping[str, int]
    padding_side: str
    truncation_side: str = "right"
    clean_up: bool = False

    def encode(
        self,
        texts: Sequence[str | tuple[str, ...] | tuple[list[str], ...]],
        limit: int | None = None,
        stride: int = 0,
        strategy: str = "longest_first",
        words: bool = False,
    ) -> list[tokenizers.Encoding]:
        """Texts, or pairs of them, cut to `limit` tokens (the tokenizer's own when left out); what was cut off is in an
        encoding's `overflowing`. With `words` a text is a list of them.

        Raises:
            InputError: a text holds half of a surrogate pair, which is no character.
        """
        limit = self.limit if limit is None else limit
        backend = self.backend if limit is None else _cutting(self.backend, limit, stride, strategy, self.truncation_side)
        try:
            return list(backend.encode_batch([text[0] if len(text) == 1 else text for text in texts], is_pretokenized=words))
        except (TypeError, UnicodeEncodeError) as error:
            for part in (part for text in texts for part in text):
                for word in part if words else [part]:
                    if any("\ud800" <= letter <= "\udfff" for letter in word):
                        raise InputError(f"a text holds half of a character: {word[:60]!r}") from error
            raise

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        text = str(self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens))
        if not self.clean_up:
            return text
        for before, after in CLEANED:
            text = text.replace(before, after)
        return text

    def join(self, tokens: list[str]) -> str:
        """Tokens as a text."""
        decoder = self.backend.decoder
        return str(decoder.decode(tokens)) if decoder is not None else " ".join(tokens)


# What `clean_up_tokenization_spaces` of transformers removes.
CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@functools.lru_cache(maxsize=32)
def _cutting(backend: tokenizers.Tokenizer, limit: int, stride: int, strategy: str, direction: str) -> tokenizers.Tokenizer:
    """A copy that cuts: to set that on the shared one would be seen by other threads."""
    copy = type(backend).from_str(backend.to_str())
    copy.enable_truncation(limit, stride=stride, strategy=strategy, direction=direction)
    return copy


def read(model: CompiledModel) -> Tokenizer:
    """The tokenizer of a model's release.

    Raises:
        ReleaseError: the release has none, or it cannot be read.
    """
    import tokenizers

    folder = model.folder
    config = _json(folder / "tokenizer_config.json")
    path = folder / TOKENIZER
    try:
        backend = tokenizers.Tokenizer.from_file(str(path)) if path.is_file() else None
    except Exception as error:  # the library raises nothing narrower
        raise ReleaseError(f"{path}: cannot be read ({error}); fetch or build the release again") from error
    if backend is None or (reason := _rebuilt(json.loads(path.read_bytes()), config)):
        log.info("%s: %s; transformers builds the tokenizer", folder, reason if backend else f"no {TOKENIZER}")
        backend = _by_transformers(folder)
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    limits = [config.get("model_max_length"), model.manifest.positions]
    known = [int(limit) for limit in limits if limit and limit < NO_LIMIT]
    specials = _specials(folder, config, vocabulary)
    pad = getattr(model.config, "pad_token_id", None)
    specials.setdefault("pad", pad if isinstance(pad, int) else 0)
    return Tokenizer(
        backend=backend,
        limit=min(known, default=None),
        specials=specials,
        padding_side=config.get("padding_side", "right"),
        truncation_side=config.get("truncation_side", "right"),
        clean_up=bool(config.get("clean_up_tokenization_spaces")) and type(backend.model).__name__ != "BPE",
    )


def _rebuilt(stored: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Why transformers, under which the release was validated, would tokenize otherwise than tokenizer.json; empty if not."""
    if config.get("tokenizer_class", "").removesuffix("Fast") in {name.removesuffix("Fast") for name in AS_IT_IS}:
        return ""
    normalizer = stored.get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer":
        asked = {
            "lowercase": config.get("do_lower_case", True),
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"),
        }
        for name, value in asked.items():
            if normalizer.get(name) != value:
                return f"{TOKENIZER} says {name} is {normalizer.get(name)}, tokenizer_config.json {value}"
    before = stored.get("pre_tokenizer") or {}
    if before.get("type") == "ByteLevel" and before.get("add_prefix_space") != config.get("add_prefix_space", False):
        return f"{TOKENIZER} and tokenizer_config.json differ in add_prefix_space"
    return ""


def _by_transformers(folder: Path) -> tokenizers.Tokenizer:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make an empty one
        raise ReleaseError(f"{folder}: the release has no tokenizer; give a checkpoint with its own, and build again")
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ReleaseError(
            f"{folder}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]}); fetch or build the release again"
        ) from error
    if not hasattr(found, "backend_tokenizer"):
        raise ReleaseError(f"{folder}: {type(found).__name__} has no {TOKENIZER}; save one beside the checkpoint, build again")
    backend: tokenizers.Tokenizer = found.backend_tokenizer
    return type(backend).from_str(backend.to_str())


def _specials(folder: Path, config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, int]:
    mapped = _json(folder / "special_tokens_map.json")
    found = {}
    for kind, usual in USUAL.items():
        named = config.get(f"{kind}_token") or mapped.get(f"{kind}_token")
        names = [named["content"] if isinstance(named, dict) else named] if named else usual
        if ids := [vocabulary[name] for name in names if name in vocabulary]:
            found[kind] = ids[0]
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ReleaseError(f"{path}: not JSON; fetch or build the release again") from error
    return value if isinstance(value, dict) else {}


def collate(
    tokenizer: Tokenizer, names: Sequence[str], encodings: Sequence[tokenizers.Encoding]
) -> dict[str, np.ndarray[Any, Any]]:
    """Encodings as the model's int64 inputs `[batch, sequence]`, padded to the longest on the tokenizer's side."""
    import numpy as np

    longest = max(len(encoding) for encoding in encodings)
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    inputs = {}
    for name in names:
        filler = tokenizer.specials["pad"] if name == "input_ids" else 0
        array = np.full((len(encodings), longest), filler, dtype=np.int64)
        for row, encoding in zip(array, encodings, strict=True):
            place = slice(longest - len(encoding), None) if tokenizer.padding_side == "left" else slice(len(encoding))
            row[place] = getattr(encoding, fields[name])
        inputs[name] = array
    return inputs
