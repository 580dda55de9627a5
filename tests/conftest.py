"""Stands here so that pytest puts the folder above on the path: tests import `tests.zoo` and `tests.handwritten`."""

import os
from collections.abc import Iterator

import pytest

# Inductor and the quantising libraries import setuptools in whatever order, and it insists on a distutils of its own.
os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many tiny operations: threads would only wait for each other, and for other programs'."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
