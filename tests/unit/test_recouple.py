"""Other numbers for a converted model: as if it had been converted with them, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import autorev
from autorev.conversion.convert import chains_of
from autorev.couplings.velocity import compensated
from autorev.errors import ConversionError
from tests.helpers.one_step import gap, gradients_of, one_step
from tests.helpers.tiny_llm import tiny_model
from tests.helpers.zoo import build

pytestmark = pytest.mark.usefixtures("one_thread")

BITS = 20
IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(5))
BATCH = {"input_ids": IDS, "labels": IDS}


def converted(family: str = "llama", **how: Any) -> Any:
    """A tiny model in training mode, on a grid of its own choice."""
    model = tiny_model(family).train()
    autorev.convert(model, **{"fraction_bits": BITS, **how})
    return model


def couplings(model: nn.Module) -> list[Any]:
    """Of all steps."""
    return [coupling for chain in chains_of(model) for coupling in chain.couplings]


def same_step(model: nn.Module, other: nn.Module) -> bool:
    """Do both compute the same loss and the same gradients, bit for bit?"""
    (loss, found), (expected_loss, expected) = one_step(model, **BATCH), one_step(other, **BATCH)
    return torch.equal(loss, expected_loss) and gap(found, expected) == 0


NUMBERS = [
    {"gamma": 1 / 4},
    {"gamma": 1.0},
    {"gamma": -1.0},
    {"gamma": {"model.layers.1": 1 / 2, "*.[23]": 1 / 16}},
    {"gamma": 1 / 4, "c": 0.75},
    {"gamma": {"model.layers.[01]": 3 / 4}, "c": {"model.layers.0": 0.5, "model.layers.3": 1.25}},
]


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_it_equals_converting_anew(numbers: Any, granularity: str) -> None:
    """The same loss and gradients as a model converted with the numbers that the blocks have now; drift 0."""
    model = converted(granularity=granularity)
    autorev.recouple(model, **numbers)
    gamma = {
        path: float(c.gamma) for chain in chains_of(model) for path, c in zip(chain.paths, chain.couplings, strict=True)
    }
    c = {path: c.c for chain in chains_of(model) for path, c in zip(chain.paths, chain.couplings, strict=True)}
    anew = converted(granularity=granularity, gamma=gamma, c=c)
    assert couplings(anew) == couplings(model)
    assert same_step(model, anew)
    assert set(autorev.drift(model).values()) == {0.0}
    before = converted(granularity=granularity)
    assert not same_step(model, before)


def test_the_numbers_are_those_asked_for() -> None:
    """By pattern; blocks that none matches keep their gamma, and with given c also their c."""
    model = converted(gamma=1 / 2)
    before = couplings(model)
    autorev.recouple(model, gamma={"model.layers.[01]": 3 / 4}, c={"model.layers.0": 0.5})
    after = couplings(model)
    assert [coupling.gamma for coupling in after] == [Fraction(3, 4), Fraction(3, 4), Fraction(1, 2), Fraction(1, 2)]
    assert [coupling.c for coupling in after] == [0.5, *(coupling.c for coupling in before[1:])]


def test_without_a_c_it_is_the_compensated_one() -> None:
    """Over the whole chain; the steps of one block share their mean, so that a config can name it."""
    gammas = [1 / 2, 1 / 16, 1 / 8, 1 / 4]
    by_block = {f"model.layers.{n}": gamma for n, gamma in enumerate(gammas)}
    model = converted()
    autorev.recouple(model, gamma=by_block)
    assert [coupling.c for coupling in couplings(model)] == compensated([Fraction(gamma) for gamma in gammas])
    halves = converted(granularity="sublayer")
    autorev.recouple(halves, gamma=by_block)
    fine = compensated([Fraction(gamma) for gamma in gammas for _ in "ab"])
    means = [sum(fine[2 * n : 2 * n + 2]) / 2 for n in range(4)]
    assert [coupling.c for coupling in couplings(halves)] == pytest.approx([c for c in means for _ in "ab"])


def test_a_forward_keeps_the_numbers_that_it_was_made_with() -> None:
    """Its backward, after others were set, has its own gradients, without drift; the next step has the new ones."""
    model = converted(gamma=1 / 2)
    _, expected = one_step(model, **BATCH)
    model.zero_grad()
    loss = model(**BATCH).loss
    autorev.recouple(model, gamma=1 / 16)
    loss.backward()
    assert gap(gradients_of(model), expected) == 0
    assert set(autorev.drift(model).values()) == {0.0}
    fresh = converted()
    autorev.recouple(fresh, gamma=1 / 16)
    assert same_step(model, fresh)


def test_weights_grid_and_stored_blocks_stay() -> None:
    """The numbers alone are others."""
    model = converted(keep_last=2)
    (chain,) = chains_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arithmetic = chain.arithmetic
    autorev.recouple(model, gamma=1 / 2)
    assert chains_of(model) == [chain]
    assert (chain.arithmetic, chain.stored_from) == (arithmetic, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("numbers", [{"gamma": 1.0}, NUMBERS[3], NUMBERS[5]], ids=str)
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_a_saved_model_is_loaded_with_its_last_numbers(tmp_path: Path, numbers: Any, granularity: str) -> None:
    """Through `save_pretrained` and `autorev.load`, whatever it was converted with: the same loss, bit for bit."""
    model = converted(method="leapfrog", granularity=granularity)
    autorev.recouple(model, **numbers)
    model.save_pretrained(tmp_path)
    again = autorev.load(tmp_path).train()
    assert couplings(again) == couplings(model)
    assert same_step(again, model)


def test_a_model_without_a_config_is_recoupled_too() -> None:
    """There is nothing to remember in."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(4)))
    x = torch.randn(2, 8)
    autorev.convert(model, batch=(x,))
    before = model(x)
    autorev.recouple(model, gamma=1 / 2)
    assert {coupling.gamma for coupling in couplings(model)} == {Fraction(1, 2)}
    assert not torch.equal(model(x), before)


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        return x + torch.tanh(self.linear(x))


# -- what is refused


def unconverted() -> Any:
    """As it came."""
    return tiny_model()


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "unconverted": (unconverted, {"gamma": 1 / 4}, r"LlamaForCausalLM is not converted; call autorev.convert\(model\)"),
    "two streams": (lambda: converted(method="revnet"), {"gamma": 1 / 4}, "is coupled by additive, whose numbers"),
    "bdia": (lambda: converted(method="bdia"), {"gamma": 1 / 4}, "is coupled by bdia, whose numbers are its own"),
    "float": (
        lambda: converted(method="leapfrog", arithmetic="float", fraction_bits=None),
        {"gamma": 1 / 4},
        "is in float arithmetic, which drifts as gamma moves; convert it exactly",
    ),
    "not dyadic": (converted, {"gamma": {"model.layers.3": 0.3, "*": 1 / 4}}, r"gamma = 0.3 for model.layers.3 is not"),
    "too many bits": (converted, {"gamma": 2.0**-9}, r"is not n / 2\^k with k <= 8"),
    "too large": (converted, {"gamma": 2.0}, r"\|gamma\| < 2"),
    "branches off": (converted, {"gamma": 1 / 4, "c": {"*.2": 0.0}}, "c = 0.0 for model.layers.2: the branches would"),
    "no number": (converted, {"gamma": 1 / 4, "c": float("nan")}, "c is a finite number, .* not nan"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_is_refused_and_nothing_changes(case: str) -> None:
    """Neither numbers nor the config, whichever block it was that could not have them."""
    make, numbers, said = REFUSED[case]
    model = make()
    before, config = couplings(model), model.config.to_dict()
    with pytest.raises(ConversionError, match=said):
        autorev.recouple(model, **numbers)
    assert couplings(model) == before
    assert model.config.to_dict() == config


def test_one_chain_of_two_cannot_and_both_keep_theirs() -> None:
    """All or nothing over the chains: the numbers of the first are not set before the second's are known to do."""
    model = build("t5")
    assert isinstance(model, hf.T5ForConditionalGeneration)
    autorev.convert(model, fraction_bits=16)
    names = [chain.name for chain in chains_of(model)]
    assert len(names) == 2
    before = couplings(model)
    last = chains_of(model)[1].paths[-1]
    with pytest.raises(ConversionError, match="is not n / 2"):
        autorev.recouple(model, gamma={last: 0.3, "*": 1 / 4})
    assert couplings(model) == before
    autorev.recouple(model, gamma={last: 1 / 2, "*": 1 / 4})
    assert [coupling.gamma for coupling in couplings(model)] == [Fraction(1, 4)] * (len(before) - 1) + [Fraction(1, 2)]


# -- the c that goes with gammas


def test_compensated_by_hand() -> None:
    """Three steps with gammas 1/2, 1/4, 1/8: S = 1 + 1/4 (1 + 1/8), 1 + 1/8, 1, and c = 2 / (1 + S)."""
    assert compensated([Fraction(1, 2), Fraction(1, 4), Fraction(1, 8)]) == pytest.approx(
        [2 / (1 + 1.28125), 2 / (1 + 1.125), 1.0]
    )


def test_for_a_constant_gamma_it_is_the_presets() -> None:
    """2 / (1 + 1 / (1 - gamma)) is 1 - gamma / 2 up to gamma squared; the last step, which nothing follows, has 1."""
    for gamma in (Fraction(1, 16), Fraction(1, 8)):
        factors = compensated([gamma] * 30)
        assert factors[0] == pytest.approx(1 - float(gamma) / 2, abs=float(gamma) ** 2 / 2)
        assert factors[-1] == 1


def test_for_leapfrog_it_falls_with_the_blocks_to_come() -> None:
    """A branch acts in every later step: n of them, so 2 / (1 + n); 1 in the last."""
    assert compensated([Fraction(1)] * 4) == pytest.approx([2 / 5, 2 / 4, 2 / 3, 1.0])


def test_the_compensated_c_keeps_a_model_nearest_to_itself() -> None:
    """Nearer than the preset's own numbers, at a gamma that moves the function much."""
    model = tiny_model().eval()
    with torch.no_grad():
        own = model(**BATCH).logits
        apart = {}
        for name in ("preset", "compensated"):
            autorev.convert(model, gamma=3 / 4, fraction_bits=BITS)
            if name == "compensated":
                autorev.recouple(model, gamma=3 / 4)
            apart[name] = float((model(**BATCH).logits - own).norm())
            autorev.revert(model)
    assert apart["compensated"] < apart["preset"]
