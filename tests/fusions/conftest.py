"""The small model of the formats' tests."""

from tests.backends.conftest import model

__all__ = ["model"]
