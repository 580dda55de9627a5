"""Dispatch modes that no other thread notices.

Which modes are active is known to torch for each thread. But its `TorchDispatchMode` also writes to flags of the whole
process when it is entered, and on leaving puts back what they were when it came. While one thread is in a mode,
another may therefore be told that it is in one; and of two threads that leave in another order than they came, one
leaves the flags set for good. The modes here write to no such flag.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from autorev import metadata_cache
from autorev.patching import patched_here


class OwnMode(TorchDispatchMode):
    """A `TorchDispatchMode` of one thread, in which that thread compiles nothing and runs nothing compiled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._uncompiled: list[ExitStack] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would switch its compiler off around each operation, where it is switched off already."""
        return False

    def __enter__(self) -> Any:
        self._uncompiled.append(_uncompiled())
        _push_mode(self)
        return self

    def __exit__(self, *raised: Any) -> None:
        _pop_mode(self.__dict__.get("_mode_key"))
        self._uncompiled.pop().close()


class OwnFakeMode(FakeTensorMode, OwnMode):
    """A `FakeTensorMode` of one thread: where that one calls `TorchDispatchMode`, it calls `OwnMode`.

    A tensor that is real, though fake ones are all around it, tells its value.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], FakeTensor):
            return func(*args)
        kwargs = kwargs or {}
        asked = partial(super().__torch_dispatch__, func, types, args, kwargs)
        return metadata_cache.answer(self, func, args, kwargs, asked)


def _uncompiled() -> ExitStack:
    """Parts of a model that are compiled run as they are written until it is closed, and stay compiled.

    A mode does not see into compiled code. Torch knows that and runs a function as it is written where it meets it in
    a mode for the first time, but then never compiles it again.
    """
    stack = ExitStack()
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    name = "_callback_from_stance"  # asked at each call of a compiled function; None is the answer for "force_eager"
    if hasattr(compiler, name):
        stack.enter_context(patched_here(compiler, name, lambda original: lambda callback: None))
    return stack
