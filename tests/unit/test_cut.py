"""Cutting a block: the pieces run on the live sub-modules, and the bitwise check sees every seeded fault.

python -m pytest tests/unit/test_cut.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from autorev.capture.fake import fake_copy, new_fake_mode
from autorev.capture.record import record
from autorev.detect.chains import detect
from autorev.detect.cut import CutBlock, CutError, Join, cut, reproduces
from autorev.detect.judge import Finding
from tests.helpers import handwritten as hand

TOKENS = torch.arange(16).reshape(2, 8)


def first_block(block: type[nn.Module], dtype: torch.dtype = torch.float32) -> Finding:
    """The first block of a stack, recorded on real tensors."""
    torch.manual_seed(0)
    model = hand.stack_of(block).to(dtype).train()
    return detect(record(model, (TOKENS,), {})).chains[0][0]


def holds(cut_block: CutBlock, finding: Finding) -> bool:
    """Does the cut compute what the block computes?"""
    return reproduces(cut_block, finding.call.module, finding.call.args, finding.call.kwargs)


def with_joins(cut_block: CutBlock, number: int, joins: tuple[Join, ...]) -> CutBlock:
    """The cut with the joins of one branch exchanged."""
    branches = list(cut_block.branches)
    branches[number] = replace(branches[number], joins=joins)
    return replace(cut_block, branches=tuple(branches))


def drop_a_term(cut_block: CutBlock) -> CutBlock:
    return with_joins(cut_block, 0, cut_block.branches[0].joins[:-1])


def flip_a_sign(cut_block: CutBlock) -> CutBlock:
    *joins, last = cut_block.branches[0].joins
    function = torch.sub if last.function is torch.add else torch.add
    return with_joins(cut_block, 0, (*joins, replace(last, function=function)))


def double_a_term(cut_block: CutBlock) -> CutBlock:
    joins = cut_block.branches[0].joins
    return with_joins(cut_block, 0, (*joins, joins[-1]))


def drop_a_branch(cut_block: CutBlock) -> CutBlock:
    return with_joins(cut_block, -1, ())


def swap_submodules(cut_block: CutBlock) -> CutBlock:
    graph = cut_block.branches[-1].piece.graph
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    for node in calls:
        node.target = {"block.norm1": "block.norm2", "block.norm2": "block.norm1"}.get(node.target, node.target)
    graph.recompile()
    return cut_block


def scale_slightly(cut_block: CutBlock) -> CutBlock:
    *joins, last = cut_block.branches[0].joins
    return with_joins(cut_block, 0, (*joins, replace(last, options={"alpha": 1 + 2**-20})))


FAULTS = [drop_a_term, flip_a_sign, double_a_term, drop_a_branch, swap_submodules, scale_slightly]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("block", [hand.Block, hand.Parallel, hand.Subtracting, hand.Flattening])
def test_the_check_sees_a_fault(block: type[nn.Module], fault: Any) -> None:
    """A cut that holds no longer does after one small change."""
    finding = first_block(block)
    with torch.no_grad():  # norms of fresh blocks are alike
        finding.call.module.norm1.weight.mul_(1.5)
    cut_block = cut(finding)
    assert holds(cut_block, finding)
    assert not holds(fault(cut_block), finding)


def test_a_branch_is_what_the_step_adds() -> None:
    """`delta` is the attention's output for a step `x + attention(norm(x))`."""
    finding = first_block(hand.Block)
    block, (x,) = finding.call.module, finding.call.args
    cut_block = cut(finding)
    values = cut_block.inputs((x,), {})
    branch = cut_block.branches[0]
    values |= branch.piece.run(values)
    assert torch.equal(branch.delta(values, x), block.attention(block.norm1(x)))


def test_a_subtracted_branch_is_negative() -> None:
    """`delta` carries the sign of `x - f(x)`."""
    finding = first_block(hand.Subtracting)
    block, (x,) = finding.call.module, finding.call.args
    cut_block = cut(finding)
    values = cut_block.inputs((x,), {})
    values |= cut_block.branches[0].piece.run(values)
    assert torch.equal(cut_block.branches[0].delta(values, x), -block.attention(block.norm1(x)))


def test_branches_keep_the_streams_layout() -> None:
    """Operands come back in the shape in which the stream enters, though the block adds in others."""
    finding = first_block(hand.Flattening)
    (x,) = finding.call.args
    cut_block = cut(finding)
    values = cut_block.inputs((x,), {})
    for branch in cut_block.branches:
        assert branch.delta(values | branch.piece.run(values), x).shape == x.shape


def test_the_pieces_run_on_the_live_sub_modules() -> None:
    """A layer exchanged after the cut is used, and the pieces own no parameter."""
    finding = first_block(hand.Block)
    cut_block = cut(finding)
    finding.call.module.mlp.down = nn.Linear(2 * hand.WIDTH, hand.WIDTH)
    finding.call.module.norm2 = nn.Identity()
    assert holds(cut_block, finding)
    assert list(cut_block.branches[1].piece.graph.parameters()) == []


def test_an_analysis_on_fake_tensors_is_cut_for_the_real_block() -> None:
    """The graph comes from the weightless twin, and runs on the user's own module."""
    model = hand.stack_of(hand.Parallel).train()
    mode = new_fake_mode()
    twin, tokens = fake_copy(model, mode), fake_copy(TOKENS, mode)
    with mode:
        ((finding, *_),) = detect(record(twin, (tokens,), {})).chains
    x = torch.randn(2, 8, hand.WIDTH)
    assert reproduces(cut(finding, model.blocks[0]), model.blocks[0], (x,), {})


def test_the_callers_tensors_are_not_written_to() -> None:
    """`x += f(x)` becomes an add out of place."""
    finding = first_block(hand.InPlace)
    x = torch.randn(2, 8, hand.WIDTH)
    before = x.clone()
    cut(finding).fold(x)
    assert torch.equal(x, before)


def test_the_output_has_the_blocks_own_type() -> None:
    """A dataclass comes back as that dataclass, side values included."""
    torch.manual_seed(0)
    model = hand.TakingApart(*(hand.WithDataclass() for _ in range(3)))
    finding = detect(record(model, (TOKENS,), {})).chains[0][0]
    out = cut(finding).fold(*finding.call.args)
    expected = finding.call.module(*finding.call.args)
    assert isinstance(out, hand.BlockOutput)
    assert torch.equal(out.hidden, expected.hidden)
    assert torch.equal(out.score, expected.score)


def test_gradients_flow_through_the_pieces() -> None:
    """The fold's gradients are the block's own."""
    finding = first_block(hand.Rescaled)
    block, cut_block = finding.call.module, cut(finding)
    gradients = []
    for forward in (block, cut_block.fold):
        block.zero_grad()
        x = torch.linspace(-1, 1, 2 * 8 * hand.WIDTH).reshape(2, 8, hand.WIDTH).requires_grad_()
        forward(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_check_leaves_no_trace() -> None:
    """Buffers and random streams are as before."""
    torch.manual_seed(0)
    model = hand.PreActivationResNet().train()
    finding = detect(record(model, (torch.randn(2, 3, 16, 16),), {})).chains[0][0]
    buffers = [b.clone() for b in finding.call.module.buffers()]
    state = torch.get_rng_state()
    assert holds(cut(finding), finding)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, finding.call.module.buffers(), strict=True))


def test_another_call_is_refused() -> None:
    """A tensor more or less than in the recorded call is an error, not a wrong result."""
    finding = first_block(hand.Block)
    with pytest.raises(CutError, match="is called with"):
        cut(finding).fold(None)


def test_a_refused_block_is_not_cut() -> None:
    """There is nothing to cut in a post-norm block."""
    refused = detect(record(hand.stack_of(hand.PostNorm), (TOKENS,), {})).refused[0]
    with pytest.raises(CutError, match="not a reversible block"):
        cut(refused)
