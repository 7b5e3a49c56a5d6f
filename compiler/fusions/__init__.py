"""Rewrites of the eager model, a file each. Each says how often it fired, or why it did not apply.

A backend names the ones that it wants (`FUSIONS` in its module): what helps one runtime can blind another's own fusions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Declined:
    """Why a fusion does not apply to a model; the build goes on without it and the manifest says so."""

    reason: str
