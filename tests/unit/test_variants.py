"""The names of a profile's variants: canonical forms, titles, what they promise, and errors."""

from __future__ import annotations

import pytest

from autorev.errors import SettingError
from autorev.variants import ALL, DEFAULT, coupling_options, keep_last, parse_variant, parse_variants

COUPLINGS = ("momentum", "leapfrog", "midpoint", "midpoint_a", "bdia", "hamiltonian", "revnet")


@pytest.mark.parametrize("spec", [*ALL, *COUPLINGS[2:], "momentum:gamma=0.9921875", "leapfrog:granularity=sublayer"])
def test_a_spec_is_its_own_canonical_form(spec: str) -> None:
    """What a variant calls itself names the same variant again, so that a record can be gone on with."""
    variant = parse_variant(spec)
    assert variant.spec == spec
    assert parse_variant(variant.spec) == variant
    assert variant.strategy == spec.partition(":")[0]
    assert variant.note


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
def test_the_same_variant_has_one_spec(given: str, canonical: str) -> None:
    """Order, defaults and spellings of a number make no second variant."""
    assert parse_variant(given).spec == canonical
    assert parse_variants([given, canonical]) == [parse_variant(canonical)]


def test_titles_are_what_a_person_reads() -> None:
    """Name, options, and the loss where it is chunked."""
    titles = {spec: parse_variant(spec).title for spec in ("plain", "momentum:k=3,keep_last=4", "plain:loss=chunked")}
    assert titles == {
        "plain": "plain",
        "momentum:k=3,keep_last=4": "momentum k=3, keep_last=4",
        "plain:loss=chunked": "plain, chunked loss",
    }
    assert parse_variant("compile:budget=0.25,loss=chunked").title == "compile budget=0.25, chunked loss"
    assert len({variant.title for variant in parse_variants(["all"])}) == len(ALL)


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
    variant = parse_variant(spec)
    assert variant.preserves_function is preserves
    assert variant.reversible is (variant.strategy in COUPLINGS)


def test_conversion_gets_what_the_spec_says() -> None:
    """Every option reaches `convert` under its own name, without rounding."""
    variant = parse_variant("momentum:gamma=0.9921875,arithmetic=float,granularity=sublayer,keep_last=7")
    assert coupling_options(variant) == {
        "coupling": "momentum",
        "gamma": 0.9921875,
        "arithmetic": "float",
        "granularity": "sublayer",
        "keep_last": 7,
    }
    assert coupling_options(parse_variant("leapfrog")) == {"coupling": "leapfrog", "keep_last": "auto"}
    assert keep_last(parse_variant("momentum:keep_last=0")) == 0


def test_groups_stand_for_their_variants_and_none_comes_twice() -> None:
    """`all` holds `default`, in order; one string is one spec; nothing at all is refused."""
    assert [v.spec for v in parse_variants(["all"])] == list(ALL)
    assert [v.spec for v in parse_variants(["default"])] == list(DEFAULT)
    assert [v.spec for v in parse_variants("leapfrog")] == ["leapfrog"]
    assert [v.spec for v in parse_variants(["sac", "default", "all"])][:3] == ["sac", *DEFAULT[:2]]
    assert len(parse_variants(["sac", "default", "all"])) == len(ALL)
    with pytest.raises(SettingError, match=r"no variant to run; name one, or `default`, or `all`"):
        parse_variants([])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "there is no variant ''; choose of plain, checkpoint, sac, .*momentum.* or `all` or `default`"),
        ("momentun", "there is no variant 'momentun'; choose of plain"),
        ("plain:k=3", "plain has no option 'k=3'; it takes loss$"),
        ("plain:loss", "plain has no option 'loss'; it takes loss$"),
        ("leapfrog:gamma=1", "leapfrog has no option 'gamma=1'; it takes loss, arithmetic, granularity, keep_last"),
        ("sac:budget=1", "sac has no option 'budget=1'"),
        ("plain:loss=half", "loss of the variant plain is full or chunked, not 'half'"),
        ("momentum:arithmetic=int", "arithmetic of the variant momentum is exact or float, not 'int'"),
        ("momentum:granularity=", "granularity of the variant momentum is block or sublayer, not ''"),
        ("momentum:k=", "k of the variant momentum is a whole number, not ''"),
        ("momentum:k=2.5", "k of the variant momentum is a whole number, not '2.5'"),
        ("momentum:k=0", "k of the variant momentum is 1 to 7, not 0"),
        ("momentum:k=8", "k of the variant momentum is 1 to 7, not 8"),
        ("momentum:k=1,gamma=0.5", "momentum takes k or gamma = 2\\^-k, not both"),
        ("momentum:k=1,k=2", "gives k twice; leave one out"),
        ("momentum:gamma=much", "gamma of the variant momentum is a number, not 'much'"),
        ("momentum:gamma=0", "gamma of the variant momentum is between -2 and 2 and not 0, not 0"),
        ("momentum:gamma=nan", "gamma of the variant momentum is between -2 and 2 and not 0, not nan"),
        ("bdia:keep_last=-1", "keep_last of the variant bdia is auto, or 0 or more, not -1"),
        ("bdia:keep_last=many", "keep_last of the variant bdia is a whole number, not 'many'"),
        ("compile:budget=7", "budget of the variant compile is a share of 0 to 1, not 7"),
        ("compile:budget=nan", "budget of the variant compile is a share of 0 to 1, not nan"),
    ],
)
def test_an_error_names_the_option_and_the_remedy(spec: str, words: str) -> None:
    """One line that says what was given, and what would do."""
    with pytest.raises(SettingError, match=words) as caught:
        parse_variant(spec)
    assert "\n" not in str(caught.value)


def test_the_grid_is_part_of_the_spec() -> None:
    """Where the chosen grid has no room, the user names one; it reaches `convert`, and tells two variants apart."""
    variant = parse_variant("midpoint_a:fraction_bits=8,keep_last=auto")
    assert variant.spec == "midpoint_a:fraction_bits=8"
    assert variant.title == "midpoint_a fraction_bits=8"
    assert coupling_options(variant)["fraction_bits"] == 8
    assert "fraction_bits" not in coupling_options(parse_variant("midpoint_a"))
    with pytest.raises(SettingError, match="fraction_bits of the variant midpoint_a is a whole number, not 'few'"):
        parse_variant("midpoint_a:fraction_bits=few")
