"""A digest of a model's weights: the same for the same weights, wherever they lie and in however many files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from autorev.files import path_of
from autorev.models.resolve import embedded_file, is_embedded
from autorev.models.weights import holds_weights, weight_files

_READERS = 4
"""Threads: digests are computed beside each other."""


def fingerprint(model: str | None) -> str:
    """A digest over names, shapes, dtypes and values of the weights that MODEL names; empty where it has none.

    Raises:
        AutorevError: its files cannot be read.
    """
    path = embedded_file() if is_embedded(model) else path_of(model or "")
    if path.suffix == ".gguf" and path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.sha256).hexdigest()
    if not holds_weights(path):
        return ""
    with ThreadPoolExecutor(_READERS) as pool:
        parts = [part for file in weight_files(path) for part in _parts(file, pool)]
    whole = hashlib.sha256()
    for part in sorted(parts):
        whole.update(part.encode())
    return whole.hexdigest()


def _parts(file: Path, pool: ThreadPoolExecutor) -> Iterator[str]:
    """A line for each tensor in a file."""
    if file.suffix != ".safetensors":
        from transformers.modeling_utils import load_state_dict

        yield from (_line(name, tensor) for name, tensor in load_state_dict(str(file)).items())
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        yield from pool.map(lambda name: _line(name, opened.get_tensor(name)), opened.keys())


def _line(name: str, tensor: torch.Tensor) -> str:
    values = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{name} {list(tensor.shape)} {tensor.dtype} {values.hexdigest()}\n"
