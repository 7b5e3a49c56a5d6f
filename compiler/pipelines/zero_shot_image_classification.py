"""zero-shot-image-classification: which of some texts describes an image best, with scores that add up to 1."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.modalities.image_text import Processors
from compiler.pipelines import images, processor, text
from compiler.pipelines.base import Pipeline
from compiler.runtime import CompiledModel

if TYPE_CHECKING:
    import numpy as np

TASK = "zero-shot-image-classification"
# `candidate_labels` are those of every image that brings no texts of its own, put into `hypothesis_template`.
OPTIONS: Mapping[str, Any] = {"candidate_labels": None, "hypothesis_template": "This is a photo of {}."}
WINDOW, single = images.WINDOW, images.single


@dataclass(frozen=True)
class Feature:
    """An image, float32 `[channels, height, width]`, the labels to choose from, and the texts that stand for them."""

    pixels: np.ndarray[Any, Any]
    labels: tuple[str, ...]
    texts: tuple[str, ...]


def prepare(model: CompiledModel, options: Mapping[str, Any]) -> Processors:
    kind = str(model.config.model_type)
    if "siglip" in kind:
        raise InputError(f"{TASK}: {kind} scores each text alone, on a length of its own; call compiler.load's model instead")
    found: Processors = processor.read(model, "image-text")
    return found


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """Images, or mappings with `image` and `texts`: one, or a list."""
    found, one = images.items(args, named)
    return [_item(item) for item in found], one


def _item(given: Any) -> tuple[Any, tuple[str, ...] | None]:
    if not isinstance(given, Mapping):
        return given, None
    texts: Any = given.get("texts")
    if "image" not in given or not _are_texts(texts):
        raise InputError(f"{TASK}: an input that is a mapping has image, and texts, a list")
    return given["image"], tuple(texts)


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(one, str) and one.strip() for one in value)


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[Feature]]:
    labels, template = options["candidate_labels"], options["hypothesis_template"]
    if labels is not None and not _are_texts(labels):
        raise InputError(f"candidate_labels: {labels!r} is no list of texts")
    if labels is None and any(texts is None for _, texts in items):
        raise InputError(f"{TASK}: candidate_labels are missing: what may the image show?")
    if not isinstance(template, str) or "{}" not in template:
        raise InputError(f"hypothesis_template: {template!r} has no {{}} for a label to stand in")
    found = []
    for image, texts in items:
        chosen = tuple(labels) if texts is None else texts
        sentences = tuple(template.replace("{}", label) for label in chosen) if texts is None else texts
        found.append([Feature(images.pixels(pipe.prepared.images, image), chosen, sentences)])
    return found


def size(feature: Feature) -> int:
    return images.size(feature.pixels)


def group(pipe: Pipeline, feature: Feature) -> Hashable:
    """A batch is of images beside the same texts."""
    return (feature.pixels.shape, feature.texts)


def collate(pipe: Pipeline, features: Sequence[Feature]) -> dict[str, np.ndarray[Any, Any]]:
    """Images and texts as the model takes them. Raises InputError for a text that is longer than its positions."""
    import numpy as np

    texts = features[0].texts
    made = pipe.prepared.tokenizer(list(texts), padding=True, return_tensors="np", return_attention_mask=True, verbose=False)
    most = pipe.model.manifest.positions
    if most is not None and made["input_ids"].shape[1] > most:
        longest = texts[int(made["attention_mask"].sum(axis=1).argmax())]
        tokens = made["input_ids"].shape[1]
        raise InputError(f"{longest[:60]!r} is {tokens} tokens, and the model has {most} positions; say less")
    inputs = {"pixel_values": np.stack([feature.pixels for feature in features])}
    inputs |= {name: np.ascontiguousarray(made[name], dtype=np.int64) for name in ("input_ids", "attention_mask")}
    return {tensor.name: inputs[tensor.name] for tensor in pipe.model.manifest.signature.inputs}


def rows(
    pipe: Pipeline, outputs: Mapping[str, np.ndarray[Any, Any]], features: Sequence[Any]
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    for row in outputs["logits_per_image"]:
        yield {"logits_per_image": row}


def reduce(
    pipe: Pipeline, feature: Feature, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> np.ndarray[Any, Any]:
    return text.softmax(outputs["logits_per_image"])


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    ((feature, scores),) = parts
    return text.best_first(feature.labels, scores)
