"""What stands in for a block's `forward` where a whole pass through its chain is to be one compiled graph.

Dynamo traces it with the model's own code around it: the branch becomes a graph of its own, of which AOTAutograd makes
a step (NOTE [ Whole graph ] in `engine.traced`). Outside of a compiled graph it is a `WholeBlock` like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._higher_order_ops import dynamo_bypassing_wrapper

from autorev.detect.ends import find_stream, flatten_with_path, replace_leaf
from autorev.engine import mode, traced
from autorev.engine.traced import RETURNED, TracedState
from autorev.engine.traced_step import as_step
from autorev.errors import ConversionError
from autorev.integrations.transformers import is_cache
from autorev.rewrite.block_forward import WholeBlock
from autorev.rewrite.loop_forward import LoopForward


def is_traced() -> bool:
    """Is this code part of what Dynamo compiles, to be run reversibly?"""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not mode.otherwise


@dataclass(eq=False)
class TracedBlock(WholeBlock):
    """One step, of one stream, in exact arithmetic and of the velocity family."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward."""
        if is_traced() and not self.reverted:
            return self._traced(args, kwargs)
        return WholeBlock.__call__(self, *args, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One step, outside of a compiled graph."""
        if self.chain.traced is not None:
            self.chain.traced = None
            raise ConversionError(
                f"{self.path} runs outside of the compiled graph in which its chain began (TORCH_LOGS=graph_breaks "
                "says why): its state cannot follow. Convert with compile='blocks'"
            )
        return super().run(args, kwargs)

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chain = self.chain
        place, x = find_stream(self._named(args, kwargs), self.argument, args, kwargs)
        before = chain.traced
        number = self.numbers[0]
        if before is None:
            state, x = traced.begun(x, chain.key)
        else:
            state, handed, last = before
            if x is not handed:
                raise ConversionError(f"the stream that reaches {self.path} is not what the block before it returned")
            later = [one for one in self.numbers if one > last]
            if not later:
                raise ConversionError(f"{self.path} is called again before its chain has come to its end")
            number = later[0]
        forward, place_out = self.original, self.output_at
        if torch.is_grad_enabled():
            args, kwargs = _without_caches(args, kwargs, self.path)

            def branch(*operands: Any) -> Any:
                *held, value = operands
                made = _in_place_of(held)
                inputs = replace_leaf((args, kwargs), place, value.view_as(value))
                returned = forward(*inputs[0], **inputs[1])
                at = _place_of(returned, place_out)
                out = _leaf_at(returned, at)
                wide = torch.float64 if out.dtype is torch.float64 else torch.float32
                back = (out.to(torch.float32) + 1, out.to(torch.float32) + 2, out.to(wide) + 3)
                return (out, *made, *back), at, replace_leaf(returned, at, None)

            step: Any = partial(as_step, chain.key, str(number))
            (new, *after), at, rest = dynamo_bypassing_wrapper(step, branch, *state.leading, x)
            assert len(after) == RETURNED
            stream, velocity, largest, *back = after
            state = TracedState(stream, velocity, largest, state.grid, (back[0], back[1], back[2]))
        else:
            inputs = replace_leaf((args, kwargs), place, x)
            returned = forward(*inputs[0], **inputs[1])
            at = _place_of(returned, place_out)
            rest = replace_leaf(returned, at, None)
            last_one = number == len(chain.couplings) - 1
            state, new = traced.without_gradient(
                state, _leaf_at(returned, at), x, chain.couplings[number], chain.key if last_one else None
            )
        chain.traced = (state, new, number) if number < len(chain.couplings) - 1 else None
        return replace_leaf(rest, at, new)


@dataclass(eq=False)
class TracedLoop(LoopForward):
    """The forward of the module whose loop runs the blocks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if not is_traced() or self.reverted:
            return LoopForward.__call__(self, *args, **kwargs)
        returned = self.original(*args, **kwargs)
        for chain in self.chains:
            if chain.traced is not None:
                raise ConversionError(f"the loop left {chain.name} before its last block")
        return returned


def _in_place_of(held: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Like the new state, for Dynamo: `as_step` computes it. All of `held` are read, in order, so that the graph takes
    them in that order."""
    stream, velocity, largest, grid, *back = [torch.empty_like(tensor) for tensor in held]
    return stream, velocity, largest


def _place_of(returned: Any, output_at: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where the stream is; a block that returns a tuple or a tensor as it is asked has it first."""
    if isinstance(returned, torch.Tensor):
        return ()
    return output_at or (0,)


def _leaf_at(structure: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        structure = getattr(structure, key) if isinstance(key, str) and not isinstance(structure, dict) else structure[key]
    return structure


def _without_caches(
    args: tuple[Any, ...], kwargs: dict[str, Any], path: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs
