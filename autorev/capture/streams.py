"""Random numbers for a forward that is only looked at, from streams that nobody else draws from.

The generators of Python, numpy and torch are one for the whole process. A forward that drew from them would move them;
and to put them back afterwards as they were before would give another thread a second time what it drew meanwhile.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from autorev.own_mode import OwnMode
from autorev.patching import patched_here


@contextmanager
def own_streams(**python: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, what the calling thread draws comes from streams of its own.

    `python` are functions that stand in for those of Python's `random`, by name.
    """
    with ExitStack() as stack:
        stack.enter_context(_python_put_back())
        for name, function in {**_methods(random, random.Random), **python}.items():
            stack.enter_context(patched_here(random, name, _always(function)))
        numpy = sys.modules.get("numpy.random")
        if numpy is not None:  # what is not imported draws nothing
            functions = _methods(numpy, numpy.RandomState)
            for name, function in {**functions, **dict.fromkeys(("ranf", "sample"), functions["random"])}.items():
                stack.enter_context(patched_here(numpy, name, _always(function)))
        draws = _TorchDraws()
        for name in ("get_rng_state", "set_rng_state", "manual_seed", "seed", "initial_seed"):
            for module in (torch, torch.random):  # checkpointing asks the one, others the other
                stack.enter_context(patched_here(module, name, _always(getattr(draws, name))))
        if not _faked():  # fake tensors draw nothing
            stack.enter_context(draws)
        yield


def _methods(module: Any, kind: Any) -> dict[str, Callable[..., Any]]:
    """For each function of `module`, which draws from its one generator, the method of another of that `kind`."""
    own = cache(lambda: kind(0))  # made when it is needed, which it hardly ever is

    def method(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(own(), name)(*args, **kwargs)

    return {n: method(n) for n in vars(module) if not n.startswith("_") and callable(getattr(kind, n, None))}


def _always(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda original: function


@contextmanager
def _python_put_back() -> Iterator[None]:
    """For a forward that has `from random import random`: it draws from the common stream, whatever is patched.

    That is undone where this is the only thread. Where there are others, no one can tell who moved the stream.
    """
    state, alone = random.getstate(), _alone()
    try:
        yield
    finally:
        if alone and _alone() and random.getstate() != state:
            random.setstate(state)


def _alone() -> bool:
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    return all(thread.name == "tqdm_monitor" for thread in others)  # it looks after progress bars


class _TorchDraws(OwnMode):
    """Operators draw from copies of torch's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _faked() or _drops_nothing(func, args):
            return func(*args, **kwargs)
        device = _device(args, kwargs)
        default = None if device.type == "meta" else _default_generator(device)
        if default is None or kwargs.get("generator", default) not in (None, default):
            return func(*args, **kwargs)
        seeded = _taking_generator(func)
        if seeded is not None:
            return seeded(*args, **{**kwargs, "generator": self._generator(device)})
        # A kernel that takes no generator (a GPU's dropout) draws from torch's own, which is put back at once: what
        # another thread draws while the kernel is being started, and no longer, is drawn twice.
        state = default.get_state()
        try:
            return func(*args, **kwargs)
        finally:
            default.set_state(state)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            own, default = torch.Generator(device), _default_generator(device)
            assert default is not None
            own.set_state(default.get_state())
            self.generators[device] = own
        return self.generators[device]

    # -- what `torch` has functions for, of the CPU's generator ------------------------------------------------------

    def get_rng_state(self) -> torch.Tensor:
        return self._generator(_cpu).get_state()

    def set_rng_state(self, new_state: torch.Tensor) -> None:
        self._generator(_cpu).set_state(new_state)

    def manual_seed(self, seed: Any) -> torch.Generator:
        return self._generator(_cpu).manual_seed(int(seed))

    def seed(self) -> int:
        return self._generator(_cpu).seed()

    def initial_seed(self) -> int:
        return self._generator(_cpu).initial_seed()


_cpu = torch.device("cpu")


def _faked() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _drops_nothing(func: Any, args: tuple[Any, ...]) -> bool:
    """Fused attention may draw, and at dropout 0, where it does not, it may take long."""
    places = [n for n, argument in enumerate(func._schema.arguments) if argument.name == "dropout_p"]
    return bool(places) and (len(args) <= places[0] or args[places[0]] == 0)  # 0 is the default


def _device(args: Any, kwargs: Any) -> torch.device:
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    first = next(tensors, None)
    device = torch.device(kwargs.get("device") or (_cpu if first is None else first.device))
    if device.index is None and device.type not in ("cpu", "meta"):
        return torch.device(device.type, torch.get_device_module(device.type).current_device())
    return device


def _default_generator(device: torch.device) -> torch.Generator | None:
    if device.type == "cpu":
        return torch.default_generator
    generators = getattr(torch.get_device_module(device.type), "default_generators", ())
    return generators[device.index] if device.index is not None and device.index < len(generators) else None


@cache
def _taking_generator(func: Any) -> Any:
    """`func`, or its namesake with the same arguments and a generator; None where there is neither."""
    names = {argument.name for argument in func._schema.arguments}
    for overload in (func, *(getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads())):
        if {argument.name for argument in overload._schema.arguments} == names | {"generator"}:
            return overload
    return None
