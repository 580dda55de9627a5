"""How a model is trained: as it is, by one of PyTorch's ways to save memory, or by a reversible coupling.

A method has one spelling, `NAME` or `NAME:option=value,...`, in Python, on the command line and in records:

    plain  checkpoint  sac  offload  compile[:budget=0.5]
    momentum[:k=3]  leapfrog  midpoint  midpoint_a  bdia  hamiltonian  revnet
        couplings take c=NUMBER, arithmetic=exact|float, granularity=block|sublayer, keep_last=N (else convert
        chooses) and fraction_bits=N; momentum takes k, or gamma = 2^-k
    every one takes loss=full|chunked, all but compile tile=N|auto, and what runs blocks twice keep_last=N and (but
        sac) keep=attention and host=side_bits (of couplings), inputs (of offload, which moves all unless told
        otherwise) or attention (where it is kept), joined by +; each of these for every block or, as in
        attention:8, for so many of each chain

A further coupling is its arithmetic and its numbers in `autorev/couplings/`, and one line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from autorev.couplings.presets import PRESERVING_GAMMA, PRESETS, Preset
from autorev.errors import SettingError
from autorev.given import is_count, is_number, wrong_number
from autorev.keeps import KEPT, MOVED, Keeps, amounts_of, keeps_at, text_of

Numbers = float | Mapping[str, float] | None
"""One number for all blocks, or a number per pattern of block paths."""
MOST_FRACTION_BITS = 30
"""Fraction bits that may be asked for."""
DEFAULT = ("plain", "checkpoint", "momentum:k=3", "momentum:k=3,loss=chunked")
ALL = (
    *("plain", "checkpoint", "sac", "offload", "compile:budget=0.5"),
    *("momentum:k=3", "momentum:k=2", "momentum:k=1", "leapfrog", "midpoint", "hamiltonian"),
    *("momentum:k=3,keep_last=4", "plain:loss=chunked", "checkpoint:loss=chunked", "momentum:k=3,loss=chunked"),
)
TILES = ":tile=auto"
PREDICTED = (
    *("plain", "checkpoint", f"checkpoint{TILES}", "offload", "momentum", f"momentum{TILES}"),
    *(name for name in PRESETS if name != "momentum"),
)
"""Those that an analysis compares, as it calls them (`Method.known_as`)."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is said of a method of some name, and how it is drawn."""

    title: str
    meaning: str
    """One sentence."""
    source: str
    """What it does in PyTorch's terms, or the paper."""
    light: str
    """Its colour on light paper."""
    dark: str
    """Its colour on dark paper."""
    symbol: str
    """Of its points, by plotly's name."""
    dash: str
    """Of its lines, likewise."""


def _coupling(name: str, *look: str) -> Known:
    return Known(name, PRESETS[name].meaning, PRESETS[name].source, *look)


METHODS: dict[str, Known] = {
    "plain": Known(
        "plain autograd",
        "PyTorch as it is: every block keeps what its backward pass needs.",
        "torch autograd keeps every activation",
        *("#16181d", "#f0f1f4", "circle", "solid"),
    ),
    "checkpoint": Known(
        "activation checkpointing",
        "Every block keeps only its input, and runs once more in the backward pass.",
        "torch.utils.checkpoint around every block",
        *("#0b5cc4", "#3a8df0", "square", "solid"),
    ),
    "sac": Known(
        "selective activation checkpointing",
        "Checkpointing that also keeps what attention and every other matrix product computed.",
        "checkpoint that keeps attention outputs and every other matrix product (torch's selective checkpointing)",
        *("#7724f3", "#7555f6", "hexagon", "dash"),
    ),
    "compile": Known(
        "torch.compile's memory budget",
        "Every block compiled by torch.compile, which decides within a memory budget what to keep.",
        "torch.compile of every block with an activation memory budget",
        *("#194c38", "#aed279", "hourglass", "dot"),
    ),
    "offload": Known(
        "offloaded checkpointing",
        "Checkpointing, with the kept inputs in host memory.",
        "checkpoint, with the blocks' inputs moved to the host",
        *("#4fbcf5", "#a4dafc", "square-open", "dash"),
    ),
    "momentum": _coupling("momentum", "#d55e00", "#f07a30", "diamond", "solid"),
    "leapfrog": _coupling("leapfrog", "#189c5b", "#22c084", "triangle-up", "solid"),
    "midpoint": _coupling("midpoint", "#f5b000", "#f9d648", "triangle-down", "dash"),
    "midpoint_a": _coupling("midpoint_a", "#7a3e11", "#a8683f", "triangle-down-open", "dot"),
    "bdia": _coupling("bdia", "#c06bb4", "#ee86c0", "cross", "dashdot"),
    "hamiltonian": _coupling("hamiltonian", "#561a7d", "#9c66ba", "star", "solid"),
    "revnet": _coupling("revnet", "#85807f", "#767b83", "star-open", "dash"),
}
"""Colours stay apart as those of `report/palette.py` do."""
BASELINES = tuple(name for name in METHODS if name not in PRESETS)
"""What PyTorch can do without a reversible coupling."""


@dataclass(frozen=True)
class Method:
    """One way to train a model. `str(method)` is its spelling, which `parse` reads; numbers by block and grids by chain
    have none, and are given as arguments.

    Raises:
        SettingError: there is no method of that name, or an option makes no sense.
    """

    name: str
    loss: str = "full"
    """full, or chunked: the logits of a vocabulary are never held at once (`autorev.chunk_loss`)."""
    gamma: Numbers = None
    """Of momentum: a number n / 2^k, or one per pattern of block paths."""
    c: Numbers = None
    """The factor of the branches, likewise; None: the coupling's own."""
    arithmetic: str = "exact"
    """exact (int32 fixed point and side bits) or float."""
    granularity: str = "block"
    """block, or sublayer for a step per residual add."""
    keep_last: int | tuple[int, ...] | Literal["auto"] = "auto"
    """Blocks at the end of each chain whose activations are stored instead of recomputed: of all alike, or one by one;
    auto: as many as do not raise the peak, and none without a coupling."""
    fraction_bits: int | Mapping[str, int] | None = None
    """The fixed-point grid is 2^-fraction_bits, of all chains or by a chain's name; None: fitted by a probe."""
    budget: float | None = None
    """Of compile: the share of the activations that may be kept."""
    tile: int | Literal["auto"] | None = None
    """Positions at a time that the parts of a block run on which act on each position alone (`detect/tokenwise.py`);
    auto: as many as keep little beside a block's input. None: all."""
    keep: str | None = None
    """attention: what its kernel returned is kept, and not computed again in backward; attention:N of N blocks."""
    host: str | None = None
    """What waits on the host for backward (`keeps.MOVED`), of all blocks or of N. None: nothing; of offload, inputs."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in METHODS:
            raise SettingError(f"there is no method {self.name!r}; choose of {', '.join(METHODS)}")
        if self.reversible and (self.gamma is not None or self.c is not None):
            if self.preset.two_streams:
                raise SettingError(f"{self.name} has neither gamma nor c; leave them out")
            if self.name != "momentum" and self.gamma is not None:
                raise SettingError(f"{self.name} has its own gamma; momentum takes gamma={self.gamma}")
        for field in fields(self)[1:]:
            if field.name not in _options(self.name) and getattr(self, field.name) != field.default:
                raise SettingError(f"{self.name} has no {field.name}; it takes {', '.join(_options(self.name))}")
        self._read_amounts()
        for option, values in _CHOICES.items():
            if getattr(self, option) not in values and getattr(self, option) is not None:
                one = " or ".join(map(repr, values))
                raise SettingError(f"{option} of {self.name} is {one}, not {getattr(self, option)!r}")
        if isinstance(self.keep_last, list):  # of a config
            object.__setattr__(self, "keep_last", tuple(self.keep_last))
        if self.name == "momentum" and self.gamma is None:
            object.__setattr__(self, "gamma", float(self.preset.gamma or 0))
        if self.name == "compile":
            object.__setattr__(self, "budget", 0.5 if self.budget is None else self.budget)
            if not (is_number(self.budget) and 0 <= (self.budget or 0) <= 1):
                raise SettingError(f"budget of compile is a share of 0 to 1, not {self.budget}")
        if self.tile is not None and self.tile != "auto" and not is_count(self.tile, 1):
            raise SettingError(f"tile is 'auto' or a number of positions, 1 or more, not {self.tile!r}")
        stored = self.keep_last if isinstance(self.keep_last, tuple) else (self.keep_last,)
        if stored != ("auto",) and not all(is_count(number, 0) for number in stored):
            raise SettingError(f"keep_last is 'auto' or a number of blocks, 0 or more, not {self.keep_last!r}")
        if self.reversible:
            self._check_conversion()

    def _read_amounts(self) -> None:
        for option, known in (("keep", KEPT), ("host", _moved(self.name))):
            given = getattr(self, option)
            try:
                amounts = amounts_of(given, known)
            except (ValueError, AttributeError):
                several = "" if len(known) == 1 else ", or several joined by +"
                raise SettingError(
                    f"{option} of {self.name} is {' or '.join(map(repr, known))}{several}, not {given!r}; "
                    f"'{known[-1]}:8' is of 8 blocks of each chain"
                ) from None
            if option == "host" and "attention" in amounts and self.keep is None:
                raise SettingError(f"{self.name} keeps no attention that the host could hold; add keep=attention")
            if self.name == "offload" and amounts.get("inputs", 0) is None:
                del amounts["inputs"]  # as usual
            object.__setattr__(self, option, text_of(amounts))

    def _check_conversion(self) -> None:
        for option in ("gamma", "c"):
            check_numbers(option, getattr(self, option))
        if self.fraction_bits is not None and self.arithmetic == "float":
            raise SettingError("fraction_bits belongs to arithmetic='exact'; leave it out")
        moves_bits = "side_bits" in amounts_of(self.host, MOVED)
        if moves_bits and (self.arithmetic == "float" or not self.preset.keeps_side_bits):
            raise SettingError(f"{self.spec} keeps no side bits that the host could hold; leave host= out")
        bits = self.fraction_bits
        for number in bits.values() if isinstance(bits, Mapping) else (bits,):
            if number is not None and not (is_count(number, 0) and number <= MOST_FRACTION_BITS):
                raise SettingError(
                    f"fraction_bits is a whole number between 0 and {MOST_FRACTION_BITS}, not {number!r}"
                )

    @classmethod
    def parse(cls, text: str) -> Method:
        """The method that `text` spells.

        Raises:
            SettingError: it names none, or has an option that makes no sense.
        """
        if not isinstance(text, str):
            raise SettingError(f"a method is named by text, such as momentum:k=3, not {text!r}")
        name, _, rest = text.strip().partition(":")
        if name not in METHODS:
            raise SettingError(f"there is no method {name!r}; choose of {', '.join(METHODS)}, or `all` or `default`")
        read = {**_READ, **({"k": _power} if name == "momentum" else {})}
        allowed = [option for option in read if option in (*_options(name), "k")]
        options: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            option, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or option not in allowed:
                raise SettingError(f"the method {name} has no option {part!r}; it takes {', '.join(allowed)}")
            if option in options:
                raise SettingError(f"the method {text} gives {option} twice; leave one out")
            try:
                options[option] = read[option](value)
            except ValueError:
                what = "whole number" if read[option] in (int, _count, _power) else "number"
                raise SettingError(f"{option} of the method {name} is a {what}, not {value!r}") from None
        if "k" in options:
            if "gamma" in options:
                raise SettingError("momentum takes k or gamma = 2^-k, not both")
            options["gamma"] = options.pop("k")
        if name == "momentum" and not 0 < abs(options.get("gamma", 0.125)) < 2:
            raise SettingError(f"gamma of the method momentum is between -2 and 2 and not 0, not {options['gamma']:g}")
        return cls(name, **options)

    def __str__(self) -> str:
        said = ",".join((*self._said(), *(["loss=chunked"] if self.loss == "chunked" else [])))
        return f"{self.name}:{said}" if said else self.name

    def _said(self) -> list[str]:
        """The options that are not what they usually are, as `parse` reads them; the loss is not among them."""
        said = []
        if self.name == "momentum":
            power = next((k for k in range(1, 8) if self.gamma == 2.0**-k), None)
            said.append(f"gamma={_shortest(self.gamma)}" if power is None else f"k={power}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "loss", "gamma") and value != field.default:
                said.append(f"{field.name}={_shortest(value)}")
        return said

    @property
    def title(self) -> str:
        """`momentum k=3, keep_last=20, chunked loss`."""
        title = f"{self.name} {', '.join(self._said())}".strip()
        return f"{title}, chunked loss" if self.loss == "chunked" else title

    @property
    def spec(self) -> str:
        """Its one spelling: options in order, those that are as usual left out."""
        return str(self)

    @property
    def known_as(self) -> str:
        """What an analysis calls it, which predicts one of each name with and without tiles."""
        return self.name if self.tile is None else f"{self.name}{TILES}"

    @property
    def known(self) -> Known:
        """What is said of it."""
        return METHODS[self.name]

    @property
    def reversible(self) -> bool:
        """Does a coupling rebuild the activations?"""
        return self.name in PRESETS

    @property
    def preset(self) -> Preset:
        """The numbers of its coupling; of a reversible one only."""
        return PRESETS[self.name]

    @property
    def in_pieces(self) -> bool:
        """Is a step less than a block?"""
        return self.reversible and (self.granularity == "sublayer" or self.preset.two_streams)

    @property
    def tiles_attention(self) -> bool:
        """Is attention tiled, too, in the blocks that run twice? Not where what it computes is kept for the second."""
        run_twice = self.reversible or self.name in ("checkpoint", "offload")
        return self.tile is not None and run_twice and self.keep is None

    @property
    def preserves_function(self) -> bool:
        """Does a pretrained model compute what it did?"""
        if not self.reversible:
            return True
        gammas = self.gamma.values() if isinstance(self.gamma, Mapping) else (self.gamma,)
        return self.name == "momentum" and all(abs(gamma or 0) <= PRESERVING_GAMMA for gamma in gammas)

    def stored_of(self, chain: int) -> int:
        """Blocks at the end of the chain of that number that are stored; `keep_last` is settled."""
        stored = self.keep_last[chain] if isinstance(self.keep_last, tuple) else self.keep_last
        return 0 if stored == "auto" else stored

    def keeps(self, position: int, recomputed: int) -> Keeps:
        """What the block at `position` of a chain keeps, of which so many are run twice; those behind are stored."""
        moved = amounts_of(self.host, MOVED)
        if self.name == "offload":
            moved.setdefault("inputs", None)
        return keeps_at(position, recomputed, amounts_of(self.keep, KEPT), moved)

    @property
    def of_all_blocks(self) -> Method:
        """The same, but what is said of so many blocks (`attention:8`) is said of all."""
        keep, host = dict.fromkeys(amounts_of(self.keep, KEPT)), dict.fromkeys(amounts_of(self.host, MOVED))
        return replace(self, keep=text_of(keep), host=text_of(host))

    def gamma_of(self, path: str) -> float | None:
        """gamma of the block at `path`; None: the coupling's own."""
        return number_for(self.gamma, path)

    def c_of(self, path: str) -> float | None:
        """c of the block at `path`; None: the coupling's own."""
        return number_for(self.c, path)


def parse_methods(texts: str | Iterable[str]) -> list[Method]:
    """The methods that `texts` spell, each once, in order; `all` stands for `ALL` and `default` for `DEFAULT`.

    Raises:
        SettingError: one spells none, or there is none.
    """
    if not isinstance(texts, Iterable):
        raise SettingError(f"methods are named by text, or a list of it, not {texts!r}")
    expanded: list[str] = []
    for text in [texts] if isinstance(texts, str) else texts:
        expanded += {"all": ALL, "default": DEFAULT}.get(text, (text,))
    if not expanded:
        raise SettingError("there is no method to run; name one, or `default`, or `all`")
    return list({str(method): method for method in map(Method.parse, expanded)}.values())


def check_numbers(name: str, given: Numbers) -> None:
    """Raise unless `given` may be the gamma, or the c, of a coupling.

    Raises:
        SettingError: it is no number, nor a dict of them.
    """
    if wrong := wrong_number(given):
        raise SettingError(f"{name} is {wrong}")


def number_for(numbers: Numbers, path: str) -> float | None:
    """The number of a block; None: no pattern matches it, or there are none."""
    if not isinstance(numbers, Mapping):
        return numbers
    return next((number for pattern, number in numbers.items() if fnmatchcase(path, pattern)), None)


def _options(name: str) -> tuple[str, ...]:
    """The options that a method of that name takes."""
    if name in PRESETS:
        numbers = () if PRESETS[name].two_streams else ("gamma", "c") if name == "momentum" else ("c",)
        return ("loss", *numbers, "arithmetic", "granularity", "keep_last", "fraction_bits", "tile", "keep", "host")
    others = {"compile": ("loss", "budget"), "plain": ("loss", "tile"), "sac": ("loss", "keep_last", "tile")}
    return others.get(name, ("loss", "keep_last", "tile", "keep", "host"))


def _moved(name: str) -> tuple[str, ...]:
    """What such a method has that the host could hold."""
    own = ("side_bits",) if name in PRESETS else ("inputs",) if name == "offload" else ()
    return (*own, "attention")


_CHOICES: dict[str, tuple[str, ...]] = {
    "loss": ("full", "chunked"),
    "arithmetic": ("exact", "float"),
    "granularity": ("block", "sublayer"),
}


def _power(text: str) -> float:
    if not 1 <= (k := int(text)) <= 7:
        raise SettingError(f"k of the method momentum is 1 to 7, not {k}")
    return float(2.0**-k)


def _count(text: str) -> int | str:
    return text if text == "auto" else int(text)


_READ: dict[str, Callable[[str], Any]] = {
    "loss": str,
    "gamma": float,
    "c": float,
    "arithmetic": str,
    "granularity": str,
    "keep_last": _count,
    "fraction_bits": int,
    "budget": float,
    "tile": _count,
    "keep": str,
    "host": str,
}
"""How the text of an option is read."""


def _shortest(value: Any) -> str:
    """The shortest text that is read as the same value."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return text if float(text) == value else repr(value)
