"""What the tasks of text share: items, tokens, padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.pipelines import tokenizer
from compiler.pipelines.base import Pipeline, argument
from compiler.runtime import CompiledModel

if TYPE_CHECKING:
    import numpy as np
    import tokenizers


WINDOW = 4096


def prepare(model: CompiledModel, options: Mapping[str, Any]) -> tokenizer.Tokenizer:
    return tokenizer.read(model)


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """Texts: one, or a list."""
    given = single_argument(args, named)
    one = isinstance(given, str)
    found = [given] if one else list(given)
    for text in found:
        check_text(text)
    return found, one


def single_argument(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    given = argument(args, named)
    if not isinstance(given, (str, Mapping, Sequence)) and not hasattr(given, "__iter__"):
        raise InputError(f"an input is {type(given).__name__}, not a text")
    return given


def check_text(text: Any, what: str = "an input") -> None:
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}, not a text")


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[tokenizers.Encoding]]:
    return [[encoding] for encoding in encode(pipe, [(text,) for text in items])]


def encode(
    pipe: Pipeline, texts: Sequence[tuple[Any, ...]], limit: int | None = None, words: bool = False
) -> list[tokenizers.Encoding]:
    """Texts cut to what the model takes, which is said once."""
    encodings = pipe.prepared.encode(texts, limit, words=words)
    for encoding in encodings:
        if encoding.overflowing:
            most = pipe.prepared.limit if limit is None else limit
            pipe.say_once("cut", f"{pipe.task}: a text of more than {most} tokens, as many as the model takes, is cut there")
            break
    return list(encodings)


def size(feature: tokenizers.Encoding) -> int:
    return len(feature)


def group(pipe: Pipeline, feature: Any) -> None:
    """Texts of any length are padded."""


def collate(pipe: Pipeline, features: Sequence[tokenizers.Encoding]) -> dict[str, np.ndarray[Any, Any]]:
    names = [tensor.name for tensor in pipe.model.manifest.signature.inputs]
    return tokenizer.collate(pipe.prepared, names, features)


def rows(
    pipe: Pipeline, outputs: Mapping[str, np.ndarray[Any, Any]], features: Sequence[tokenizers.Encoding]
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Each text's part of the outputs; of those that answer for each token, the real ones."""
    aligned = {tensor.name for tensor in pipe.model.manifest.signature.outputs if tensor.shape[1:2] == ("sequence",)}
    left = pipe.prepared.padding_side == "left"
    for number, encoding in enumerate(features):
        place = slice(-len(encoding), None) if left else slice(len(encoding))
        yield {name: value[number][place] if name in aligned else value[number] for name, value in outputs.items()}


def single(answer: Any, options: Mapping[str, Any]) -> Any:
    return answer


def best_first(labels: Sequence[str], scores: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Labels with their scores."""
    found = [{"score": float(score), "label": label} for label, score in zip(labels, scores, strict=True)]
    return sorted(found, key=lambda answer: -float(str(answer["score"])))


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Over the last axis, in the logits' own precision."""
    import numpy as np

    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
