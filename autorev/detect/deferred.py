"""Deferred residuals: a block returns what its last branch computed and its residual apart, and the next one adds them.

    r = r + h                  the stream s is r + h; h and r reach the block's branches through it alone
    h = f(norm(r))
    return h, r                s' = s + f(norm(s)), added up by the next block, or behind the loop

So do flash-attn, vLLM and mamba_ssm, whose kernels do the add and the norm in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from autorev.detect.stream import Add, ResidualStep, Stream, merely_laid_out
from autorev.detect.sums import add_operands, scale_of
from autorev.detect.ways import reaches


def deferred_parts(total: fx.Node, streams: dict[fx.Node, Stream]) -> tuple[fx.Node, fx.Node] | None:
    """The two arguments of which `total` is the sum: the one that will be given the whole stream, and the other.

    The first is the wider of the two, and reaches the sum by casts and reshapes alone. On its way to the sum, the other
    may be given to what does nothing as it is set, such as a dropout of 0: it will be zeros that watch over that.
    """
    operands = add_operands(total)
    if operands is None or len(operands[1]) != 1 or scale_of(total) != 1:
        return None
    ways = [_way(operand, streams) for operand in (operands[1][0], operands[0])]
    if not all(ways) or ways[0][0] is ways[1][0]:
        return None
    if any(way[0].meta["val"].shape != total.meta["val"].shape for way in ways):
        return None
    # Of two that are as wide, which is which does not matter.
    ways.sort(key=lambda way: (-way[0].meta["val"].dtype.itemsize, not _is_bare(way)))
    return (ways[0][0], ways[1][0]) if _is_bare(ways[0]) else None


def _way(operand: object, streams: dict[fx.Node, Stream]) -> list[fx.Node]:
    """From the argument that `operand` stands for to `operand`; empty where it is none, or a sum itself."""
    for stream in streams.values():
        if isinstance(operand, fx.Node) and operand in stream:
            way = stream.path_to(operand)
            return [] if any(isinstance(stream.nodes[node], Add) for node in way) else way
    return []


def _is_bare(way: list[fx.Node]) -> bool:
    return all(map(merely_laid_out, way[1:]))


def read_apart(parts: tuple[fx.Node, fx.Node], total: fx.Node, outputs: Sequence[Any]) -> bool:
    """Does anything that the block returns depend on one of `parts` other than through their sum?"""
    return any(
        isinstance(output, fx.Node) and reaches(part, output, without=total) for part in parts for output in outputs
    )


def last_of_deferred(total: fx.Node, residual: fx.Node, branch: fx.Node) -> ResidualStep:
    """The step whose add is the next block's `total`."""
    return ResidualStep((Add(total, total, (branch,)),), residual)
