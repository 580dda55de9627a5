"""Converted models against the same coupling under ordinary autograd: gradient checkpointing around converted modules.

python -m pytest tests/engine/test_checkpoint_around.py
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from autorev.errors import AutorevError
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    EXACT,
    Chain,
    Results,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    each_setting,
    gradients_of,
    mean_square,
    oracle,
    states,
    step,
)


@each_setting
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_the_whole_model(reentrant: bool, setting: Setting) -> None:
    """`torch.utils.checkpoint` of a converted model, both kinds."""
    model = converted(setting, lambda: Chain(*(hand.Dropping() for _ in range(4))), states(setting))
    x = states(setting, 3).requires_grad_()

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        x.grad = None
        torch.manual_seed(1)
        loss = mean_square(checkpoint(model, x, use_reentrant=reentrant))
        loss.backward()
        assert x.grad is not None
        return {"loss": loss.detach(), "x": x.grad.clone(), **gradients_of(model)}

    assert_like_oracle(model, setting, run)


@pytest.mark.parametrize("preserved", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_two_passes_of_one_input_under_checkpoints(threads: int, preserved: bool) -> None:
    """As in R-Drop, with signs that are drawn (bdia): each pass has its own again in backward, or that is refused."""
    model = converted(EXACT, lambda: Chain(*(hand.Block() for _ in range(4))), states(EXACT), method="bdia")
    x = states(EXACT, 3)

    def run(forward: Callable[[torch.Tensor], torch.Tensor]) -> Results:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        first = forward(x)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(forward, x).result() if threads == 2 else forward(x)
        loss = mean_square(first) + second.pow(3).mean()
        loss.backward()
        return {"loss": loss.detach(), **gradients_of(model)}

    expected = run(model)
    again = partial(checkpoint, model, use_reentrant=False, preserve_rng_state=preserved)
    if preserved:
        assert_same(run(again), expected, 0)
        return
    with pytest.raises(AutorevError, match="2 passes had this input"):
        run(again)


class CheckpointingSome(Chain):
    """Checkpoints these of its blocks."""

    checkpointed: tuple[int, ...] = ()
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            if number in self.checkpointed:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        return x


@each_setting
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("checkpointed", [(0,), (1,), (3,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("keep_last", [0, 1])
def test_checkpointing_around_one_block_is_never_silently_wrong(
    keep_last: int, checkpointed: tuple[int, ...], reentrant: bool, setting: Setting
) -> None:
    """A checkpoint between the blocks of a chain is right, or refused."""
    model = converted(
        setting, lambda: CheckpointingSome(*(hand.Block() for _ in range(4))), states(setting), keep_last=keep_last
    )
    x = states(setting, 3).requires_grad_()

    def run() -> Results:
        x.grad = None
        results = step(model, x)
        assert x.grad is not None
        return {**results, "x": x.grad.clone()}

    expected = oracle(model, run)
    model.checkpointed, model.reentrant = checkpointed, reentrant
    try:
        actual = run()
    except AutorevError:
        return
    assert_same(actual, expected, setting.tolerance)
