"""What a branch saves for backward is not kept, but made again: PyTorch's own checkpoint, with an input that the tape
rebuilds, and with a comparison of everything that the two runs saved.

The frame and its hooks are those of `torch.utils.checkpoint` (non-reentrant): PyTorch's own graph of the branch stays.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointError, _checkpoint_hook, _CheckpointFrame, _recomputation_hook

from autorev.engine.digest import Comparison
from autorev.engine.modules import ModuleStates
from autorev.engine.replay import hooks_of_others_off
from autorev.errors import ReconstructionError


class SavedTensors:
    """The tensors that one run of a branch saved, dropped and made again."""

    def __init__(self, path: str, comparison: Comparison, modules: ModuleStates, mutates_input: bool = False) -> None:
        """What `modules` compares (parameters), or the branch writes to after it saved it (running statistics, which
        backward does not read), is left out of the `comparison`."""
        # The frame must not refer to this object, which refers to it: only the garbage collector would free them.
        self.frame = frame = _CheckpointFrame(
            partial(_still_running, path), False, partial(_explain, path, mutates_input), None
        )
        reference = weakref.ref(frame)

        def look(tensor: torch.Tensor) -> _Look:
            frame = reference()
            return _Look(tensor, comparison, modules, first=frame is not None and not frame.forward_completed)

        frame.metadata_fn = look

    def made_by(self, again: Callable[[], object]) -> None:
        """`again` runs the branch once more, under the hooks of the frame, which takes what it saves."""
        self.frame.recompute_fn = again

    @property
    def any(self) -> bool:
        """Was anything saved, so that backward may ask for it?"""
        return self.count > 0

    @property
    def count(self) -> int:
        """How many tensors were saved so far."""
        return len(self.frame.weak_holders)

    def asked_by_another(self, again: Callable[[], object]) -> Callable[[], None]:
        """What `made_by` was given, run for somebody else than autograd; what it saves is taken all the same."""
        return partial(_make, weakref.ref(self.frame), again)

    @contextmanager
    def dropped(self) -> Iterator[None]:
        """Around the first run."""
        with _checkpoint_hook(self.frame):
            yield
        self.frame.forward_completed = True


def _make(reference: weakref.ref[_CheckpointFrame], again: Callable[[], object]) -> None:
    frame, task = reference(), torch._C._current_graph_task_id()
    if frame is None or task == -1 or frame.is_recomputed[task]:  # nobody will ask, or it is there already
        with hooks_of_others_off():
            again()
        return
    try:
        with _recomputation_hook(reference, task):
            again()
        frame.is_recomputed[task] = True
        frame.check_recomputed_tensors_match(task)
    except CheckpointError as error:
        frame.unpack_error_cb(error)


def _still_running(path: str) -> None:
    raise ReconstructionError(
        f"a gradient was taken through {path} while it was running (`torch.autograd.grad` in its forward, or in a "
        "hook), before the step that it is could be completed; exclude it from the conversion"
    )


def _explain(path: str, mutates_input: bool, error: CheckpointError) -> None:
    text = str(error)
    if "unpacked once" in text:
        raise error
    places = re.findall(r"tensor at position (\d+)", text)
    what = f"what it saved is not the same (number {', '.join(places[:4])})" if places else "it saved other tensors"
    if places and mutates_input:
        raise ReconstructionError(
            f"{path} adds to its stream in place, and {what}: most likely the stream was saved before that, and what "
            "was saved has been overwritten since (the model's own backward fails on that, too). Let it make a new "
            "tensor: x = x + f(x)"
        ) from error
    raise ReconstructionError(
        f"{path} computed something else in backward than in forward: {what}, so no gradient of it may be "
        "trusted; look for a decision that its Python code takes anew each time (a counter or random numbers "
        "outside the module, a global), or an operation that is not deterministic "
        "(torch.use_deterministic_algorithms(True))"
    ) from error


class _Look:
    """One saved tensor of the first run, or one of the second that is compared with it."""

    __slots__ = ("comparison", "dtype", "first", "second", "shape", "wholly")

    def __init__(self, tensor: torch.Tensor, comparison: Comparison, modules: ModuleStates, first: bool) -> None:
        self.shape, self.dtype, self.comparison = tensor.shape, tensor.dtype, comparison
        self.first = self.second = None
        self.wholly = True
        if not first:
            self.second = tensor
        elif not _is_workspace(tensor) and tensor.untyped_storage()._cdata not in modules.compared:
            self.wholly = modules.hides
            self.first = comparison.first(tensor, self.wholly)

    def __ne__(self, other: Any) -> bool:
        if self.shape != other.shape or self.dtype != other.dtype:
            return True
        return self.comparison.says_other(self.first, other.second, self.wholly)

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return not self != other

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {self.dtype}"


def _is_workspace(tensor: torch.Tensor) -> bool:
    """A kernel's own memory (of oneDNN's and cuDNN's recurrent layers), parts of which are never written."""
    return tensor.dtype is torch.uint8 and tensor.dim() == 1
