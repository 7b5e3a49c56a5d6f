"""How the vectors of a text's tokens become the text's own, as sentence-transformers' `Pooling` has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Vectors = np.ndarray[Any, Any]

# What older files of sentence-transformers say, in the order in which several are put one behind the other.
OLDER = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Modules of sentence-transformers that do nothing once a model is trained.
NO_WORK = ("Dropout",)


def modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The ways whose results are put one behind the other, as a pooling's config.json says: an older one, or a newer with
    `pooling_mode`, one name or a list; the mean where it says nothing. They need not be among `POOLING`."""
    named: Any = config.get("pooling_mode", [mode for key, mode in OLDER.items() if config.get(key)] or "mean")
    return tuple(map(str, named)) if isinstance(named, (list, tuple)) else (str(named),)


def _weighted(vectors: Vectors) -> Vectors:
    """Later tokens weigh more: 1, 2, 3 … (SGPT, arXiv:2202.08904)."""
    import numpy as np

    weights = np.arange(1, len(vectors) + 1, dtype=vectors.dtype)
    return np.asarray((vectors * weights[:, None]).sum(axis=0) / weights.sum())


# What becomes of the vectors of a text's real tokens, `[tokens, width]`: `[width]`.
POOLING: dict[str, Callable[[Vectors], Vectors]] = {
    "cls": lambda vectors: vectors[0],
    "max": lambda vectors: vectors.max(axis=0),
    "mean": lambda vectors: vectors.sum(axis=0) / len(vectors),
    "mean_sqrt_len_tokens": lambda vectors: vectors.sum(axis=0) / len(vectors) ** 0.5,
    "weightedmean": _weighted,
    "lasttoken": lambda vectors: vectors[-1],
}
