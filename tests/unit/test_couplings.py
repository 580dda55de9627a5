"""The couplings by themselves: what a step computes, that it can be undone to the bit, and what it keeps for that.

python -m pytest tests/unit/test_couplings.py
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import autorev
from autorev.conversion.convert import chains_of
from autorev.couplings.additive import Additive
from autorev.couplings.arithmetic import LIMIT, MOST_FRACTION_BITS, Arithmetic, FixedPoint, Floating, grid_for
from autorev.couplings.choose import check_dyadic, coupling_for
from autorev.couplings.coupling import Coupling, State
from autorev.couplings.presets import PRESETS
from autorev.couplings.side_bits import pack, unpack
from autorev.couplings.velocity import Bdia, Velocity
from autorev.engine.chain import ReversibleChain
from autorev.engine.grid import check_largest, grid_at_start, largest_of, step_on_grid
from autorev.engine.mode import running
from autorev.errors import ConversionError, FixedPointRangeError, SettingError
from autorev.methods import Method
from tests.helpers import handwritten as hand

GAMMAS = [Fraction(n) for n in ("1", "-1", "1/8", "-3/8", "7/16", "11/8", "77/256")]
COUPLINGS: list[Coupling] = [*(Velocity(gamma, 1 - float(gamma) or 1.0) for gamma in GAMMAS), Additive()]
SHAPES = [(1,), (7,), (8,), (9,), (3, 5), (2, 3, 5), (1, 1, 1), (4, 16), (2, 0, 3), (0,)]
GRID = FixedPoint(16)

each_coupling = pytest.mark.parametrize("coupling", COUPLINGS, ids=str)


def random_state(coupling: Coupling, shape: tuple[int, ...], seed: int) -> State:
    """Any integers that a chain may hold: below the limit, and a velocity whose product with n fits an int32."""
    generator = torch.Generator().manual_seed(seed)
    gamma = getattr(coupling, "gamma", Fraction(1))
    largest = (2**31 - 1) // max(4, abs(gamma.numerator))

    def integers(bound: int) -> torch.Tensor:
        return torch.randint(-bound, bound + 1, shape, generator=generator, dtype=torch.int32)

    return State(integers(LIMIT // 4), integers(min(largest, LIMIT // 4)))


def branch_of(x: torch.Tensor) -> torch.Tensor:
    """x + f(x) with a nonlinear f."""
    return x + torch.sin(3 * x) / 2


def there_and_back(coupling: Coupling, state: State, arithmetic: Arithmetic, dtype: torch.dtype) -> State:
    """The state after a step was taken and undone."""
    value = arithmetic.decode(state.stream, dtype)
    side = coupling.step(state, branch_of(value), value, arithmetic)
    coupling.recover_input(state, arithmetic)
    again = arithmetic.decode(state.stream, dtype)
    coupling.recover_partner(state, branch_of(again), again, side, arithmetic)
    return state


# -- exact inverses


@each_coupling
@given(seed=st.integers(0, 2**32), shape=st.lists(st.integers(0, 9), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_a_step_is_undone_to_the_bit(coupling: Coupling, seed: int, shape: list[int]) -> None:
    """Undoing a step gives back both integer streams, whatever they hold and whatever their shape."""
    before = random_state(coupling, tuple(shape), seed)
    after = there_and_back(coupling, before.clone(), GRID, torch.float32)

    assert torch.equal(before.stream, after.stream)
    assert torch.equal(before.partner, after.partner)


@each_coupling
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recover_input_gives_the_branch_input_and_recover_output_undoes_it(
    coupling: Coupling, shape: tuple[int, ...]
) -> None:
    """`recover_input` finds the last branch's input without any branch; `recover_output` goes back behind the step."""
    state = random_state(coupling, shape, 1)
    read = state.stream.clone()
    value = GRID.decode(state.stream, torch.float32)
    coupling.step(state, branch_of(value), value, GRID)
    after = state.clone()

    coupling.recover_input(state, GRID)
    assert torch.equal(read, state.stream)
    coupling.recover_output(state, GRID)

    assert torch.equal(after.stream, state.stream)
    assert torch.equal(after.partner, state.partner)


@each_coupling
def test_a_strided_stream_is_undone_too(coupling: Coupling) -> None:
    """A chain may begin with a transposed tensor."""
    stream = torch.randn(5, 3, 7).transpose(0, 2)
    state = coupling.initial_state(GRID.encode(stream))
    before = state.clone()
    there_and_back(coupling, state, GRID, torch.float32)

    assert torch.equal(before.stream, state.stream)
    assert torch.equal(before.partner, state.partner)


@each_coupling
def test_floating_steps_are_undone_up_to_rounding(coupling: Coupling) -> None:
    """In float64 an undone step is off by rounding only."""
    stream, partner = torch.randn(2, 4, 9, dtype=torch.float64)
    state = there_and_back(coupling, State(stream.clone(), partner.clone()), Floating(), torch.float64)

    torch.testing.assert_close(state.stream, stream, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state.partner, partner, rtol=1e-13, atol=1e-13)


@each_coupling
def test_the_first_state_has_no_residual(coupling: Coupling) -> None:
    """What the integrity check looks at is zero where a chain begins, and not zero one step later."""
    state = coupling.initial_state(GRID.encode(torch.linspace(-1, 1, 20)))
    assert not coupling.initial_residual(state).any()

    value = GRID.decode(state.stream, torch.float32)
    coupling.step(state, branch_of(value), value, GRID)

    assert coupling.initial_residual(state).any()


def test_a_flipped_bit_of_the_side_information_is_seen() -> None:
    """Side bits are needed: with another one the velocity is another."""
    coupling = Velocity(Fraction(1, 8), 0.875)
    state = random_state(coupling, (16,), 3)
    before = state.partner.clone()
    value = GRID.decode(state.stream, torch.float32)
    side = coupling.step(state, branch_of(value), value, GRID)
    assert side is not None
    side[0, 0] ^= 1
    coupling.recover_input(state, GRID)
    coupling.recover_partner(state, branch_of(value), value, side, GRID)

    assert not torch.equal(before, state.partner)


# -- whole chains


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("depth", [8, 64, 256])
def test_a_chain_is_rebuilt_bit_for_bit(depth: int, bits: int, dtype: torch.dtype) -> None:
    """Every state of a deep chain comes back as it was, in whatever precision its branches compute."""
    torch.manual_seed(0)
    coupling = Velocity(Fraction(1, 2**bits), 1 - 2.0**-bits)
    layers = [(torch.randn(8, 8) / 3).to(dtype) for _ in range(depth)]

    def branch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ weight) / 4

    state = coupling.initial_state(GRID.encode(torch.randn(3, 5, 8)))
    states, sides = [state.clone()], []
    for weight in layers:
        value = GRID.decode(state.stream, dtype)
        sides.append(coupling.step(state, branch(value, weight), value, GRID))
        states.append(state.clone())
    assert int(state.stream.abs().max()) < LIMIT

    for weight in reversed(layers):
        expected = states.pop()
        assert torch.equal(expected.stream, state.stream)
        assert torch.equal(expected.partner, state.partner)
        coupling.recover_input(state, GRID)
        value = GRID.decode(state.stream, dtype)
        coupling.recover_partner(state, branch(value, weight), value, sides.pop(), GRID)

    assert torch.equal(states[0].stream, state.stream)
    assert not coupling.initial_residual(state).any()


# -- side bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_side_bits_are_k_bytes_for_eight_elements(bits: int, shape: tuple[int, ...]) -> None:
    """Packing takes exactly k bytes for each eight elements begun, and unpacking gives the low bits again."""
    stream = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
    packed = pack(stream, bits)

    assert packed.dtype is torch.uint8
    assert packed.numel() == bits * math.ceil(stream.numel() / 8)
    if stream.numel() > 8:  # eight elements or fewer may keep their whole word
        assert packed.untyped_storage().nbytes() == packed.numel()
    assert torch.equal(stream, unpack(packed, bits, stream & -(2**bits)))


@pytest.mark.parametrize("gamma", GAMMAS, ids=str)
def test_a_step_keeps_as_many_side_bits_as_it_says(gamma: Fraction) -> None:
    """`side_bits` is what `step` returns per element: k of gamma = n / 2^k."""
    coupling = Velocity(gamma, 1.0)
    state = random_state(coupling, (4, 8), 0)
    value = GRID.decode(state.stream, torch.float32)
    side = coupling.step(state, branch_of(value), value, GRID)

    assert gamma.denominator == 2**coupling.side_bits
    assert (0 if side is None else side.numel() * 8) == coupling.side_bits * 32


# -- the grid


def test_encoding_rounds_to_the_nearest_grid_point() -> None:
    """A value on the grid is kept; any other moves by half a step at most."""
    value = torch.linspace(-3, 3, 1001)
    stream = GRID.encode(value)

    assert stream.dtype is torch.int32
    assert torch.equal(stream, GRID.encode(GRID.decode(stream, torch.float32)))
    assert float((GRID.decode(stream, torch.float64) - value.double()).abs().max()) <= 2.0**-17


def chain_on(grid: FixedPoint) -> ReversibleChain:
    """Of no blocks."""
    return ReversibleChain("layers", [], grid, 0, False, [])


def test_a_small_row_has_steps_of_the_grid(caplog: pytest.LogCaptureFixture) -> None:
    """A row beside far larger ones begins on a finer grid; where none holds both, that is said, but for a row that
    stands for zero. A chain that outgrew such a grid on a GPU begins on a coarser one."""
    chain, x = chain_on(FixedPoint(10)), torch.ones(4, 8)
    assert grid_at_start(chain, x) == FixedPoint(10)
    for row, bits in ((2.0**-5, 10), (2.0**-8, 15), (2.0**-20, 24), (1e-20, 10), (0.0, 10)):
        x[2] = row
        assert grid_at_start(chain, x) == FixedPoint(bits), row
    assert not caplog.records
    x[2] = 1e-9
    assert grid_at_start(chain, x) == FixedPoint(10)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "a row of size 1e-09 beside values of 1" in message
    x[2], chain.finest = 2.0**-20, 14
    assert grid_at_start(chain, x) == FixedPoint(14)


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_an_error_that_names_the_block(value: float, size: int) -> None:
    """Infinite or not a number: every such activation is seen, wherever it stands, whatever the grid."""
    values = torch.zeros(size)
    values[-1] = value
    state = State(torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32))
    with pytest.raises(FixedPointRangeError, match=r"layers\.3\.mlp returned values that are not numbers"):
        step_on_grid(Velocity(Fraction(1), 1.0), state, values, torch.zeros(size), GRID, "layers.3.mlp", at_once=True)
    with pytest.raises(FixedPointRangeError, match="not numbers"):
        grid_at_start(chain_on(GRID), values)


@pytest.mark.parametrize("value", [2.0**13, -(2.0**13), 2.0**16, 2.0**17, -1e9, 1e9])
@pytest.mark.parametrize("coupling", [Velocity(Fraction(1), 1.0), Velocity(Fraction(3, 8), 1.0), Additive()], ids=str)
def test_a_step_that_leaves_the_grid_is_taken_on_a_coarser_one_and_undone_exactly(
    value: float, coupling: Coupling
) -> None:
    """The result is right to the coarser grid, and going back gives every bit of the state before."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    state = State(GRID.encode(x), GRID.encode(x.flip(0) / 3))
    before = state.clone()
    value_in = GRID.decode(state.stream, torch.float32)
    out = value_in + value
    taken = step_on_grid(coupling, state, out, value_in, GRID, "block", at_once=True)
    arithmetic, side, dropped = taken.arithmetic, taken.side, taken.dropped

    assert dropped is not None
    expected, _ = coupling.equations(value_in.double(), GRID.decode(before.partner, torch.float64), out.double())
    found = arithmetic.decode(state.stream, torch.float64)
    assert float((found - expected).abs().max()) <= abs(value) * 1e-6
    coupling.recover_input(state, arithmetic)
    dropped.refine_stream(state)
    assert torch.equal(state.stream, before.stream)
    coupling.recover_partner(state, out, value_in, side, arithmetic)
    dropped.refine_partner(state)
    assert torch.equal(state.partner, before.partner)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_activation_fits(sign: int) -> None:
    """The check lets everything below the limit pass, and nothing at it."""
    fits = largest_of(torch.tensor([sign * (LIMIT - 1)], dtype=torch.int32))
    assert fits is not None
    check_largest(GRID, fits, "block")
    with pytest.raises(FixedPointRangeError):
        check_largest(GRID, largest_of(torch.tensor([sign * LIMIT], dtype=torch.int32)), "block")


@given(
    start=st.integers(-LIMIT + 1, LIMIT - 1),
    change=st.one_of(st.floats(-1e12, 1e12), st.sampled_from([2.0**15, -(2.0**15), 2.0**16, math.inf, math.nan])),
    sign=st.sampled_from([1, -1]),
)
@settings(max_examples=200, deadline=None)
def test_no_overflow_hides_behind_the_integers_wrapping_round(start: int, change: float, sign: int) -> None:
    """A step that leaves the grid fails the check even where int32 wraps; any that does not is exact."""
    coupling = Velocity(Fraction(sign), 1.0)
    velocity = max(-(2**30) + 1, min(2**30 - 1, 2 * start))
    state = State(torch.tensor([start], dtype=torch.int32), torch.tensor([velocity], dtype=torch.int32))
    coupling.step(state, torch.tensor([change]), torch.zeros(1), GRID)
    float_change = torch.tensor([change]).mul(2.0**16).round().item()
    true = start + sign * velocity + float_change
    if math.isfinite(true) and abs(true) < LIMIT:
        assert int(state.stream) == true
    else:
        with pytest.raises(FixedPointRangeError):
            check_largest(GRID, largest_of(state.stream), "block")


class Amplified(nn.Module):
    """A block whose branch is as large as the test says."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.tanh(self.linear(x))


def amplified(*scales: float) -> tuple[nn.Sequential, torch.Tensor]:
    """A chain of such blocks, and an input."""
    torch.manual_seed(0)
    return nn.Sequential(*map(Amplified, scales)), torch.randn(3, 2, 4)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("train", [True, False])
def test_a_model_whose_activations_are_no_numbers_is_told_so(factor: float, train: bool) -> None:
    """The forward pass raises, in training and without gradients, and names the block that did it."""
    model, x = amplified(1, 1, 1, 1)
    autorev.convert(model, batch=(x,))
    with torch.no_grad():
        model[2].scale.mul_(factor)
    with torch.set_grad_enabled(train), pytest.raises(FixedPointRangeError, match=r"^2 returned"):
        model(x)


@pytest.mark.parametrize("coupling", ["momentum", "leapfrog", "midpoint_a", "hamiltonian"])
@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_model_that_outgrows_its_grid_goes_on(
    coupling: str, keep_last: int, block: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Loss and gradients are the oracle's, it is said once, and the next forward pass begins on the coarser grid."""
    model, x = amplified(1, 1, 1, 1, 1)
    autorev.convert(model, method=coupling, keep_last=keep_last, batch=(x,))
    bits = chains_of(model)[0].arithmetic.fraction_bits
    with torch.no_grad():
        model[block].scale.mul_(1e4)

    twin = copy.deepcopy(model)

    def gradients(model: nn.Module, mode: str) -> list[torch.Tensor]:
        with running(mode):
            return list(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))

    for found, expected in zip(gradients(model, "reversible"), gradients(twin, "oracle"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert set(autorev.drift(model).values()) == {0.0}
    assert chains_of(model)[0].arithmetic.fraction_bits < bits
    said = [record.message for record in caplog.records if "outgrew the fixed-point grid" in record.message]
    assert said
    assert len(said) == 2 * len(set(said))  # by the model and by its twin: each grid once
    with torch.no_grad():
        plain = model(x)
    with running("oracle"):
        torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("gamma", [Fraction(7, 16), Fraction(-11, 8), Fraction(77, 256)], ids=str)
@pytest.mark.parametrize("factor", 2.0 ** torch.arange(2, 12), ids=lambda f: f"{int(f)}")
def test_no_product_of_gamma_and_velocity_wraps_round_unseen(gamma: Fraction, factor: torch.Tensor) -> None:
    """Branches that grow are computed as ever: the product V n is kept in range, too."""
    model, x = amplified(1, -1, 1, -1)
    autorev.convert(model, gamma=float(gamma), c=1 - float(gamma), batch=(x,))
    with torch.no_grad():
        for block in model:
            block.scale.mul_(factor)
        h, v = x.double(), torch.zeros_like(x).double()
        for block in model:
            f = block.scale.double() * torch.tanh(h @ block.linear.weight.double().T)
            v = float(gamma) * v + (1 - float(gamma)) * f
            h = h + v
        out = model(x)
    torch.testing.assert_close(out.double(), h, rtol=1e-2, atol=1e-4 * float(h.abs().max()))


@given(largest=st.floats(0, 2.0**40), head_room=st.sampled_from([1.0, 3.0, 16.0]))
@settings(max_examples=200, deadline=None)
def test_the_grid_is_as_fine_as_the_activations_allow(largest: float, head_room: float) -> None:
    """Activations with their head-room fit, and on a grid twice as fine they would not (up to a float's precision)."""
    bits = grid_for(largest, head_room)

    assert largest * head_room < FixedPoint(bits).largest
    assert bits <= MOST_FRACTION_BITS
    assert bits == MOST_FRACTION_BITS or largest * head_room * (1 + 1e-12) >= FixedPoint(bits + 1).largest


@pytest.mark.parametrize("power", [0, 3, 12])
def test_a_power_of_two_fits_its_own_grid(power: int) -> None:
    """The limit itself is already too large, so an activation that is a power of two takes one bit more."""
    grid = FixedPoint(grid_for(2.0**power, 16.0))
    largest = largest_of(grid.encode(torch.tensor([2.0**power * 16])))
    assert largest is not None
    check_largest(grid, largest, "block")


# -- gradients


def _some(of: torch.Tensor, given: bool) -> torch.Tensor | None:
    return of if given else None


@each_coupling
@pytest.mark.parametrize("received", [(True, True), (True, False), (False, True)], ids=["both", "stream", "partner"])
def test_vjp_is_autograd_of_the_plain_equations(coupling: Coupling, received: tuple[bool, bool]) -> None:
    """The step's gradients, written by hand, are those of the step written down."""
    x, p, out = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    grads = [_some(torch.randn(3, 5, dtype=torch.float64), is_there) for is_there in received]
    results = coupling.equations(x, p, out)
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    expected = torch.autograd.grad([r for r, _ in pairs], (x, p, out), [g for _, g in pairs], allow_unused=True)

    for mine, autograds in zip(coupling.vjp(*grads), expected, strict=True):
        zero = torch.zeros_like(x)
        torch.testing.assert_close(zero if mine is None else mine, zero if autograds is None else autograds)


@each_coupling
def test_step_computes_the_equations(coupling: Coupling) -> None:
    """The values of a step are those of the step written down, in floats and on the grid."""
    stream, partner = torch.randn(2, 4, 6, dtype=torch.float64)
    out = branch_of(stream)
    expected = coupling.equations(stream, partner, out)
    for arithmetic, tolerance in ((Floating(), 1e-14), (FixedPoint(20), 2.0**-18)):
        state = State(arithmetic.encode(stream.clone()), arithmetic.encode(partner.clone()))
        coupling.step(state, out, stream, arithmetic)
        for mine, written in zip((state.stream, state.partner), expected, strict=True):
            torch.testing.assert_close(arithmetic.decode(mine, torch.float64), written, rtol=0, atol=tolerance)


@each_coupling
def test_the_first_partner_of_the_oracle_is_the_first_partner(coupling: Coupling) -> None:
    """`plain` without a partner is `plain` with that of the chain's first state, in values and gradients."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    first = coupling.first_partner(x)
    partner = torch.zeros_like(x) if first is None else first

    def gradient(given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        new = coupling.equations(x, given, branch_of(x))
        (grad,) = torch.autograd.grad(new[0].square().sum() + new[1].sum(), x)
        return new[0], grad

    for mine, expected in zip(gradient(None), gradient(partner), strict=True):
        torch.testing.assert_close(mine, expected)


# -- presets


def converted(**options: object) -> object:
    """A hand-written model, converted with these options."""
    return autorev.convert(hand.stack_of(hand.Block), batch=(torch.arange(8)[None],), **options)


@pytest.mark.parametrize("ask", [lambda g: check_dyadic(Fraction(g), "blocks.0"), lambda g: converted(gamma=g)])
def test_a_gamma_that_is_not_dyadic_is_told_which_would_do(ask: Callable[[float], object]) -> None:
    """The message names numbers near it, all of which are"""
    with pytest.raises(ConversionError, match=r"gamma = 0\.1 for blocks\.0.*near it are") as error:
        ask(0.1)
    near = [Fraction(number) for number in str(error.value).rsplit("are ", 1)[1].split(", ")]

    assert Fraction(1, 8) in near
    assert all(abs(number - Fraction(1, 10)) <= Fraction(1, 16) for number in near)
    for number in near:
        ask(float(number))


@pytest.mark.parametrize("gamma", [2.0, -2.0, 1.9999999, 1e-30, -1e-30, 1e6])
def test_what_is_named_beside_a_gamma_would_do(gamma: float) -> None:
    """At the ends of the range and beside zero, too; never the number that is refused."""
    with pytest.raises(ConversionError, match="near it are") as error:
        check_dyadic(Fraction(gamma), "blocks.0")
    for number in str(error.value).rsplit("are ", 1)[1].split(", "):
        check_dyadic(Fraction(number), "blocks.0")
        assert Fraction(number) * Fraction(gamma) > 0


def test_a_gamma_is_shown_with_all_its_digits() -> None:
    """Rounded, it would read as one that is"""
    with pytest.raises(ConversionError, match=r"gamma = 0\.125000001 for"):
        check_dyadic(Fraction(0.125000001), "blocks.0")


@pytest.mark.parametrize("gamma", [4.0, -4.5, 1 / 512])
def test_a_gamma_beyond_the_exact_range_is_refused(gamma: float) -> None:
    """|gamma| < 4 and at most eight side bits."""
    with pytest.raises(ConversionError, match="which exact arithmetic needs"):
        converted(gamma=gamma)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "momentum"])
def test_gamma_is_refused_where_the_coupling_has_its_own(name: str) -> None:
    """leapfrog, midpoint and the rest say so, instead of ignoring the number."""
    with pytest.raises(SettingError, match=name):
        Method(name, gamma=0.5)


def test_gamma_for_leapfrog_is_refused_by_convert() -> None:
    """The message says which coupling takes one."""
    with pytest.raises(ConversionError, match=r"leapfrog has its own gamma; momentum takes gamma=0\.5"):
        converted(method="leapfrog", gamma=0.5)


def test_an_unknown_coupling_is_told_the_names() -> None:
    """All of them are listed."""
    with pytest.raises(ConversionError, match=f"'verlet'.*{', '.join(PRESETS)}"):
        converted(method="verlet")


def test_branches_are_not_switched_off() -> None:
    """c = 0 is refused."""
    with pytest.raises(ConversionError, match="c = 0 for blocks"):
        converted(c=0)


def test_momentum_s_branches_stand_between_too_little_now_and_too_much_in_the_end() -> None:
    """Inside a chain c is half-way between 1 - gamma and 1, for the default and for any other gamma; at its ends 1."""
    for gamma in (None, 0.25, -0.5):
        coupling = coupling_for(PRESETS["momentum"], "blocks.1", 1, 4, gamma, None)
        assert isinstance(coupling, Velocity)
        assert coupling.c == pytest.approx((1 - float(coupling.gamma) + 1) / 2)
        for end in (0, 3):
            assert coupling_for(PRESETS["momentum"], "blocks.0", end, 4, gamma, None).c == 1


def test_midpoint_a_draws_every_step_the_same_way_each_time() -> None:
    """Its random gammas are eighths around 1 and -1, reproducible, and not all the same."""
    drawn = [coupling_for(PRESETS["midpoint_a"], "", number, 32, None, None).gamma for number in range(32)]

    assert drawn == [coupling_for(PRESETS["midpoint_a"], "", number, 32, None, None).gamma for number in range(32)]
    assert all(gamma.denominator <= 8 and 0.5 <= abs(gamma) <= 1.5 for gamma in drawn)
    assert len(set(drawn)) > 8
    assert {gamma > 0 for gamma in drawn} == {True, False}


def test_bdia_is_the_residual_step_in_eval_mode() -> None:
    """In training gamma is 1/2 or -1/2, with c = 1 - gamma; in eval mode the network is as it was."""
    coupling = coupling_for(PRESETS["bdia"], "", 0, 4, None, None)
    assert isinstance(coupling, Bdia)
    draws = {coupling.sample(True, seed) for seed in range(4)}
    assert draws == {Velocity(Fraction(1, 2), 0.5), Velocity(Fraction(-1, 2), 1.5)}

    still = coupling.sample(False, 1)
    x = torch.randn(4)
    assert not still.invertible
    torch.testing.assert_close(still.equations(x, torch.randn(4), branch_of(x))[0], branch_of(x))


@pytest.mark.parametrize("shape", [(2, 7, 3), (13, 2), (5,), (1, 3, 11)])
def test_arithmetic_in_slices_is_that_of_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element once, whatever the axis that is cut, and however it divides."""

    def results() -> list[torch.Tensor]:
        found = []
        for arithmetic in (FixedPoint(16), Floating()):
            stream = arithmetic.encode(value)
            found += [arithmetic.decode(stream, torch.float32)]
            found += [arithmetic.add_branch(stream.clone(), out, value, 0.5)]
            found += [arithmetic.subtract_branch(stream.clone(), out, value, 0.5)]
        return found

    value, out = torch.randn(shape), torch.randn(shape)
    whole = results()
    monkeypatch.setattr("autorev.couplings.arithmetic.SLICE", 2)
    assert all(torch.equal(a, b) for a, b in zip(results(), whole, strict=True))
