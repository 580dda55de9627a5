"""Which frames are the model's code, by the name of their file.

python -m pytest tests/unit/test_source.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autorev
from autorev.capture.source import raised_line

TORCH = Path(torch.__file__).parent


def raised_in(file: str) -> str:
    """The line that is told of an error which was raised in a file of that name, called from this one."""
    try:
        exec(compile("raise ValueError", file, "exec"))
    except ValueError as error:
        return raised_line(error)
    raise AssertionError


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (str(TORCH / "nn" / "modules" / "transformer.py"), "torch/nn/modules/transformer.py:1"),
        (f"{TORCH}vision/models/resnet.py", "torchvision/models/resnet.py:1"),
        ("/somewhere/net.py", "net.py:1"),
    ],
    ids=["torch", "torchvision", "a user"],
)
def test_the_models_code(file: str, told: str) -> None:
    """torch's own blocks, a library whose name begins with torch's, a user's file."""
    assert raised_in(file) == told


def test_machinery() -> None:
    """torch's, autorev's and Python's own frames are nobody's model, by whichever of its names a folder goes."""
    for file in (TORCH / "_ops.py", TORCH.resolve() / "_ops.py", Path(autorev.__file__).parent / "x.py"):
        assert raised_in(str(file)).startswith("tests/unit/test_source.py:")
