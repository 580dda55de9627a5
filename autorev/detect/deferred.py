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

from autorev.detect.stream import Add, ResidualStep, Stream, add_operands, reaches, scale_of


def deferred_parts(total: fx.Node, streams: dict[fx.Node, Stream]) -> tuple[fx.Node, fx.Node] | None:
    """The two arguments (residual, branch) of which `total` is the sum; the wider dtype is the residual's, and of equal
    ones the second operand is taken for it, as which is which does not matter."""
    operands = add_operands(total)
    if operands is None or len(operands[1]) != 1 or scale_of(total) != 1:
        return None
    first, second = (_argument_of(operand, streams) for operand in (operands[0], operands[1][0]))
    if first is None or second is None or first is second:
        return None
    sizes = [node.meta["val"] for node in (first, second)]
    if sizes[0].shape != sizes[1].shape or sizes[0].shape != total.meta["val"].shape:
        return None
    return (first, second) if sizes[0].dtype.itemsize > sizes[1].dtype.itemsize else (second, first)


def _argument_of(operand: object, streams: dict[fx.Node, Stream]) -> fx.Node | None:
    """The argument that `operand` is, but for casts and reshapes."""
    for start, stream in streams.items():
        if isinstance(operand, fx.Node) and operand in stream:
            made = [stream.nodes[node] for node in stream.path_to(operand)]
            return None if any(isinstance(one, Add) for one in made) else start
    return None


def read_apart(parts: tuple[fx.Node, fx.Node], total: fx.Node, outputs: Sequence[Any]) -> bool:
    """Does anything that the block returns depend on one of `parts` other than through their sum?"""
    return any(
        isinstance(output, fx.Node) and reaches(part, output, without=total) for part in parts for output in outputs
    )


def last_of_deferred(total: fx.Node, residual: fx.Node, branch: fx.Node) -> ResidualStep:
    """The step whose add is the next block's `total`."""
    return ResidualStep((Add(total, total, (branch,)),), residual)
