"""gamma over the steps: from the pretrained function's to no side bits at all, and exact all the way."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorev.conversion.schedule import Schedule
from autorev.couplings.arithmetic import side_bits_of
from autorev.couplings.choose import check_dyadic
from autorev.errors import SettingError

schedules = st.builds(
    Schedule,
    target=st.sampled_from(["leapfrog", "midpoint"]),
    steps=st.integers(1, 300),
    blocks=st.integers(1, 200),
    start=st.sampled_from([Fraction(1, 2**k) for k in range(1, 6)] + [Fraction(3, 4), Fraction(5, 16)]),
)


def sign_of(schedule: Schedule) -> int:
    """Of the gamma that it leads to."""
    return 1 if schedule.target == "leapfrog" else -1


@given(schedules)
def test_it_starts_where_the_model_is_and_ends_without_side_bits(schedule: Schedule) -> None:
    """The first step has the start's gamma; from the last one on it is exactly 1 or -1, for good."""
    assert schedule.gamma(0) == sign_of(schedule) * schedule.start
    for later in (0, 1, 10**6):
        gamma = schedule.gamma(schedule.steps + later)
        assert gamma == sign_of(schedule)
        assert side_bits_of(gamma) == 0
    assert abs(schedule.gamma(schedule.steps - 1)) < 1


@given(schedules)
def test_it_never_turns_back(schedule: Schedule) -> None:
    """|gamma| rises or stays, and its sign is the target's throughout."""
    gammas = [schedule.gamma(step) for step in range(schedule.steps + 2)]
    assert all(abs(a) <= abs(b) for a, b in pairwise(gammas))
    assert all(gamma * sign_of(schedule) > 0 for gamma in gammas)


@given(schedules)
def test_every_gamma_is_exact_and_cheap(schedule: Schedule) -> None:
    """n / 2^k with k of at most 5: exact arithmetic takes it, and on the way it costs no more than that."""
    for step in range(schedule.steps + 1):
        gamma = schedule.gamma(step)
        assert isinstance(gamma, Fraction)
        check_dyadic(gamma, "a block")
        assert side_bits_of(gamma) <= 5


def test_the_default_starts_at_an_eighth() -> None:
    """Which `autorev.convert` gives by default; three side bits until gamma passes 7/8."""
    schedule = Schedule("leapfrog", steps=100, blocks=30)
    gammas = [schedule.gamma(step) for step in range(101)]
    assert gammas[0] == Fraction(1, 8)
    assert all(side_bits_of(gamma) <= 3 for gamma in gammas if gamma <= Fraction(7, 8))


def test_the_horizon_grows_by_the_same_factor() -> None:
    """1 / (1 - gamma) goes from 8/7 to the depth: half way it is the geometric mean, to within gamma's steps."""
    schedule = Schedule("leapfrog", steps=100, blocks=32)
    for step in range(0, 100, 10):
        horizon = 8 / 7 * (32 * 7 / 8) ** (step / 100)
        bits = 3 if horizon <= 8 else 4 if horizon <= 16 else 5
        assert float(schedule.gamma(step)) == pytest.approx(1 - 1 / horizon, abs=2.0 ** -(bits + 1))
    assert schedule.gamma(99) == Fraction(31, 32)


def test_a_deeper_chain_gets_further() -> None:
    """Before the end its gamma is higher: a branch's horizon is a longer one."""
    deep, shallow = (Schedule("midpoint", 100, blocks).gamma(99) for blocks in (60, 4))
    assert abs(shallow) == Fraction(3, 4)
    assert abs(deep) == Fraction(31, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "momentum"}, "a schedule leads to leapfrog or midpoint, not to 'momentum'"),
        ({"steps": 0}, "a schedule takes 1 step or more, not 0; to jump, convert to leapfrog"),
        ({"start": Fraction(0)}, "starts at a gamma between 0 and 1, not at 0"),
        ({"start": Fraction(1)}, "starts at a gamma between 0 and 1, not at 1"),
        ({"start": Fraction(-1, 8)}, "starts at a gamma between 0 and 1, not at -1/8"),
    ],
)
def test_what_makes_no_schedule_is_refused(change: dict[str, Any], said: str) -> None:
    """By what was wrong."""
    with pytest.raises(SettingError, match=said):
        Schedule(**{"target": "leapfrog", "steps": 10, "blocks": 4, **change})
