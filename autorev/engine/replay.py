"""Run a branch again exactly as it ran the first time.

Whatever a branch depends on besides its input is written down before its first run, and put in place around every
later one: random numbers and switches (`surroundings`), and what its modules hold (`modules`). What cannot be put back
is compared: parameters and arguments, and, in `saved`, everything that the branch saved for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from autorev.couplings.arithmetic import Arithmetic
from autorev.couplings.coupling import State
from autorev.engine.digest import Comparison, looked_at
from autorev.engine.kept import KeptOutputs
from autorev.engine.mode import REVERSIBLE, running
from autorev.engine.modules import ModuleStates
from autorev.engine.owned import is_zero, version_of
from autorev.engine.plain_data import is_generator
from autorev.engine.surroundings import RandomStates, Settings, devices_of
from autorev.errors import ReconstructionError

if TYPE_CHECKING:
    from autorev.engine.tiles import SeenTiled

Completes = Callable[[Callable[[], torch.Tensor]], None]
"""Told that all tiles of a call have run; is given a function that hands over what they computed."""
Rest = Callable[[Callable[[], torch.Tensor]], torch.Tensor]
"""What a branch returns, as a function of what its last, tiled call did."""


@dataclass(frozen=True)
class InputLike:
    """What the input of a branch is like, besides its values."""

    device: torch.device
    dtype: torch.dtype
    through: torch.dtype
    """The dtype in which the step before handed the stream on; another where the model casts it between blocks."""
    requires_grad: bool
    stride: tuple[int, ...]
    """Kernels sum in another order where the memory is laid out in another way."""

    @classmethod
    def of(cls, x: torch.Tensor, through: torch.dtype) -> InputLike:
        """What `x` is like."""
        return cls(x.device, x.dtype, through, x.requires_grad, x.stride())

    def made(self, state: State, arithmetic: Arithmetic) -> torch.Tensor:
        """The input, from a state whose stream it is; a new tensor without history."""
        value = arithmetic.decode(state.stream, self.through).to(self.dtype)
        if value.stride() != self.stride and 0 not in self.stride:
            laid_out = torch.empty_strided(value.shape, self.stride, dtype=value.dtype, device=value.device)
            value = laid_out.copy_(value)
        return value.detach().requires_grad_(self.requires_grad)


class Replay:
    """What one run of a branch depended on; made before that run."""

    def __init__(self, path: str, inputs: tuple[InputLike, ...], mutates_input: bool) -> None:
        """`path`: the block's full name; `inputs`: the branch's, one for each lane."""
        self.path = path
        self.inputs = inputs
        self.mutates_input = mutates_input
        """Does the branch write to its input? Then it is given a copy."""
        self.modules = ModuleStates()
        self.roots: list[nn.Module] = []
        self.arguments: list[tuple[torch.Tensor, int]] = []
        self.devices: list[tuple[str, int]] = []
        self.random: RandomStates | None = None
        self.settings: Settings | None = None
        self.again: Callable[..., tuple[Any, tuple[torch.Tensor, ...]]] | None = None
        """The branch, for later runs: x -> (everything else that the block returns, x + f(x)), with an x and a sum for
        each lane. It holds neither its input nor a history (Rule 5 of NOTE [ Reconstruction ] in `step`)."""
        self.again_but_for_tiles: Callable[[torch.Tensor], Rest] | None = None
        """The same, up to its last call, which is of a tiled module: what is left to do is a function of what that call
        returns. None: it does not end so."""
        self.kept: KeptOutputs | None = None
        """What attention returned in the first run, where a second need not compute it."""
        self.tiled: list[SeenTiled] = []
        """The tiled calls of the first run, in order."""

    def add_module(self, module: nn.Module, path: str, writes: Callable[[nn.Module, str], bool]) -> None:
        """`module` is about to run as part of the branch."""
        if id(module) not in self.modules.seen:
            self.roots.append(module)
            self.modules.add(module, path, writes)

    def add_arguments(self, structure: Any) -> None:
        """The tensors in `structure` are read by the branch, and its random generators are drawn from."""
        for leaf in tree_leaves(structure):
            if is_generator(leaf):
                self.modules.hold_object(leaf, self.path)
        tensors = [leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor)]
        self.arguments += [(tensor, version_of(tensor)) for tensor in tensors]
        gates = any(tensor.requires_grad and is_zero(tensor) for tensor in tensors)
        self.modules.hides = self.modules.hides or gates

    def ends_with_tiles(self) -> None:
        """The branch is one tiled call, and what that returns is x + f(x)."""
        again = self.again
        assert again is not None

        def but_for_tiles(x: torch.Tensor) -> Rest:
            again(x)
            return lambda returned: returned()

        self.again_but_for_tiles = but_for_tiles

    def begins(self) -> None:
        """Called when the first run is about to begin."""
        read = (*(tensor for tensor, _ in self.arguments), *(owned.tensor for owned in self.modules.owned))
        self.devices = devices_of(*(like.device for like in self.inputs), *(tensor.device for tensor in read))
        self.settings = Settings(self.devices)
        self.random = RandomStates(self.devices) if looked_at() else None

    def ran(self) -> None:
        """Called after the first run."""
        self.modules.ran()
        if self.random is not None:
            self.random.keep_moved()

    def run(self, values: tuple[torch.Tensor, ...], asked_by_autograd: bool) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """The branch on `values`, in the circumstances of the first run.

        Raises:
            ReconstructionError: a parameter or an input was changed since, or sharded parameters are not there.
        """
        assert self.again is not None
        with self.circumstances(asked_by_autograd, self.random), branch_run(BranchRun(self)), self._returning_kept():
            return self.again(*self._given(values))

    def run_but_for_tiles(self, values: tuple[torch.Tensor, ...], completes: Completes) -> Rest:
        """The same, for autograd, up to the tiled call at its end, of whose result `completes` will be told; returns
        x + f(x) as a function of that."""
        assert self.again_but_for_tiles is not None
        run = BranchRun(self, last_completes=completes)
        with self.circumstances(True, self.random), branch_run(run), self._returning_kept():
            return self.again_but_for_tiles(*self._given(values))

    def _given(self, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(value.clone() for value in values) if self.mutates_input else values

    def _returning_kept(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.kept is None else self.kept.later()

    @contextmanager
    def circumstances(self, asked_by_autograd: bool, random: RandomStates | None) -> Iterator[None]:
        """Those of the first run. `random`: of the part that is run again."""
        assert self.settings is not None
        with ExitStack() as stack:
            self._make_resident(stack, asked_by_autograd)
            self.check()
            if random is not None:
                stack.enter_context(random.replayed())
            stack.enter_context(self.modules.restored())
            stack.enter_context(self.settings.restored())
            stack.enter_context(running(REVERSIBLE))  # whatever this thread runs at the moment
            yield

    def check(self) -> None:
        """Are parameters and arguments what they were?

        Raises:
            ReconstructionError: one is not.
        """
        change = self.modules.change()
        if change is not None:
            raise ReconstructionError(
                f"{change} between forward and backward, so {self.path} cannot be run again as it was; step the "
                "optimiser after backward, or call the model anew"
            )
        for tensor, version in self.arguments:
            if version_of(tensor) != version:
                raise ReconstructionError(
                    f"an argument of {self.path} (shape {tuple(tensor.shape)}) was changed in place between forward "
                    "and backward; change a copy of it"
                )

    def _make_resident(self, stack: ExitStack, asked_by_autograd: bool) -> None:
        """Sharded parameters (FSDP) are gathered by hooks on the way of autograd, and only there: elsewhere their
        memory may have been given back, and reading them would end the process. What ZeRO-3 has gathered for the
        backward of the very module that asks for this run has to be there behind it, too."""
        for owned in self.modules.owned:
            users = getattr(owned.tensor, "ds_active_sub_modules", None)
            if users:
                users.add(self.path)
                stack.callback(users.discard, self.path)
        missing = self._not_resident()
        if not missing:
            return
        for root in self.roots:
            for module in root.modules():
                unshard, reshard = (getattr(module, name, None) for name in ("unshard", "reshard"))
                if callable(unshard) and callable(reshard):
                    unshard()
                    stack.callback(reshard)
        missing = self._not_resident()
        if missing:
            when = "" if asked_by_autograd else ", out of the order in which autograd goes back,"
            raise ReconstructionError(
                f"{self.path} has to be run again{when} and its parameter {missing} is sharded and not gathered: call "
                "backward once per forward (no retain_graph, one loss), or set reshard_after_forward=False and "
                "set_reshard_after_backward(False) on the sharded blocks"
            )

    def _not_resident(self) -> str | None:
        for owned in self.modules.owned:
            tensor = owned.tensor
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.numel():
                storage = tensor.untyped_storage()
                if not tensor.is_meta and storage.nbytes() == 0:
                    return owned.path
        return None


@dataclass(eq=False)
class BranchRun:
    """The run of a step's branch that a thread is in."""

    replay: Replay
    comparison: Comparison | None = None
    """Of a first run; None: it is a later one."""
    last_completes: Completes | None = None
    """Of a later run that stops at its last tiled call."""
    count: int = 0
    """Tiled calls so far."""


_run: ContextVar[BranchRun | None] = ContextVar("autorev branch run", default=None)


@contextmanager
def branch_run(run: BranchRun | None) -> Iterator[None]:
    """While it lasts, this thread is in `run`."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def branch_run_here() -> BranchRun | None:
    """The run that this thread is in."""
    return _run.get()


@contextmanager
def hooks_of_others_off() -> Iterator[None]:
    """Runs inside another step's second run must not be taken for that step's."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor,), lambda packed: packed[0]):
        yield
