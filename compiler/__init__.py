"""An ahead-of-time model compiler for CPUs: checkpoints in, validated and versioned releases out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compiler.pipelines import pipeline as pipeline
    from compiler.runtime import load as load

__version__ = "0.1.0"

# What users open releases with, and where it is; each is imported when it is first used.
_LAZY = {"load": "compiler.runtime", "pipeline": "compiler.pipelines"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
