"""Blocks whose last residual add is the next block's (`detect.deferred`), as steps of the stream that is the sum.

The block is given the whole stream as its residual, and zeros for the rest that may only be added (`nothing`): its own
add changes nothing. What it returns is added up, and the new stream is handed on in two parts as the model's code
expects: what the last branch returned, and the rest. Whoever reads them or adds them finds what they stand for; the
next block of the chain, given the same memory, takes the stream that they were made of, without their rounding. Its
gradient goes through the parts, which may have been detached, or have hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autorev.detect.ends import flatten_with_path, replace_leaf
from autorev.engine.autograd import joined
from autorev.engine.carried import Apart, pass_of
from autorev.engine.digest import looked_at
from autorev.rewrite.block_forward import Places, WholeBlock
from autorev.rewrite.nothing import Nothing


@dataclass(eq=False)
class DeferredBlock(WholeBlock):
    """`argument` and `output_at` are the residual's."""

    added: tuple[str, tuple[Any, ...]] = ("", ())
    """(argument, place in what is returned) of what is added to it; the first block is given nothing to add."""

    def own(self) -> Callable[..., Any]:
        """Not compiled: no compiler follows what watches over the zeros."""
        if super().own() != self.original:
            self.chain.warn_once(
                "run eagerly, as they leave their last add to the next one; compile the modules that they call, as in "
                "block.mlp.compile()"
            )
        return self.original

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One step of the sum."""
        at, residual = self._stream(self.argument, args, kwargs)
        here = pass_of(self.chain)
        apart, here.apart = here.apart, None
        if self.added[0]:
            added_at, added = self._stream(self.added[0], args, kwargs)
            known = apart is not None and apart.is_sum_of(residual, added)
            stream = joined(apart.stream, (residual, added)) if apart is not None and known else residual + added
            zero = torch.zeros((), dtype=added.dtype, device=added.device).expand(added.shape)
            if looked_at():
                zero = zero.as_subclass(Nothing)
            args, kwargs = replace_leaf(replace_leaf((args, kwargs), at, stream), added_at, zero)
            del added, stream
        del residual, apart
        returned = super().run(args, kwargs)
        leaves = dict(flatten_with_path(returned))
        new, branch = leaves[self.output_at], leaves[self.added[1]]
        rest = new - branch
        if here.latest is not None:  # another block of the chain follows
            here.apart = Apart.of(new, rest, branch)
        return replace_leaf(returned, self.output_at, rest)

    def _branch(self, *args: Any) -> tuple[tuple[Places, Any], tuple[torch.Tensor, ...]]:
        """The block's own forward, and the sum of what it returns."""
        (outputs_at, rest), (residual,) = super()._branch(*args)
        return (outputs_at, rest), (residual + dict(flatten_with_path(rest))[self.added[1]],)
