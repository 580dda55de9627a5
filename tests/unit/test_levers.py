"""The levers of a plan, on a made-up model: what fits is found, and the memory is used up by what is worth most.

python -m pytest tests/unit/test_levers.py
"""

from __future__ import annotations

import pytest

from autorev.keeps import Keeps, keeps_at
from autorev.methods import Method
from autorev.planning.levers import ATTENTION, STORED, best_number, levers_of, with_number

BLOCKS = 12
KEPT = "checkpoint:keep=attention"


def cost_in(room: int, linked: bool = False):  # type: ignore[no-untyped-def]  # a closure
    """A block takes 10 bytes where it is stored, 2 for its attention, 1 for its input; `linked`: the link is slow."""

    def cost(method: Method) -> tuple[float, ...] | None:
        peak = host = 0
        seconds = 0.0
        recomputed = BLOCKS - method.stored_of(0)
        for position in range(BLOCKS):
            keeps = method.keeps(position, recomputed)
            held = {"inputs": 1, "attention": 2 * keeps.attention} if position < recomputed else {"stored": 10}
            moved = sum(size for what, size in held.items() if what in keeps.on_host)
            peak, host = peak + sum(held.values()) - moved, host + moved
            seconds += 1 + (0 if position >= recomputed else 0.5 if keeps.attention else 1.0)
        if linked:
            seconds = max(seconds, host)
        return (seconds, host, peak) if peak <= room else None

    return cost


@pytest.mark.parametrize(
    ("spec", "lever", "room", "found"),
    [
        ("checkpoint", STORED, 12 + 9 * 3, "checkpoint:keep_last=3"),
        ("checkpoint", STORED, 12, "checkpoint"),
        ("checkpoint", ATTENTION, 12 + 2 * 5 + 1, "checkpoint:keep=attention:5"),
        ("checkpoint", ATTENTION, 12 + 2 * 12, "checkpoint:keep=attention"),
        ("checkpoint:keep_last=2", ATTENTION, 10 + 20 + 2 * 3, "checkpoint:keep_last=2,keep=attention:3"),
        ("offload", ("host", "inputs"), 7, "offload:host=inputs:5"),
        (
            "checkpoint:keep=attention,host=attention",
            ("host", "attention"),
            12 + 8,
            "checkpoint:keep=attention,host=attention:8",
        ),
    ],
)
def test_the_number_at_the_edge_of_what_fits(spec: str, lever: tuple[str, str], room: int, found: str) -> None:
    """Of what takes memory as many blocks as fit, of what frees it as few as have to."""
    assert str(best_number(Method.parse(spec), lever, BLOCKS, cost_in(room))) == found


def test_a_lever_that_slows_a_step_is_left_alone() -> None:
    """Where the link is what a step waits for, keeping more attention there costs time."""
    method = Method.parse("offload")
    cost = cost_in(30, linked=True)
    found = best_number(method, ATTENTION, BLOCKS, cost)
    before, after = cost(method), cost(found)
    assert before is not None
    assert after is not None
    assert after <= before


def test_which_there_are() -> None:
    """Those that a method has, and their spelling."""
    assert levers_of(Method.parse("checkpoint"), long=False) == [STORED]
    assert levers_of(Method.parse("offload"), long=True) == [STORED, ATTENTION, ("host", "inputs")]
    momentum = Method.parse("momentum:host=side_bits")
    assert levers_of(momentum, long=False) == [STORED, ("host", "side_bits")]
    assert str(with_number(momentum, ("host", "side_bits"), 4)) == "momentum:k=3,host=side_bits:4"
    assert str(with_number(momentum, ATTENTION, None)) == "momentum:k=3,keep=attention,host=side_bits"


def test_which_blocks() -> None:
    """Attention of the last that run twice; on the host the first that have it; nothing of those that are stored."""
    kept, moved = {"attention": 3}, {"side_bits": 1, "attention": 2}
    found = [keeps_at(position, 4, kept, moved) for position in range(5)]
    assert found == [
        Keeps(False, frozenset({"side_bits"})),
        Keeps(True, frozenset({"attention"})),
        Keeps(True, frozenset({"attention"})),
        Keeps(True),
        Keeps(),
    ]
