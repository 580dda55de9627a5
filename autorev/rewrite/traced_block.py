"""What stands in for a block's `forward` where a whole pass through its chain is to be one compiled graph.

Dynamo traces it with the model's own code around it: the branch becomes a graph of its own, of which AOTAutograd makes
a step (NOTE [ Whole graph ] in `engine.traced`). Outside of a compiled graph it is a `WholeBlock` like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._higher_order_ops as operators

from autorev.detect.ends import find_stream, replace_leaf
from autorev.engine.mode import is_traced
from autorev.engine.traced import TracedState, begun, without_gradient
from autorev.engine.traced_step import as_step
from autorev.errors import ConversionError
from autorev.integrations.transformers import is_asked_for, is_cache
from autorev.rewrite.block_forward import WholeBlock

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

dynamo_bypassing_wrapper: Any = getattr(operators, "dynamo_bypassing_wrapper", None)
"""An internal of torch, in 2.9 to 2.13. Without it, no pass is one graph (`why_no_graph`); all else works."""


@dataclass(eq=False)
class TracedBlock(WholeBlock):
    """One step, of one stream, in exact arithmetic and of the velocity family."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward."""
        if self.reverted or not is_traced():
            return WholeBlock.__call__(self, *args, **kwargs)
        return self._traced((args, kwargs))

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One step, outside of a compiled graph."""
        if self.chain.traced is not None:
            self.chain.traced = None
            raise ConversionError(
                f"{self.path} runs outside of the compiled graph that its chain began in (TORCH_LOGS=graph_breaks says "
                "why), and the chain's state cannot follow; convert with compile='blocks'"
            )
        return super().run(args, kwargs)

    def _traced(self, inputs: Inputs) -> Any:
        """One step, as a part of the graph that Dynamo makes of this code."""
        chain = self.chain
        here = chain.traced
        if here is None:
            raise ConversionError(f"{self.path} is compiled by itself, apart from the loop that runs it")
        place, x = find_stream(self._named(*inputs), self.argument, *inputs)
        later = [number for number in self.numbers if number > here.number]
        if not later:
            raise ConversionError(f"{self.path} is called a second time in one pass through {chain.name}")
        number = later[0]
        last = number == len(chain.couplings) - 1
        state = here.latest
        if state is None:
            state, x = begun(x, chain.key)
        elif x is not here.handed:
            raise ConversionError(f"the stream that reaches {self.path} is not what the block before it returned")
        if torch.is_grad_enabled():
            inputs = self._without_caches(inputs, here.given)
            step: Any = partial(as_step, chain.key, str(number))
            found, at, rest = dynamo_bypassing_wrapper(step, partial(self._step_like, inputs, place), *state.leading, x)
            new, stream, velocity, largest, *back = found
            state = TracedState(stream, velocity, largest, state.grid, (back[0], back[1], back[2]))
        else:
            out, at, rest = self._branch_of(inputs, place, x)
            state, new = without_gradient(state, out, x, chain.couplings[number], chain.key if last else None)
        here.number, here.latest, here.handed = (-1, None, None) if last else (number, state, new)
        return replace_leaf(rest, at, new)

    def _step_like(self, inputs: Inputs, place: tuple[Any, ...], *operands: torch.Tensor) -> Any:
        """The branch; and, for Dynamo, tensors like the new state, which `as_step` computes.

        Every operand is read, in order, before anything else is: that is how the graph then takes them.
        """
        *held, x = operands
        stream, velocity, largest, *_ = [torch.empty_like(tensor) for tensor in held]
        out, at, rest = self._branch_of(inputs, place, x.view_as(x))
        wide = torch.float64 if out.dtype is torch.float64 else torch.float32
        back = (out.to(torch.float32) + 1, out.to(torch.float32) + 2, out.to(wide) + 3)  # no two are one to Dynamo
        return (out, stream, velocity, largest, *back), at, rest

    def _branch_of(self, inputs: Inputs, place: tuple[Any, ...], x: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
        """The block's own forward of the stream `x`: (x + f(x), where that is in what it returns, the rest of that)."""
        args, kwargs = replace_leaf(inputs, place, x)
        returned = self.original(*args, **kwargs)
        at = self._output_place(returned, self.output_at)
        out = returned
        for key in at:
            out = out[key] if not isinstance(key, str) or isinstance(out, dict) else getattr(out, key)
        if out.shape != x.shape:
            raise ConversionError(f"{self.path} returned a stream of another shape than it was given")
        return out, at, replace_leaf(returned, at, None)

    def _without_caches(self, inputs: Inputs, given: Inputs) -> Inputs:
        """Without the key-value cache that the model makes by itself in training (`ReversibleForward._inputs`)."""
        args, kwargs = inputs
        for value in (*args, *kwargs.values()):
            if is_cache(value) and (not self.block.training or is_asked_for(value, given)):
                raise ConversionError(
                    f"{self.path} is to fill a key-value cache while gradients are recorded, which no compiled graph "
                    "does twice; call the model with use_cache=False"
                )
        return (
            tuple(None if is_cache(value) else value for value in args),
            {name: None if is_cache(value) else value for name, value in kwargs.items()},
        )
