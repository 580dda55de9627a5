"""The forward of the module whose loop runs the blocks: it marks where a pass through their chains begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from autorev.detect.finding import Finding
from autorev.detect.inline import common_start
from autorev.engine.carried import one_pass
from autorev.engine.chain import ReversibleChain
from autorev.engine.mode import is_traced
from autorev.engine.traced import TracedPass
from autorev.errors import ConversionError
from autorev.rewrite.replacement import Replacement


@dataclass(eq=False)
class LoopForward(Replacement):
    """The forward of the module whose loop runs the blocks: it knows where a pass through the chains ends."""

    chains: list[ReversibleChain]
    begins: Callable[[], None]
    """Told of each pass before it."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The loop, as it is."""
        self.begins()
        with one_pass(self.chains, (args, kwargs)):
            return self.original(*args, **kwargs)


@dataclass(eq=False)
class TracedLoop(LoopForward):
    """The same where the blocks are traced (`TracedBlock`), into one graph with the loop."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if self.reverted or not is_traced():
            return LoopForward.__call__(self, *args, **kwargs)
        for chain in self.chains:
            chain.traced = TracedPass((args, kwargs))
        returned = self.original(*args, **kwargs)
        for chain in self.chains:
            if chain.traced.latest is not None:
                raise ConversionError(
                    f"the loop left {chain.name} before its last block, which no compiled graph of it does; convert "
                    "with compile='blocks'"
                )
            chain.traced = None
        return returned


def install_loops(
    model: nn.Module,
    built: list[tuple[list[Finding], ReversibleChain]],
    begins: Callable[[], None],
    kind: type[LoopForward] = LoopForward,
) -> None:
    """A `LoopForward` for each module whose loop runs a chain of block modules; `begins` is called before each pass."""
    chains: dict[str, list[ReversibleChain]] = {}
    for findings, chain in built:
        if not findings[0].inline:
            chains.setdefault(_loop_of(model, [f.call.path for f in findings]), []).append(chain)
    for path, of_loop in chains.items():
        kind(model.get_submodule(path), path, of_loop, begins).install()


def _loop_of(model: nn.Module, paths: list[str]) -> str:
    """The innermost module that holds all of these and has a forward of its own."""
    shared = common_start([path.split(".")[:-1] for path in paths])
    while shared and isinstance(model.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict):
        shared.pop()
    return ".".join(shared)
