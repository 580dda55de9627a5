"""Stands here so that pytest puts the folder above on the path: tests import `tests.zoo` and `tests.handwritten`."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many tiny operations: threads would only wait for each other, and for other programs'."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
