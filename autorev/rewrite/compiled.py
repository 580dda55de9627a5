"""Converted blocks under `torch.compile`: the branch is compiled, and the coupling around it is not.

The coupling looks at values and keeps a state beside autograd, which no compiler follows; and it is a few operators,
where the branch takes the time. So a converted forward never runs inside of compiled code, but for one that was made
for it (`traced_block`). It calls the block's own forward through the compiler that was meant for it: that of
`block.compile()`, or of a `torch.compile` further out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

from autorev.engine.chain import ReversibleChain

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes a compiled function of a function."""

WHY_NOT = (
    "a forward that autorev converted runs outside of compiled code, and calls its compiled branch from there; leave "
    "fullgraph=True out, or compile the blocks one by one: for block in blocks: block.compile(fullgraph=True); or "
    "convert with compile='graph'. To export the model, call autorev.revert(model) first"
)

IN_STEPS = (
    "run eagerly, as their code is taken apart into steps; compile the modules that they call, as in "
    "block.mlp.compile(), or convert with granularity='block'"
)

WHILE_KEPT = (
    "run eagerly, as the results of attention are kept operator by operator, which compiled code does not show; leave "
    "keep='attention' or the compiler out"
)

_CALL, _COMPILE = "_compiled_call_impl", "compile"
"""What `nn.Module.compile` sets, and its own name."""

_around: ContextVar[Compiler | None] = ContextVar("autorev compiler around", default=None)


@dataclass(eq=False)
class CompiledBlock:
    """How a converted block is compiled; as with torch's `block.compile()`, a copy of the block is not."""

    block: nn.Module
    call: Callable[..., Any] | None = None
    """What `block.compile()` made of a call of the block; it is put back when the conversion is undone."""
    compiler: Compiler | None = None
    """What that compiles by."""
    last: tuple[Compiler, Callable[..., Any]] | None = None
    """The branch, as it was compiled last, and by what."""

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "call": None, "compiler": None, "last": None}

    def begin(self) -> None:
        """The block is converted: from now on, its branch is what is compiled."""
        home = self.block.__dict__
        self.call = home.pop(_CALL, None)
        self.compiler = compiler_of(self.call)
        home[_COMPILE] = self

    def end(self) -> None:
        """It is converted no more."""
        home = self.block.__dict__
        home.pop(_COMPILE, None)
        if self.call is not None:
            home[_CALL] = self.call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """`block.compile`, with the arguments of `torch.compile`."""
        self.call = torch.compile(self.block._call_impl, *args, **kwargs)
        self.compiler = compiler_of(self.call)

    def compile_branch(self) -> None:
        """By torch's own defaults, for as long as the block is converted; what compiles it already goes on doing so."""
        if self.compiler is None:
            self.compiler = compiler_of(torch.compile(self.block._call_impl))

    def say_how(self, chain: ReversibleChain, in_steps: bool) -> None:
        """Tell the user once what is compiled, where it is not what was asked for."""
        if self.compiler is None and _around.get() is None:
            return
        if any(keeps.attention for keeps in chain.keeps):
            chain.warn_once(WHILE_KEPT)
        elif in_steps:
            chain.warn_once(IN_STEPS)
        elif self.compiler is None:
            chain.warn_once(
                "run outside of the graph that torch.compile makes of the model: their branches are compiled, each by "
                "itself, and the loop around them runs eagerly",
            )

    def compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The block's own `forward`, compiled where the block is."""
        compiler = self.compiler or _around.get()
        if compiler is None:
            return forward
        last = self.last  # another thread may compile by another
        if last is None or last[0] is not compiler:
            self.last = last = compiler, compiler(forward)
        return last[1]


def compiler_of(compiled: Any) -> Compiler | None:
    """The compiler that made what `torch.compile(function)` returned; None where it returned the function itself."""
    for cell in getattr(compiled, "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled
            continue
        if type(held).__name__ == "OptimizeContext":
            compiler: Compiler = held
            return compiler
    return None


def never_compiled(method: Any) -> Any:
    """A method whose own code is no part of what `torch.compile` compiles."""
    set_code_exec_strategy(method.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    method._torchdynamo_disable = True
    method._torchdynamo_disable_msg = WHY_NOT
    return method


@contextmanager
def inside_of(callback: Any) -> Iterator[None]:
    """What is called meanwhile is called from a function that `torch.compile` compiles; `callback`: what it had in
    force there, and has not here."""
    if not callable(callback):
        yield
        return
    token = _around.set(_same_compiler(callback))
    try:
        yield
    finally:
        _around.reset(token)


@lru_cache(maxsize=16)
def _same_compiler(callback: Any) -> Compiler:
    backend = callback
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    compiler: Compiler = torch._dynamo.optimize(backend, dynamic=getattr(backend, "dynamic", None))
    return compiler
