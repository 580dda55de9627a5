"""Stands here so that pytest puts the folder above on the path: tests import `tests.helpers`."""

import gc
import os
from collections.abc import Iterator

# For the workers of pytest, of which there is one for each core, and for every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")  # glibc then gives a tensor's memory back to the system
# The newest instructions differ between machines, and with them what a product in bf16 takes beside its result.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

import hypothesis  # noqa: F401  # its first import looks for referrers, and finds none that `_frozen_garbage` froze
import pytest

# Inductor and the quantising libraries ask for distutils in whatever order: after setuptools, all get the same one.
import setuptools  # noqa: F401


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many tiny operations: threads would only wait for each other, and for other programs'."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _frozen_garbage() -> None:
    """What is alive before a module's tests is left out of its garbage collections: the libraries alone are a million
    objects, through which each collection would go."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
