"""Cut a block's graph at its residual adds: prologue, one branch per step, epilogue.

    stream, shared = prologue(arguments)
    for branch in branches:
        stream = stream + branch(stream, shared)
    output = epilogue(stream, shared)

Each piece is a `torch.fx.GraphModule` that runs on the *live* sub-modules of the block: it owns none of them and looks
them up by path at every call, so an adapter injected later is seen. The stream keeps one layout from start to end, the
one in which it enters; where the block adds in another (OPT flattens tokens around its MLP), the branch goes there and
back. What the block adds in place is added out of place here: the caller's tensors are never written to.

`reproduces` compares the fold with the block's own forward bit for bit. A cut is made for one recorded call: shapes,
and the training mode as far as the block's own code reads it, are those of that call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from autorev.detect.cutter import Cutter
from autorev.detect.judge import Finding, leaves
from autorev.detect.pieces import Branch as Branch
from autorev.detect.pieces import CutBlock as CutBlock
from autorev.detect.pieces import CutError as CutError
from autorev.detect.pieces import Join as Join
from autorev.detect.pieces import Piece as Piece


def cut(findings: Finding | Sequence[Finding], block: nn.Module | None = None) -> CutBlock:
    """Cut the block of a reversible finding; of inline findings, all of one chain at once.

    `block` is the module to run on, of the same structure as the analysed one, which it is by default.

    Raises:
        CutError: the block has a shape that no cut can be given, with the reason.
    """
    chain = [findings] if isinstance(findings, Finding) else list(findings)
    captured, start, end = chain[0].captured, chain[0].start, chain[-1].end
    if captured is None or start is None or end is None or not all(f.reversible for f in chain):
        raise CutError(f"{chain[0].path} is not a reversible block")
    if len(chain) > 1 and any(f.captured is not captured for f in chain):
        raise CutError("only inline blocks of one loop are cut together")
    steps = [step for finding in chain for step in finding.steps]
    returned = chain[0].call.output
    try:
        return Cutter(captured, start, end, steps, block or captured.module).cut(returned)
    except CutError:  # a side output that reads the stream of an earlier step
        early = Cutter(captured, start, end, steps, block or captured.module, keep_order=False)
        return early.cut(returned)


def reproduces(cut_block: CutBlock, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Does the fold return what `block.forward(*args, **kwargs)` returns, bit for bit?"""
    return agree((block.forward, cut_block.fold), block, args, kwargs)


def agree(
    forwards: tuple[Callable[..., Any], Callable[..., Any]],
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:
    """Do two ways of running `block` return the same, bit for bit?

    Both run from one state of the random streams and buffers, which is put back, and on copies of the arguments.
    """
    results = []
    for forward in forwards:
        with _state_kept(block):
            own_args, own_kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
            results.append(forward(*own_args, **own_kwargs))
    first, second = (dict(leaves(result)) for result in results)
    return first.keys() == second.keys() and all(_identical(v, second[at]) for at, v in first.items())


def _identical(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a is b or a == b)
    if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)))


@contextmanager
def _state_kept(block: nn.Module) -> Iterator[None]:
    devices = sorted({t.device.index for t in block.parameters() if t.is_cuda and t.device.index is not None})
    saved = [(buffer, buffer.clone()) for buffer in block.buffers()]
    python_state = random.getstate()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            with torch.no_grad():
                for buffer, value in saved:
                    if not torch.equal(buffer, value):  # writing the same would still count as a change
                        buffer.copy_(value)
