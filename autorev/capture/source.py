"""Where in the user's code something happened, without naming a path of this machine."""

from __future__ import annotations

import os
import sys
from inspect import getattr_static, getsourcelines, unwrap
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_torch = Path(torch.__file__).parent
# A file's name is as Python found it: through links, where an environment has any.
_libraries = tuple(
    f"{folder}{os.sep}" for root in (Path(__file__).parents[1], _torch) for folder in (root, root.resolve())
)
# torch's own blocks (nn.TransformerEncoderLayer) are user code to us; its machinery is not.
_torch_models = tuple(str(root / "nn" / "modules" / "transformer.py") for root in (_torch, _torch.resolve()))
_machinery = ("<frozen", "<string>", "<eval")


def caller_line() -> str:
    """`file.py:line` of the innermost frame that belongs to the model's code."""
    return caller_place()[0]


def caller_place() -> tuple[str, int]:
    """`file.py:line`, and the instruction within the function: it tells two adds on one line apart."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_model_code(frame.f_code.co_filename):
            return f"{short_path(frame.f_code.co_filename)}:{frame.f_lineno}", frame.f_lasti
        frame = frame.f_back
    return "unknown source", 0


def raised_line(error: BaseException) -> str:
    """`file.py:line` of the innermost frame of the model's code that `error` passed through."""
    found, trace = "unknown source", error.__traceback__
    while trace is not None:
        if is_model_code(trace.tb_frame.f_code.co_filename):
            found = f"{short_path(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def is_model_code(filename: str) -> bool:
    """Is it a file of the user's, or of torch's own blocks, and not of what runs them?"""
    if filename.startswith((*_libraries, *_machinery)):
        return filename in _torch_models
    return not filename.endswith(("/contextlib.py", "/functools.py", "/unittest/mock.py"))


def short_path(filename: str) -> str:
    """Relative to site-packages for libraries and to the current folder for the user's files; else the bare name."""
    path = Path(filename)
    if "site-packages" in path.parts:
        return str(Path(*path.parts[path.parts.index("site-packages") + 1 :]))
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return path.name


def definition_line(module: Any) -> str:
    """`file.py:line` where the module's `forward` is written."""
    forward = unwrap(getattr_static(type(module), "forward"))
    try:
        _, line = getsourcelines(forward)
        return f"{short_path(forward.__code__.co_filename)}:{line}"
    except (OSError, TypeError):  # compiled, or typed into an interpreter
        return "unknown source"
