"""The errors that a user can cause. Each is one line: what, where, and what to do.

`compiler.cli` prints a `CompileError` without a traceback and exits 1; any other exception is a bug and exits 3.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compiler.types import Report


class CompileError(Exception):
    """An expected failure: bad input, or a check that was not met."""

    # What a build had released and published before it failed, as its JSON says it.
    released: Sequence[Mapping[str, Any]] = ()


class ConfigError(CompileError):
    """pipeline.yaml, or a data file that it names, is wrong."""


class SourceError(CompileError):
    """A checkpoint is missing, damaged, incomplete or not to be trusted."""


class StageError(CompileError):
    """A stage of the build could not do its work."""


class SlowError(StageError):
    """An int8 artifact is not faster than the next precision by enough."""


class DamagedError(StageError):
    """A file is not the one that was hashed."""


class NumericsError(CompileError):
    """An artifact departs from the original model by more than its limits allow.

    `reports` are the verdicts on all artifacts of the release, where they are known; `blame` is what was seen of their layers,
    as its JSON says it.
    """

    def __init__(self, message: str, reports: tuple[Report, ...] = (), blame: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.reports = reports
        self.blame = blame


class InputError(CompileError):
    """What is given to an opened release is nothing that it can answer."""


class ReleaseError(CompileError):
    """A release on disk is damaged, or one that exists would be changed.

    `files` are those that are not what they should be, where they are known.
    """

    def __init__(self, message: str, files: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.files = files


class LockError(CompileError):
    """A pipeline's lock is missing or damaged, cannot be written, or records something else than is here."""


class SigningError(CompileError):
    """A key cannot sign or verify releases, or what signs is not installed."""


class RegistryError(CompileError):
    """A registry refused, cannot be reached, or holds what must not be used."""


def brief(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def meant(word: str, valid: Sequence[str], otherwise: str, cutoff: float = 0.5) -> str:
    """What a message about a misspelt word ends in: the valid one that is meant, or `otherwise` where none is so near."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else otherwise
