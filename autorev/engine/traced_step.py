"""A step of a chain in a compiled graph, as AOTAutograd runs it: see NOTE [ Whole graph ] in `traced`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autorev.couplings.arithmetic import inverse_of
from autorev.couplings.integers import Advanced, decoded, packed, unpacked, velocity_before
from autorev.couplings.side_bits import ROWS
from autorev.couplings.velocity import Velocity
from autorev.engine.autograd import apply
from autorev.engine.chain import ReversibleChain, chain_called
from autorev.engine.surroundings import Settings, devices_of
from autorev.engine.traced import HELD, RETURNED, advance, settled, valueless
from autorev.errors import ConversionError

Graph = Callable[..., tuple[torch.Tensor, ...]]
"""A branch as Dynamo traced it: it takes `HELD` tensors of state, x, and whatever else it reads, and returns `out`,
`RETURNED` tensors in the place of the new state, and whatever else the block does."""


def as_step(key: str, number: str, graph: Graph) -> Callable[..., tuple[torch.Tensor, ...]]:
    """`graph`, the branch of that step, as the step: it returns the new stream and the new state."""
    chain = chain_called(key)
    coupling = chain.couplings[int(number)]
    assert isinstance(coupling, Velocity)

    def run(*operands: Any) -> tuple[torch.Tensor, ...]:
        # Dynamo puts sizes that vary among them, before the tensors that have them.
        every = range(len(operands))
        first = [n for n in every if isinstance(operands[n], torch.Tensor)][: HELD + 1]
        order = [*first, *(n for n in every if n not in first)]

        def in_order(*given: Any) -> tuple[torch.Tensor, ...]:
            by_place = dict(zip(order, given, strict=True))
            return graph(*(by_place[n] for n in every))

        made = TracedStep(chain, key, coupling, int(number), in_order)
        ordered = [operands[n] for n in order]
        return tuple(apply(_Step, made, *ordered) if made.recomputed else made.stored(*ordered))

    return run


@dataclass(frozen=True, eq=False)
class TracedStep:
    """One step of one pass."""

    chain: ReversibleChain
    key: str
    coupling: Velocity
    number: int
    graph: Graph

    @property
    def path(self) -> str:
        """The block's."""
        return self.chain.paths[self.number]

    @property
    def recomputed(self) -> bool:
        """In backward."""
        return self.coupling.invertible and self.number < self.chain.stored_from

    def first_run(self, *operands: Any) -> tuple[tuple[torch.Tensor, ...], Advanced, torch.Tensor]:
        """(what the branch returned, the step, the largest |H| so far)."""
        stream, velocity, largest, grid, *_ = operands
        x = operands[HELD]
        with _Watched(self.path, operands):
            returned = self.graph(*operands)
        out = settled(returned[0].detach())
        step = advance(self.coupling, stream, velocity, grid, out, x.detach())
        return returned, step, torch.maximum(largest, step.largest)

    def new(self, step: Advanced, largest: torch.Tensor, grid: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The new stream as the model reads it; behind the last step after a look at what the grid had to hold."""
        stream = step.stream
        if self.number == len(self.chain.couplings) - 1:
            stream = stream + torch.ops.autorev.held(largest, grid, self.key)
        return settled(decoded(stream, 1 / grid, dtype))

    def stored(self, *operands: Any) -> tuple[torch.Tensor, ...]:
        """A step that nothing undoes: autograd keeps what the branch saves."""
        returned, step, largest = self.first_run(*operands)
        grid, partner, x = operands[3], operands[6], operands[HELD]
        new = self.new(step, largest, grid, returned[0].dtype)
        coupled = apply(_Couple, self.coupling, new, x, partner, returned[0])
        ends = valueless(new)[:2]  # the state goes back no further
        return (coupled[0], step.stream, step.velocity, largest, *ends, coupled[1], *returned[1 + RETURNED :])


class _Couple(torch.autograd.Function):
    """The gradients of `Coupling.vjp`."""

    @staticmethod
    def forward(ctx: Any, coupling: Velocity, new: torch.Tensor, x: torch.Tensor, partner: Any, out: Any) -> Any:
        ctx.coupling = coupling
        ctx.set_materialize_grads(False)
        return new.view_as(new), partner.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None and grads[1] is None:
            return None, None, None, None, None
        grad_in, grad_carried, grad_out = ctx.coupling.vjp(*grads)
        return None, None, grad_in, grad_carried if ctx.needs_input_grad[3] else None, grad_out


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: TracedStep, *operands: Any) -> Any:
        grid, x, rest = operands[3], operands[HELD], operands[HELD + 1 :]
        ctx.settings = Settings(devices_of(x.device))
        returned, taken, largest = step.first_run(*operands)
        new = step.new(taken, largest, grid, returned[0].dtype)
        bits = step.coupling.side_bits
        side = [packed(_rows(taken.product), bits)] if bits else []
        ends = [] if operands[4].requires_grad else [_sums(operands[0], operands[1])]
        ctx.step, ctx.dtype, ctx.sides, ctx.ends = step, x.dtype, len(side), len(ends)
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in rest]
        tensors = [value for value in rest if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(taken.stream, taken.velocity, grid, *side, *ends, *tensors)
        ctx.set_materialize_grads(False)
        further = returned[1 + RETURNED :]
        whole = [value for value in further if not value.is_floating_point()]
        ctx.mark_non_differentiable(taken.stream, taken.velocity, largest, *whole)
        return new, taken.stream, taken.velocity, largest, *valueless(new), *further

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        step: TracedStep = ctx.step
        coupling = step.coupling
        total, after, grid, *saved = ctx.saved_tensors
        side, ends, tensors = saved[: ctx.sides], saved[ctx.sides :][: ctx.ends], saved[ctx.sides + ctx.ends :]
        grad_new, grad_partner, grads_further = grads[0], grads[6], grads[7:]
        if grads[4] is not None:
            total, after = (gradient.view(torch.int32) for gradient in grads[4:6])
        asked = next((g for g in (grad_new, grad_partner, *grads_further) if g is not None), None)
        if asked is None:
            raise ConversionError(f"{step.path}: backward reached a step of a compiled chain without a gradient")
        after = after + torch.ops.autorev.after(asked)  # Rule 1
        stream = total - after
        x = settled(decoded(stream, 1 / grid, ctx.dtype))
        needs = ctx.needs_input_grad[1:]
        waiting = iter(tensors)
        rest = [next(waiting) if value is None else value for value in ctx.others]
        with ctx.settings.restored(), torch.enable_grad():
            given = [_leaf(value, need) for value, need in zip([x, *rest], needs[HELD:], strict=True)]
            held = (stream, after, grid.long(), grid, *(x.detach().to(grid.dtype) for _ in range(3)))
            returned = step.graph(*held, *given)
            out, further = returned[0], returned[1 + RETURNED :]
            grad_in = grad_carried = grad_out = None
            if grad_new is not None or grad_partner is not None:
                grad_in, grad_carried, grad_out = coupling.vjp(grad_new, grad_partner)
            pairs = [
                (value, gradient.to(value.dtype))
                for value, gradient in zip((out, *further), (grad_out, *grads_further), strict=True)
                if gradient is not None and value.requires_grad
            ]
            found = _gradients(pairs, given)
        low = _low_bits(side, coupling.side_bits, after) if side else None
        inverse, scale = inverse_of(coupling.gamma.numerator), grid * coupling.c
        out = settled(out.detach())
        velocity = velocity_before(after, out, x.detach(), inverse, scale, coupling.side_bits, low)
        if needs[HELD]:
            both = [g.to(grid.dtype) for g in (grad_in, found[0]) if g is not None]
            found[0] = sum(both[1:], both[0]).to(ctx.dtype) if both else None
        carried: list[Any] = [None, None, grad_carried if needs[6] else None]
        if ends:  # nothing before this step is undone from here
            _check(step, stream, velocity, grid, ends[0], found)
        else:
            carried[:2] = stream.view(torch.float32), velocity.view(torch.float32)
        return None, None, None, None, None, *carried, *found


def _leaf(value: Any, needs_gradient: bool) -> Any:
    return value.detach().requires_grad_(needs_gradient) if isinstance(value, torch.Tensor) else value


def _gradients(pairs: list[tuple[torch.Tensor, torch.Tensor]], given: list[Any]) -> list[Any]:
    """Of each of `given`; None where there is none."""
    leaves = [value for value in given if isinstance(value, torch.Tensor) and value.requires_grad]
    if not pairs or not leaves:
        return [None] * len(given)
    outs, gradients = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, leaves, gradients, allow_unused=True))
    return [next(found) if isinstance(v, torch.Tensor) and v.requires_grad else None for v in given]


def _check(
    step: TracedStep,
    stream: torch.Tensor,
    velocity: torch.Tensor,
    grid: torch.Tensor,
    sums: torch.Tensor,
    found: list[Any],
) -> None:
    """Put the look at the state that backward came back to before one of the gradients (Rule 3)."""
    left = velocity.abs().amax().long() if step.number == 0 else (_sums(stream, velocity) - sums).abs().amax()
    for number, gradient in enumerate(found):
        if gradient is not None:
            checked = torch.ops.autorev.rebuilt(left, grid, step.key, step.path)
            found[number] = gradient + checked.to(gradient.dtype)
            return


def _sums(stream: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """What a pass that begins in the middle of a chain is compared by."""
    return torch.stack([stream.sum(dtype=torch.int64), velocity.sum(dtype=torch.int64)])


def _rows(stream: torch.Tensor) -> torch.Tensor:
    flat = stream.reshape(-1)
    missing = -flat.numel() % ROWS
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(ROWS, -1)


def _low_bits(side: list[torch.Tensor], bits: int, like: torch.Tensor) -> torch.Tensor:
    return unpacked(side[0], bits).reshape(-1)[: like.numel()].view(like.shape)


class _Watched(TorchDispatchMode):
    """A branch that draws random numbers would draw others in its second run, and one that writes to a buffer would
    write twice."""

    def __init__(self, path: str, given: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.path = path
        self.given = [value for value in given if isinstance(value, torch.Tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, kwargs or {}):
            raise ConversionError(
                f"{self.path} draws random numbers ({func}), which one compiled graph would draw anew in backward; "
                "convert with compile='blocks', or set its dropout to 0"
            )
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._check(func, value)
        return func(*args, **(kwargs or {}))

    def _check(self, func: Any, written: Any) -> None:
        for tensor in tree_leaves(written):
            if any(tensor is value or tensor._base is value for value in self.given):
                raise ConversionError(
                    f"{self.path} writes to a tensor of shape {tuple(tensor.shape)} that it is given or holds ({func}),"
                    " which one compiled graph would do again in backward; convert with compile='blocks'"
                )


def _drops_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Is it attention, without dropout?"""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    at = names.index("dropout_p")
    return not (args[at] if at < len(args) else kwargs.get("dropout_p", 0.0))
