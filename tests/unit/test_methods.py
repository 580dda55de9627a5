"""The names of a profile's methods: canonical forms, titles, what they promise, and errors."""

from __future__ import annotations

import pytest

from autorev.errors import SettingError
from autorev.methods import ALL, DEFAULT, Method, parse_methods

COUPLINGS = ("momentum", "leapfrog", "midpoint", "midpoint_a", "bdia", "hamiltonian", "revnet")


@pytest.mark.parametrize("spec", [*ALL, *COUPLINGS[2:], "momentum:gamma=0.9921875", "leapfrog:granularity=sublayer"])
def test_a_spec_is_its_own_canonical_form(spec: str) -> None:
    """What a method calls itself names the same method again, so that a record can be gone on with."""
    method = Method.parse(spec)
    assert str(method) == spec
    assert Method.parse(str(method)) == method
    assert method.name == spec.partition(":")[0]
    assert method.known.source


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        (" plain ", "plain"),
        ("plain:loss=full", "plain"),
        ("compile", "compile:budget=0.5"),
        ("compile:budget=1.0", "compile:budget=1"),
        ("momentum", "momentum:k=3"),
        ("momentum:gamma=0.25", "momentum:k=2"),
        ("momentum:loss=chunked,keep_last=04,k=2", "momentum:k=2,keep_last=4,loss=chunked"),
        ("momentum:arithmetic=exact,granularity=block,keep_last=auto", "momentum:k=3"),
        ("momentum:keep_last=1", "momentum:k=3,keep_last=1"),
        ("leapfrog:keep_last=0,arithmetic=float", "leapfrog:arithmetic=float,keep_last=0"),
    ],
)
def test_the_same_method_has_one_spec(given: str, canonical: str) -> None:
    """Order, defaults and spellings of a number make no second method."""
    assert str(Method.parse(given)) == canonical
    assert parse_methods([given, canonical]) == [Method.parse(canonical)]


def test_titles_are_what_a_person_reads() -> None:
    """Name, options, and the loss where it is chunked."""
    titles = {spec: Method.parse(spec).title for spec in ("plain", "momentum:k=3,keep_last=4", "plain:loss=chunked")}
    assert titles == {
        "plain": "plain",
        "momentum:k=3,keep_last=4": "momentum k=3, keep_last=4",
        "plain:loss=chunked": "plain, chunked loss",
    }
    assert Method.parse("compile:budget=0.25,loss=chunked").title == "compile budget=0.25, chunked loss"
    assert len({method.title for method in parse_methods(["all"])}) == len(ALL)


@pytest.mark.parametrize(
    ("spec", "preserves"),
    [
        *((spec, True) for spec in ("plain", "checkpoint", "sac", "offload", "compile", "plain:loss=chunked")),
        *((f"momentum:{g}", True) for g in ("k=3", "k=7", "gamma=0.0625", "gamma=-0.125", "gamma=0.1")),
        *((f"momentum:{g}", False) for g in ("k=2", "k=1", "gamma=0.13", "gamma=-0.5", "gamma=1")),
        *((name, False) for name in COUPLINGS[1:]),
    ],
)
def test_only_a_small_gamma_keeps_a_pretrained_function(spec: str, preserves: bool) -> None:
    """Whatever PyTorch does by itself keeps the function; of the couplings only momentum up to 1/8."""
    method = Method.parse(spec)
    assert method.preserves_function is preserves
    assert method.reversible is (method.name in COUPLINGS)


def test_a_spec_says_every_option() -> None:
    """Each under its own name, without rounding."""
    method = Method.parse("momentum:gamma=0.9921875,c=0.3,arithmetic=float,granularity=sublayer,keep_last=7")
    how = {"gamma": 0.9921875, "c": 0.3, "arithmetic": "float", "granularity": "sublayer", "keep_last": 7}
    assert method == Method("momentum", **how)
    assert Method.parse(str(method)) == method
    assert Method.parse("leapfrog").keep_last == "auto"
    assert Method.parse("momentum:keep_last=0").keep_last == 0


def test_groups_stand_for_their_methods_and_none_comes_twice() -> None:
    """`all` holds `default`, in order; one string is one spec; nothing at all is refused."""
    assert [str(v) for v in parse_methods(["all"])] == list(ALL)
    assert [str(v) for v in parse_methods(["default"])] == list(DEFAULT)
    assert [str(v) for v in parse_methods("leapfrog")] == ["leapfrog"]
    assert [str(v) for v in parse_methods(["sac", "default", "all"])][:3] == ["sac", *DEFAULT[:2]]
    assert len(parse_methods(["sac", "default", "all"])) == len(ALL)
    with pytest.raises(SettingError, match=r"no method to run; name one, or `default`, or `all`"):
        parse_methods([])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "there is no method ''; choose of plain, checkpoint, sac, .*momentum.* or `all` or `default`"),
        ("momentun", "there is no method 'momentun'; choose of plain"),
        ("plain:k=3", "plain has no option 'k=3'; it takes loss, tile$"),
        ("plain:loss", "plain has no option 'loss'; it takes loss, tile$"),
        ("leapfrog:gamma=1", "leapfrog has no option 'gamma=1'; it takes loss, c, arithmetic, granularity, keep_last"),
        ("sac:budget=1", "sac has no option 'budget=1'"),
        ("plain:loss=half", "loss of plain is 'full' or 'chunked', not 'half'"),
        ("momentum:arithmetic=int", "arithmetic of momentum is 'exact' or 'float', not 'int'"),
        ("momentum:granularity=", "granularity of momentum is 'block' or 'sublayer', not ''"),
        ("momentum:k=", "k of the method momentum is a whole number, not ''"),
        ("momentum:k=2.5", "k of the method momentum is a whole number, not '2.5'"),
        ("momentum:k=0", "k of the method momentum is 1 to 7, not 0"),
        ("momentum:k=8", "k of the method momentum is 1 to 7, not 8"),
        ("momentum:k=1,gamma=0.5", "momentum takes k or gamma = 2\\^-k, not both"),
        ("momentum:k=1,k=2", "gives k twice; leave one out"),
        ("momentum:gamma=much", "gamma of the method momentum is a number, not 'much'"),
        ("momentum:gamma=0", "gamma of the method momentum is between -2 and 2 and not 0, not 0"),
        ("momentum:gamma=nan", "gamma of the method momentum is between -2 and 2 and not 0, not nan"),
        ("bdia:keep_last=-1", "keep_last is 'auto' or a number of blocks, 0 or more, not -1"),
        ("bdia:keep_last=many", "keep_last of the method bdia is a whole number, not 'many'"),
        ("compile:budget=7", "budget of compile is a share of 0 to 1, not 7"),
        ("compile:budget=nan", "budget of compile is a share of 0 to 1, not nan"),
    ],
)
def test_an_error_names_the_option_and_the_remedy(spec: str, words: str) -> None:
    """One line that says what was given, and what would do."""
    with pytest.raises(SettingError, match=words) as caught:
        Method.parse(spec)
    assert "\n" not in str(caught.value)


def test_the_grid_is_part_of_the_spec() -> None:
    """Where the chosen grid has no room, the user names one; it reaches `convert`, and tells two methods apart."""
    method = Method.parse("midpoint_a:fraction_bits=8,keep_last=auto")
    assert str(method) == "midpoint_a:fraction_bits=8"
    assert method.title == "midpoint_a fraction_bits=8"
    assert method.fraction_bits == 8
    assert Method.parse("midpoint_a").fraction_bits is None
    with pytest.raises(SettingError, match="fraction_bits of the method midpoint_a is a whole number, not 'few'"):
        Method.parse("midpoint_a:fraction_bits=few")
