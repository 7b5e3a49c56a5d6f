from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def plain_torchscript() -> Iterator[None]:
    """TorchScript optimizes for each new shape, which takes far longer than these tiny models do."""
    import torch

    with torch.jit.optimized_execution(False):
        yield
