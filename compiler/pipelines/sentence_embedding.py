"""sentence-embedding: one vector a text, pooled and normalized as the checkpoint's own sentence-transformers files say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError, ReleaseError
from compiler.pipelines import text, tokenizer
from compiler.pipelines.base import Pipeline
from compiler.pooling import NO_WORK, POOLING, modes
from compiler.runtime import CompiledModel

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

    Vectors = np.ndarray[Any, Any]

TASK = "feature-extraction"
# `prompt` is a name of config_sentence_transformers.json's prompts. `pooling` (mean, cls, max …) and `normalize` are for a
# release without sentence-transformers' files.
OPTIONS: Mapping[str, Any] = {"prompt": None, "pooling": None, "normalize": None}


@dataclass(frozen=True)
class Sentences(tokenizer.Tokenizer):
    """A tokenizer, and what follows the model. `pooling` are the names of what is concatenated."""

    pooling: tuple[str, ...] = ()
    normalize: bool = False
    lower: bool = False
    prompts: Mapping[str, str] | None = None
    default_prompt: str | None = None
    width: int | None = None
    similarity: str = "cosine"


def prepare(model: CompiledModel, options: Mapping[str, Any]) -> Sentences:
    """Raises InputError when the release does not say how to pool, and nor does who calls."""
    read = tokenizer.read(model)
    folder = model.folder
    modules = _json(folder / "modules.json")
    model_settings = _json(folder / "sentence_bert_config.json") or {}
    settings = _json(folder / "config_sentence_transformers.json") or {}
    pooling: tuple[str, ...] = ()
    normalize = False
    for module in (modules or [])[1:]:
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(_json(folder / module["path"] / "config.json") or {}, folder)
        elif kind == "Normalize":
            normalize = True
        elif kind not in NO_WORK:
            raise InputError(f"{folder}: modules.json names a {kind}, which only sentence-transformers has")
    if options["pooling"] is not None:
        pooling = (options["pooling"],)
    if options["normalize"] is not None:
        normalize = options["normalize"]
    if not pooling:
        raise InputError(f"{folder}: has no modules.json that says how to pool; give pooling, such as mean or cls (--pooling)")
    if unknown := sorted(set(pooling) - set(POOLING)):
        raise InputError(f"pooling: {unknown[0]!r}; {', '.join(POOLING)}")
    most = [limit for limit in (read.limit, model_settings.get("max_seq_length")) if limit]
    fields = {**vars(read), "limit": min(most, default=None)}
    return Sentences(
        **fields,
        pooling=pooling,
        normalize=normalize,
        lower=bool(model_settings.get("do_lower_case")),
        prompts=settings.get("prompts") or {},
        default_prompt=settings.get("default_prompt_name"),
        width=settings.get("truncate_dim"),
        similarity=settings.get("similarity_fn_name") or "cosine",
    )


def _pooling(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    if config.get("include_prompt", True) is False:
        raise InputError(f"{folder}: its pooling leaves prompts out, which only sentence-transformers can")
    return modes(config)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        raise ReleaseError(f"{path}: not JSON; fetch or build the release again") from error


items, size, collate, rows, single = text.items, text.size, text.collate, text.rows, text.single
WINDOW, group = text.WINDOW, text.group


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[tokenizers.Encoding]]:
    sentences: Sentences = pipe.prepared
    name = options["prompt"] or sentences.default_prompt
    prompts = sentences.prompts or {}
    if name is not None and name not in prompts:
        raise InputError(f"prompt: no {name!r}; the release has {', '.join(prompts) or 'none'}")
    prompt = prompts[name] if name else ""
    texts = [prompt + item.strip() for item in items]
    return [[encoding] for encoding in text.encode(pipe, [(one.lower() if sentences.lower else one,) for one in texts])]


def reduce(
    pipe: Pipeline, feature: tokenizers.Encoding, outputs: Mapping[str, Vectors], options: Mapping[str, Any]
) -> Vectors:
    """float32 `[width]`."""
    import numpy as np

    sentences: Sentences = pipe.prepared
    vectors = outputs["last_hidden_state"] if "last_hidden_state" in outputs else next(iter(outputs.values()))
    vector = np.concatenate([POOLING[mode](vectors) for mode in sentences.pooling])
    if sentences.normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return np.asarray(vector[: sentences.width], dtype=np.float32)


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Vectors:
    vector: Vectors = parts[0][1]
    return vector


def similar(sentences: Sentences, one: Vectors, other: Vectors) -> float:
    """How alike two vectors are, by what the release says: cosine, dot product, or a distance's negative."""
    import numpy as np

    if sentences.similarity == "dot":
        return float(one @ other)
    if sentences.similarity == "euclidean":
        return -float(np.linalg.norm(one - other))
    if sentences.similarity == "manhattan":
        return -float(np.abs(one - other).sum())
    return float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-12))
