"""Side bits where they are needed, within a budget that is measured; or the model as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.conversion.convert import chains_of
from autorev.engine.mode import ORIGINAL, mode
from autorev.errors import ConversionError
from autorev.finetuning.calibrate import calibrate
from autorev.finetuning.evaluate import evaluate, logits_of
from autorev.finetuning.packing import Collator, make_rows
from autorev.finetuning.record import Calibration
from tests.helpers.tiny_llm import tiny_model
from tests.helpers.zoo import build
from tests.unit.test_packing import examples

pytestmark = pytest.mark.usefixtures("one_thread")

LEAST = 2.0**-11


def converted(**how: Any) -> Any:
    """A tiny model of four blocks."""
    model = tiny_model()
    autorev.convert(model, **{"fraction_bits": 20, **how})
    return model


def bits_of(model: nn.Module) -> dict[str, int]:
    """Side bits by block."""
    return {
        path: c.side_bits for chain in chains_of(model) for path, c in zip(chain.paths, chain.couplings, strict=True)
    }


def fake(model: nn.Module, costs: dict[str, float], together: float = 0.0) -> Callable[[], float]:
    """A loss that is 2 for the original; a block costs its share by 16 gamma - 1, and pairs cost something besides.

    Converting costs `LEAST` whatever the gammas are.
    """

    def loss() -> float:
        if mode() == ORIGINAL:
            return 2.0
        gammas = {
            p: float(c.gamma) for chain in chains_of(model) for p, c in zip(chain.paths, chain.couplings, strict=True)
        }
        moved = [16 * gammas[path] - 1 for path in costs]
        alone = sum(cost * move for cost, move in zip(costs.values(), moved, strict=True))
        return 2.0 + LEAST + alone + together * sum(move > 0 for move in moved) ** 2

    return loss


def costs(model: nn.Module, **special: float) -> dict[str, float]:
    """The same for all blocks but some, which are named by number: `_2=1.0`."""
    return {path: special.get(f"_{path.rsplit('.', 1)[1]}", 1e-4) for path in bits_of(model)}


def total(model: nn.Module) -> int:
    """Side bits over all blocks."""
    return sum(bits_of(model).values())


def test_the_sensitive_block_keeps_its_bits() -> None:
    """The others give all of theirs away; the numbers are in the model when it returns."""
    model = converted()
    found = calibrate(model, fake(model, costs(model, _2=1.0)), max_loss_increase=0.05)
    assert bits_of(model) == {"model.layers.0": 0, "model.layers.1": 0, "model.layers.2": 4, "model.layers.3": 0}
    (chosen,) = (row for row in found.assignments if row.chosen)
    assert chosen.side_bits == 1.0
    assert chosen.increase == pytest.approx(LEAST + 3 * 15 * 1e-4)


def test_a_block_that_is_somewhat_sensitive_keeps_some() -> None:
    """What a bit costs decides, not the block: 2^-3 fits the budget, 2^-2 does not."""
    model = converted()
    calibrate(model, fake(model, costs(model, _1=0.02)), max_loss_increase=0.05)
    assert bits_of(model) == {"model.layers.0": 0, "model.layers.1": 3, "model.layers.2": 0, "model.layers.3": 0}


def test_the_budget_is_held_on_the_text_that_checks() -> None:
    """The order of the moves comes from `loss`, what is allowed from `check`."""
    model = converted()
    dearer = {path: 4 * cost for path, cost in costs(model).items()}
    found = calibrate(model, fake(model, costs(model)), check=fake(model, dearer), max_loss_increase=0.01)
    (chosen,) = (row for row in found.assignments if row.chosen)
    assert chosen.increase == pytest.approx(fake(model, dearer)() - 2.0)
    assert chosen.increase <= 0.01
    strict = total(model)
    calibrate(model, fake(model, costs(model)), max_loss_increase=0.01)
    assert total(model) < strict


@pytest.mark.parametrize("together", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("budget", [0.001, 0.02, 0.1, 0.5, 10.0])
def test_the_budget_is_kept_as_measured(budget: float, together: float) -> None:
    """By the loss that the model has in the end, even where blocks cost more together than one by one."""
    model = converted()
    loss = fake(model, costs(model, _1=0.02, _3=0.003), together)
    found = calibrate(model, loss, max_loss_increase=budget, tokens=7)
    (chosen,) = (row for row in found.assignments if row.chosen)
    assert loss() - 2.0 == chosen.increase
    assert chosen.increase <= budget
    assert chosen.side_bits == total(model) / 4
    cheaper = [row for row in found.assignments if row.side_bits < chosen.side_bits]
    assert all(row.increase > budget for row in cheaper)
    assert cheaper or total(model) == 0
    assert (found.budget, found.tokens) == (budget, 7)


def test_what_was_measured_is_in_the_record() -> None:
    """Every block at 3, 2, 1 and 0 side bits alone, against all at 4; the assignments by descending side bits."""
    model = converted()
    found = calibrate(model, fake(model, costs(model, _2=0.5)), max_loss_increase=0.1)
    assert isinstance(found, Calibration)
    tried = [(row.block, row.side_bits) for row in found.sensitivities]
    assert tried == [(path, k) for path in bits_of(model) for k in (3, 2, 1, 0)]
    for row in found.sensitivities:
        cost = 0.5 if row.block == "model.layers.2" else 1e-4
        assert row.gamma == 2.0**-row.side_bits
        assert row.increase == pytest.approx(cost * (16 * row.gamma - 1))
    measured = [row.side_bits for row in found.assignments]
    assert measured == sorted(set(measured), reverse=True)
    assert measured[0] == 4.0


@pytest.mark.parametrize("loss_at_best", [2.5, math.nan], ids=["too high", "no number"])
def test_an_impossible_budget_leaves_the_model_as_it_was(loss_at_best: float) -> None:
    """Its numbers, those that its config remembers, and its mode."""
    model = converted(gamma={"*.0": 1 / 2, "*": 1 / 8}).train()
    couplings, config = [list(chain.couplings) for chain in chains_of(model)], model.config.to_dict()
    with pytest.raises(ConversionError, match=r"with 4 side bits in every block .* budget is 0.02; allow more, or"):
        calibrate(model, lambda: 2.0 if mode() == ORIGINAL else loss_at_best)
    assert [list(chain.couplings) for chain in chains_of(model)] == couplings
    assert model.config.to_dict() == config
    assert model.training


def test_an_interrupted_calibration_leaves_the_model_as_it_was() -> None:
    """Whatever it was that ended it, in the midst of trying."""
    model = converted(gamma=1 / 2)
    before, config, asked = bits_of(model), model.config.to_dict(), iter(range(9))

    def loss() -> float:
        if next(asked, None) is None:
            raise KeyboardInterrupt
        return 2.0

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, loss)
    assert bits_of(model) == before
    assert model.config.to_dict() == config


def test_what_is_chosen_is_remembered(tmp_path: Any) -> None:
    """A saved model is loaded with its calibrated blocks."""
    model = converted()
    calibrate(model, fake(model, costs(model, _2=1.0)), max_loss_increase=0.05)
    model.save_pretrained(tmp_path)
    assert bits_of(autorev.load(tmp_path)) == bits_of(model)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tiny_model, "is not converted; call autorev.convert"),
        (lambda: converted(method="bdia"), "is coupled by bdia"),
        (lambda: converted(method="revnet"), "is coupled by additive"),
        (lambda: converted(method="leapfrog", arithmetic="float", fraction_bits=None), "is in float arithmetic"),
    ],
    ids=["unconverted", "bdia", "two streams", "float"],
)
def test_what_has_no_free_gamma_is_refused(make: Callable[[], Any], said: str) -> None:
    """As `recouple` refuses it."""
    with pytest.raises(ConversionError, match=said):
        calibrate(make(), lambda: 2.0)


def test_steps_of_a_block_share_their_bits() -> None:
    """In sublayers, and in a model of two chains: means are over steps, moves are of blocks."""
    model = build("t5")
    autorev.convert(model, granularity="sublayer", fraction_bits=16)
    found = calibrate(model, fake(model, costs(model)), max_loss_increase=1.0)
    assert len({row.block for row in found.sensitivities}) == len(bits_of(model))
    assert total(model) == 0
    assert [row.side_bits for row in found.assignments if row.chosen] == [0.0]


def test_with_a_models_own_loss() -> None:
    """The increase in the record is what `evaluate` finds before and after; the loss of fewer bits is another."""
    model = converted(gamma=1 / 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                parameter.mul_(8)  # random blocks do too little for anything to be sensitive
    rows = make_rows(examples([30, 25, 28], is_text=False), 32, packed=True)
    loss = lambda: evaluate(logits_of(model), rows, Collator(True, 32, 257), 0).loss  # noqa: E731 - short enough
    found = calibrate(model, loss, max_loss_increase=0.01)
    (chosen,) = (row for row in found.assignments if row.chosen)
    here = loss()
    autorev.revert(model)
    assert here - loss() == pytest.approx(chosen.increase, abs=1e-9)
    assert chosen.increase <= 0.01
    assert max(abs(row.increase) for row in found.sensitivities) > 1e-4
