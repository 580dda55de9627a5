"""The chains of a fake twin as the engine runs them, without anything being installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autorev.analysis import Category
from autorev.engine.carried import pass_of
from autorev.engine.host_store import HostStore
from autorev.engine.step import Branch, Step
from autorev.methods import Method
from autorev.rewrite.block_forward import ReversibleForward
from autorev.rewrite.built import BuiltChain

if TYPE_CHECKING:
    from autorev.prediction.layout import Layout, Site

Run = Callable[[torch.Tensor], Any]
"""Runs one block: stream in, whatever the block returns out."""


class Chains:
    """One reversible chain for each of the layout's; none where the method is not reversible.

    Blocks that are modules run by the forwards that `convert` would install. The turns of a loop run one by one: the
    loop's own code could leave none out.
    """

    def __init__(self, layout: Layout, method: Method, host: HostStore) -> None:
        """Of the blocks that are run.

        Raises:
            ConversionError: the method is none that these chains can be converted by.
        """
        self.built: list[BuiltChain] = []
        self.forwards: dict[tuple[int, nn.Module], ReversibleForward] = {}
        if not method.reversible:
            return
        run = {layout.sites[number].module for number in layout.active}
        for number, (chain, kept) in enumerate(zip(layout.chains, layout.stored, strict=True)):
            names = {item.chain.name for item in self.built}
            item = BuiltChain(layout.twin, chain, kept, method, names, host, run)
            self.built.append(item)
            self.forwards |= {(number, forward.block): forward for forward in item.forwards}

    @property
    def side_bits(self) -> int:
        """The most that a recomputed block keeps of an element."""
        return max((item.side_bits for item in self.built), default=0)

    def forward_of(self, site: Site) -> Callable[..., Any] | None:
        """What runs the block at `site` in the place of its own forward; None: its own."""
        if not self.built or site.chain is None or site.turn is not None:
            return None
        forward = self.forwards[site.chain, site.module]
        return lambda *args, **kwargs: forward.run(args, kwargs)

    def take_turn(self, site: Site, turn: Run, stream: torch.Tensor) -> torch.Tensor:
        """One turn of a loop as a step."""
        assert site.chain is not None
        chain = self.built[site.chain].chain
        number = len(chain.couplings) - 1 - site.from_end
        branch = Branch(None, chain.paths[number], True, lambda module, name: False)
        step = Step(chain, (stream,), (number,), branch)
        if step.replay is not None:
            step.replay.again = lambda x: (None, (turn(x),))
        with step.running():
            out = turn(*step.given())
        (new,) = step.take((out,))
        return new

    def kept(self, site: Site) -> Iterator[tuple[Category, torch.Tensor]]:
        """What the engine holds of the site's chain: its state, and side bits."""
        latest = pass_of(self.built[site.chain].chain).latest if self.built and site.chain is not None else None
        if latest is None:
            return
        tape = latest.tape
        for lane in tape.lanes:
            yield Category.STREAMS, lane.state.stream
            yield Category.STREAMS, lane.state.partner
        sides = (kept.side for step in tape.steps for kept in step.lanes)
        yield from ((Category.SIDE_BITS, side) for side in sides if isinstance(side, torch.Tensor))
