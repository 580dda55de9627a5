"""What travels beside the stream from block to block, and where a call finds the state that goes with its input.

The model's own loop carries the stream. The rest of the state travels beside it, and follows the stream by what it is:
by its memory (the tensor object may change on the way: FSDP and backward hooks hand on an alias; `detach` another
history), and, where a hook, a cast or another device has made a copy of it, by its values. A stream that is neither
(replaced, written to, or read a second time) starts a new chain, with velocity 0; that is said once, with the place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from autorev.devices import check_device
from autorev.engine.chain import ReversibleChain
from autorev.engine.digest import Digest, digest, looked_at, waited_for
from autorev.engine.mode import REVERSIBLE, mode
from autorev.engine.owned import memory_of
from autorev.engine.pipeline import check_no_stage
from autorev.engine.tape import Tape
from autorev.errors import ConversionError


@dataclass(eq=False)
class CarriedLane:
    """What a stream is known by on its way to the next step, and what goes with it."""

    memory: tuple[Any, ...]
    """See `memory_of`."""
    values: Digest | None
    """See `values_of`."""
    dtype: torch.dtype
    """In which the stream was handed on."""
    requires_grad: bool
    partner: torch.Tensor | None
    """The partner as autograd knows it; without values, but for the oracle. None: no gradient goes there."""

    @classmethod
    def of(cls, stream: torch.Tensor, partner: torch.Tensor | None) -> CarriedLane:
        """Of a stream that is handed on."""
        return cls(memory_of(stream), values_of(stream), stream.dtype, stream.requires_grad, partner)

    def is_memory_of(self, stream: torch.Tensor) -> bool:
        """Is `stream` the same memory, with the same values?"""
        return self.memory == memory_of(stream) and self.values == values_of(stream)


@dataclass(eq=False)
class Carried:
    """What goes with the streams of all lanes from one step to the next."""

    number: int
    """The step that returned the streams."""
    lanes: tuple[CarriedLane, ...]
    tape: Tape
    """It holds the state: after `position` of its steps."""
    position: int
    seed: int | None
    """What this pass draws its couplings from, where they are random."""


def values_of(stream: torch.Tensor) -> Digest | None:
    """Whoever writes through `.data` or NumPy is not counted. None on a GPU, which is not waited for: there, what runs
    again in backward differs."""
    return digest(stream.detach(), exact=True) if waited_for(stream.device) else None


# -- one forward pass


@dataclass(eq=False)
class Apart:
    """A stream that the model's loop carries as two tensors, of which it is the sum."""

    stream: torch.Tensor
    parts: tuple[torch.Tensor, torch.Tensor]
    known: tuple[CarriedLane, CarriedLane]

    @classmethod
    def of(cls, stream: torch.Tensor, *parts: torch.Tensor) -> Apart:
        """Handed on as `parts`."""
        first, second = parts
        return cls(stream, (first, second), (CarriedLane.of(first, None), CarriedLane.of(second, None)))

    def is_sum_of(self, *parts: torch.Tensor) -> bool:
        """Are these the memory of the parts that were handed on, in whatever order?"""
        return any(all(map(self._is_part, order, (0, 1))) for order in (parts, parts[::-1]))

    def _is_part(self, given: torch.Tensor, number: int) -> bool:
        part = self.parts[number]
        same = given.untyped_storage()._cdata == part.untyped_storage()._cdata
        return same and self.known[number].is_memory_of(given)


@dataclass(eq=False)
class Pass:
    """One forward pass through a chain."""

    latest: Carried | None = None
    """What the last step left, for a stream that was copied since."""
    apart: Apart | None = None
    """How the last step handed its stream on, where that is in two parts."""
    given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """The arguments of the module that holds the loop; None where blocks are called one by one."""
    unchecked: list[Tape] = field(default_factory=list)
    """Tapes of which it is not known yet whether a stream has left its grid, and that no backward pass will look at."""

    def ends(self) -> None:
        """Look at them, now that waiting for the device holds nothing up.

        Raises:
            FixedPointRangeError: one has.
        """
        tapes, self.unchecked = self.unchecked, []
        for tape in tapes:
            tape.check_peak()


_passes: ContextVar[dict[ReversibleChain, Pass] | None] = ContextVar("autorev passes", default=None)


class _Loose(threading.local):
    """Passes of blocks that are called one by one, outside of the module that holds their loop."""

    def __init__(self) -> None:
        self.passes: WeakKeyDictionary[ReversibleChain, Pass] = WeakKeyDictionary()


_loose = _Loose()


@contextmanager
def one_pass(chains: Sequence[ReversibleChain], given: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[None]:
    """Around the forward of the module that holds the loop, called with `given`: no state is kept beyond it."""
    passes = {chain: Pass(given=given) for chain in chains}
    token = _passes.set({**(_passes.get() or {}), **passes})
    try:
        yield
        for one in passes.values():
            one.ends()
    finally:
        _passes.reset(token)


def pass_of(chain: ReversibleChain) -> Pass:
    """The forward pass that this thread is in."""
    found = (_passes.get() or {}).get(chain)
    return found if found is not None else _loose.passes.setdefault(chain, Pass())


# -- a stream arrives at a block


def arrive(
    chain: ReversibleChain, streams: tuple[torch.Tensor, ...], numbers: Sequence[int]
) -> tuple[Carried | None, int, str]:
    """`streams`, one for each lane, reach a block that may be one of the steps `numbers` (several: shared weights).

    Returns: what goes with it (None: a chain starts here), the step that it is, and what a chain that starts here is
        called.

    Raises:
        ConversionError: the state cannot be known, as under a checkpoint around a single block, or in a stage of a
            pipeline; or the stream lies on a device where nothing is made reversible.
    """
    here = pass_of(chain)
    found = _by_memory(chain, streams)
    if found is None and here.latest is not None and any(number > here.latest.number for number in numbers):
        found = here.latest if _is_copy(here.latest, streams) else None
    found = _still_there(found)
    number = numbers[0] if found is None else next((n for n in numbers if n > found.number), numbers[0])
    label = chain.name
    if found is None:
        here.ends()  # of an earlier pass that left the chain before its end
        check_no_stage(chain.paths[number])
        check_device(streams[0].device.type, f"the stream that reaches {chain.paths[number]}")
        if here.latest is not None and number > here.latest.number:
            label = f"{chain.name} from {chain.paths[number]}"
            _say_restart(chain, here.latest, number, streams)
        elif number and torch._C._current_graph_task_id() != -1:
            raise ConversionError(
                f"a block of {chain.name} was run again in backward, apart from the blocks before it, as with a "
                "checkpoint around it. Reversible blocks need no checkpoint; remove it, or put one around the whole "
                "chain"
            )
        elif torch.is_grad_enabled() and mode() == REVERSIBLE:
            chain.drifts.clear()  # of an earlier forward pass
    return found, number, label


def _by_memory(chain: ReversibleChain, streams: tuple[torch.Tensor, ...]) -> Carried | None:
    found: Carried | None = chain.carried.get(streams[0].untyped_storage())
    if found is None or len(found.lanes) != len(streams):
        return None
    lanes = list(zip(found.lanes, streams, strict=True))
    if not all(lane.is_memory_of(stream) for lane, stream in lanes):
        return None
    if any(stream.is_inference() for stream in streams) and not _is_copy(found, streams):
        return None  # these do not count how often they are written to
    if any(not lane.requires_grad and stream.requires_grad and not stream.is_leaf for lane, stream in lanes):
        raise ConversionError(
            f"a block of {chain.name} ran without gradients, and what it returned has a gradient now, as with a "
            "reentrant checkpoint: the chain's state cannot follow. Reversible blocks need no checkpoint; remove it"
        )
    return found


def _is_copy(latest: Carried, streams: tuple[torch.Tensor, ...]) -> bool:
    """Do `streams` hold what the last step returned, in other tensors, dtypes or on another device?"""
    tape = latest.tape
    if tape.position != latest.position:
        tape.go_to_end()
    if [lane.state.stream.shape for lane in tape.lanes] != [stream.shape for stream in streams]:
        return False
    for lane, handed, stream in zip(tape.lanes, latest.lanes, streams, strict=True):
        if not looked_at() or stream.is_meta:
            continue  # without values, what is of the same shape is taken for the same
        if not torch.equal(lane.decoded(handed.dtype).to(stream.device, stream.dtype), stream.detach()):
            return False
    return True


def _still_there(found: Carried | None) -> Carried | None:
    """The state, unless another reader of the same stream went on with it; the tape goes forward to it again."""
    if found is None or found.tape.position == found.position:
        return found
    if found.position != len(found.tape.steps):
        return None
    found.tape.go_to_end()
    return found


def _say_restart(chain: ReversibleChain, latest: Carried, number: int, streams: tuple[torch.Tensor, ...]) -> None:
    path, before = chain.paths[number], chain.paths[latest.number]
    if path in chain.restarts:
        return
    what = "read a second time, or changed on the way"
    for stream, lane in zip(streams, latest.lanes, strict=False):
        if stream.shape != lane.memory[1]:
            what = f"of shape {tuple(stream.shape)} instead of {tuple(lane.memory[1])}"
    chain.restarts[path] = f"the stream that reaches it is not what {before} returned ({what})"
    logging.getLogger("autorev").warning(
        "%s: the stream that reaches %s is not what %s returned (%s). It starts a new chain there, with velocity 0: "
        "that is part of the function that is trained, and each further piece keeps two streams more. Exclude the "
        "blocks behind it, or change the stream inside of a block",
        chain.name,
        path,
        before,
        what,
    )
