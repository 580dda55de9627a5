"""Is a GGUF file whole? Its header says where every tensor ends; the weights themselves are not read."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import BinaryIO

from autorev.errors import ModelBuildError
from autorev.packages import pip_install, require

# The format's value types by number: struct codes of the scalars, then strings and arrays.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_SIZES = (".block_count", ".embedding_length")
"""Keys behind the architecture's name, for which `transformers` would take its own numbers (those of a 7 B model)."""


def check_whole(path: Path) -> list[str]:
    """The keys in the header of `path`, if it holds everything that its header announces.

    Raises:
        ModelBuildError: not a GGUF file, or one that was cut short.
        MissingPackageError: it cannot be read without one.
    """
    require("a GGUF file", "transformers", "gguf")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _Header(file, path)
            needed = header.end_of_data()
    except OSError as error:
        raise ModelBuildError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ModelBuildError(
            f"{path} is damaged: it holds lists within lists without end; download it again"
        ) from None
    if size < needed:
        raise ModelBuildError(
            f"{path} is cut short: its header announces {needed:,} bytes and the file has {size:,}; download it again"
        )
    return header.keys


def check_sizes(path: Path, keys: list[str]) -> None:
    """Raise unless the header says how large the model is.

    Raises:
        ModelBuildError: it does not.
    """
    unsaid = [name for name in _SIZES if not any(key.endswith(name) for key in keys)]
    if unsaid:
        raise ModelBuildError(
            f"{path} does not say how large its model is (its header has no {' and no '.join(unsaid)}); convert it "
            "again, or give the folder with the model's config.json"
        )


class _Header:
    """Reads the header front to back."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.size = path.stat().st_size
        self.order = "<"
        self.keys: list[str] = []

    def end_of_data(self) -> int:
        """The offset behind the last tensor."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.file.read(4) != b"GGUF":
            raise ModelBuildError(f"{self.path} is not a GGUF file: it does not begin with the letters GGUF")
        if self.number("I") > 0xFFFF:  # a small version number, seen with its bytes in the wrong order
            self.order = ">"
        tensors, pairs = self.number("Q"), self.number("Q")
        alignment = _DEFAULT_ALIGNMENT
        for _ in range(pairs):
            key, value = self.string(), self.value(self.number("I"))
            self.keys.append(key.decode(errors="replace"))
            if key == b"general.alignment" and value:
                alignment = value
        end = 0
        for _ in range(tensors):
            self.string()
            shape = [self.number("Q") for _ in range(self.number("I"))]
            kind, offset = self.number("I"), self.number("Q")
            try:
                per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise ModelBuildError(
                    f"{self.path} holds tensors of type {kind}, unknown to the installed gguf package: "
                    f"{pip_install('--upgrade', 'gguf')}"
                ) from None
            end = max(end, offset + prod(shape) // per_block * block_bytes)
        start = -(-self.file.tell() // alignment) * alignment
        return start + end if tensors else self.file.tell()

    def read(self, length: int) -> bytes:
        if self.file.tell() + length > self.size:
            raise ModelBuildError(f"{self.path} is cut short: it ends within its header; download it again")
        return self.file.read(length)

    def number(self, code: str) -> int:
        (value,) = struct.unpack(self.order + code, self.read(struct.calcsize(self.order + code)))
        return int(value)

    def string(self) -> bytes:
        return self.read(self.number("Q"))

    def value(self, kind: int) -> int | None:
        """An integer, or None for a value that matters to nobody here."""
        if kind == _STRING:
            self.string()
            return None
        if kind == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in _SCALARS:
                self.read(count * struct.calcsize(self.order + _SCALARS[element]))
            else:
                for _ in range(count):
                    self.value(element)
            return None
        if kind not in _SCALARS:
            raise ModelBuildError(
                f"{self.path} is damaged: its header holds a value of unknown type {kind}; download it again"
            )
        code = _SCALARS[kind]
        if code in "fd":
            self.read(struct.calcsize(self.order + code))
            return None
        return self.number(code)
