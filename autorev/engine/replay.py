"""Run a branch again exactly as it ran the first time.

Whatever a branch depends on besides its input is written down before its first run, and put in place around every
later one: random numbers, autocast, training flags, parameters (`torch.func.functional_call` may have lent others), and
buffers, which a later run must not update again. What was changed in place since then cannot be put back, and is an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map_only

from autorev.errors import ReconstructionError

Branch = Callable[[torch.Tensor, Any], tuple[Any, torch.Tensor]]
"""(x, further inputs) -> (everything the block returns, x + f(x))."""


@dataclass(eq=False)
class _Owned:
    """A parameter or buffer as it was found."""

    home: dict[str, Any]
    name: str
    path: str
    tensor: torch.Tensor
    version: int


class Replay:
    """One call of `branch` on behalf of `module`."""

    def __init__(
        self, module: nn.Module, path: str, branch: Branch, like: torch.Tensor, inputs: Any, written: tuple[str, ...]
    ) -> None:
        """`like`: the branch's input; `written`: buffers (by path below the module) that it is known to update."""
        self.path, self.branch = path, branch
        # Of the inputs, only values are needed again. Kept with their history, an input that an earlier block of the
        # chain returned (T5's position bias) would close a circle through autograd's own graph that no one collects.
        self.inputs = tree_map_only(torch.Tensor, _alias, inputs)
        self.input_versions = [_version(t) for t in _tensors(self.inputs)]
        self.training = [(child, child.training) for child in module.modules()]
        self.owned: list[_Owned] = []
        self.updated: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for name, child in module.named_modules():
            prefix = f"{name}." if name else ""
            updates = isinstance(child, _NormBase) and child.training and child.track_running_stats
            for home in (child._parameters, child._buffers):
                for key, tensor in home.items():
                    if tensor is None:
                        continue
                    if home is child._buffers and (updates or prefix + key in written):
                        self.updated.append((home, key, tensor.clone()))
                    else:
                        kept = tensor if tensor.is_leaf else _alias(tensor)
                        self.owned.append(_Owned(home, key, prefix + key, kept, _version(tensor)))
        self.autocast = _autocast_states()
        tensors = [like, *_tensors(self.inputs), *(owned.tensor for owned in self.owned)]
        self.devices = sorted({t.device.index for t in tensors if t.is_cuda})
        self.random = _random_states(self.devices)

    def ran(self) -> None:
        """Called after the first run: random states are kept only if that run moved them."""
        after = _random_states(self.devices)
        self.random = {k: v for k, v in self.random.items() if not torch.equal(v, after[k])}

    def run(self, value: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The branch on `value`, in the circumstances of the first run.

        Raises:
            ReconstructionError: a parameter or an input was changed in place since.
        """
        self._check()
        with _random_replayed(self.random), self._modules_restored(), _autocast(self.autocast):
            return self.branch(value, self.inputs)

    def _check(self) -> None:
        for owned in self.owned:
            if _version(owned.tensor) != owned.version:
                raise ReconstructionError(
                    f"{self.path}.{owned.path} was changed in place between forward and backward, so {self.path} "
                    "cannot be run again as it was; step the optimiser after backward, or call the model anew"
                )
        for tensor, version in zip(_tensors(self.inputs), self.input_versions, strict=True):
            if _version(tensor) != version:
                raise ReconstructionError(
                    f"an argument of {self.path} (shape {tuple(tensor.shape)}) was changed in place between forward "
                    "and backward; change a copy of it"
                )

    @contextmanager
    def _modules_restored(self) -> Iterator[None]:
        undo: list[tuple[dict[str, Any], str, Any]] = []
        flags = [(module, module.training) for module, training in self.training if module.training != training]
        try:
            for module, _ in flags:
                module.training = not module.training
            for owned in self.owned:
                current = owned.home.get(owned.name)
                if current is not owned.tensor:
                    undo.append((owned.home, owned.name, current))
                    owned.home[owned.name] = owned.tensor
            for home, name, value in self.updated:
                undo.append((home, name, home[name]))
                home[name] = value.clone()
            yield
        finally:
            for home, name, tensor in undo:
                home[name] = tensor
            for module, training in flags:
                module.training = training


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _tensors(structure: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


# -- random numbers


_CPU = -1
"""The CPU among device indices."""


def _random_states(devices: list[int]) -> dict[int, torch.Tensor]:
    """Generator states by device index: the CPU's, and those of the CUDA devices that the branch computes on."""
    return {_CPU: torch.get_rng_state(), **{index: torch.cuda.get_rng_state(index) for index in devices}}


@contextmanager
def _random_replayed(states: dict[int, torch.Tensor]) -> Iterator[None]:
    before = _random_states([index for index in states if index != _CPU]) if states else {}
    try:
        _set_random(states)
        yield
    finally:
        _set_random({index: before[index] for index in states})


def _set_random(states: dict[int, torch.Tensor]) -> None:
    for index, state in states.items():
        if index == _CPU:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, index)


# -- autocast


def _autocast_states() -> list[tuple[str, bool, torch.dtype]]:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]


@contextmanager
def _autocast(states: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    with ExitStack() as stack:
        for state, current in zip(states, _autocast_states(), strict=True):
            if state != current:
                device, enabled, dtype = state
                stack.enter_context(torch.autocast(device, enabled=enabled, dtype=dtype))
        yield
