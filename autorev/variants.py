"""The ways to train a model that a profile compares, by name.

A method is written `NAME` or `NAME:option=value,...`:

    plain  checkpoint  sac  offload  compile[:budget=0.5]
    momentum[:k=3]  leapfrog  midpoint  midpoint_a  bdia  hamiltonian  revnet
        couplings take arithmetic=exact|float, granularity=block|sublayer, keep_last=N (else convert chooses),
        fraction_bits=N; momentum takes k or gamma
    every one takes loss=full|chunked
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from autorev.couplings.presets import PRESERVING_GAMMA, PRESETS
from autorev.errors import SettingError

BASELINES = {
    "plain": "torch autograd keeps every activation",
    "checkpoint": "torch.utils.checkpoint around every block",
    "sac": "checkpoint that keeps attention outputs and every other matrix product (torch's selective checkpointing)",
    "offload": "checkpoint, with the blocks' inputs moved to the host",
    "compile": "torch.compile of every block with an activation memory budget",
}
DEFAULT = ("plain", "checkpoint", "momentum:k=3", "momentum:k=3,loss=chunked")
ALL = (
    *("plain", "checkpoint", "sac", "offload", "compile:budget=0.5"),
    *("momentum:k=3", "momentum:k=2", "momentum:k=1", "leapfrog", "midpoint", "hamiltonian"),
    *("momentum:k=3,keep_last=4", "plain:loss=chunked", "checkpoint:loss=chunked", "momentum:k=3,loss=chunked"),
)
_USUAL = {"arithmetic": "exact", "granularity": "block", "keep_last": "auto"}
"""What a spec leaves out, so that the same method has the same spec."""
_COUPLING_OPTIONS = ("k", "gamma", *_USUAL, "fraction_bits")


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train the model."""

    spec: str
    """What was asked for, in its canonical form: `momentum:k=3,keep_last=20`; unique in a profile."""
    method: str
    """plain, checkpoint, sac, offload, compile, or the name of a coupling."""
    title: str
    """`momentum k=3, keep_last=20`."""
    loss: str
    """full or chunked."""
    reversible: bool
    preserves_function: bool
    """Does a pretrained model compute what it did?"""
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Request:
    """A parsed spec."""

    name: str
    options: dict[str, str]

    def number(self, key: str, kind: Callable[[str], Any], default: Any = None) -> Any:
        if key not in self.options:
            return default
        try:
            return kind(self.options[key])
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise SettingError(f"{key} of the method {self.name} is a {what}, not {self.options[key]!r}") from None


def parse_methods(specs: Iterable[str]) -> list[Method]:
    """The methods of `specs`, each once, in order; `all` stands for `ALL` and `default` for `DEFAULT`.

    Raises:
        SettingError: a spec is not of the form above, or there is none.
    """
    expanded: list[str] = []
    for spec in [specs] if isinstance(specs, str) else specs:
        expanded += {"all": ALL, "default": DEFAULT}.get(spec, (spec,))
    if not expanded:
        raise SettingError("there is no method to run; name one, or `default`, or `all`")
    return list({v.spec: v for v in map(parse_method, expanded)}.values())


def parse_method(spec: str) -> Method:
    """The method that `spec` names.

    Raises:
        SettingError: it names none, or has an option that makes no sense.
    """
    request = _parse(spec)
    name, options = request.name, request.options
    loss = options.get("loss", "full")
    parts = []
    if name == "momentum":
        gamma = _gamma(request)
        k = _exponent(gamma)
        parts.append(f"k={k}" if k is not None else f"gamma={_shortest(gamma)}")
    if name == "compile":
        parts.append(f"budget={_shortest(_budget(request))}")
    for key, usual in _USUAL.items():
        value = _keep_last(request) if key == "keep_last" else options.get(key, usual)
        parts += [f"{key}={value}"] if value != usual else []
    bits = request.number("fraction_bits", int)
    parts += [] if bits is None else [f"fraction_bits={bits}"]
    title = f"{name} {', '.join(parts)}".strip() + (", chunked loss" if loss == "chunked" else "")
    shown = [*parts, *(["loss=chunked"] if loss == "chunked" else [])]
    reversible = name in PRESETS
    return Method(
        spec=name + (f":{','.join(shown)}" if shown else ""),
        method=name,
        title=title,
        loss=loss,
        reversible=reversible,
        preserves_function=not reversible or (name == "momentum" and abs(_gamma(request)) <= PRESERVING_GAMMA),
        note=BASELINES.get(name) or PRESETS[name].source,
    )


def coupling_options(method: Method) -> dict[str, Any]:
    """What `autorev.convert` is called with for a reversible method."""
    request = _parse(method.spec)
    how: dict[str, Any] = {"coupling": request.name}
    if request.name == "momentum":
        how["gamma"] = _gamma(request)
    for key in ("arithmetic", "granularity"):
        if key in request.options:
            how[key] = request.options[key]
    how["keep_last"] = keep_last(method)
    if "fraction_bits" in request.options:
        how["fraction_bits"] = request.number("fraction_bits", int)
    return how


def compile_budget(method: Method) -> float:
    """The share of the activations that torch.compile may keep."""
    return _budget(_parse(method.spec))


def keep_last(method: Method) -> int | Literal["auto"]:
    """How many blocks at the end of each chain a reversible method stores."""
    return _keep_last(_parse(method.spec))


def _parse(spec: str) -> _Request:
    if not isinstance(spec, str):
        raise SettingError(f"a method is named by text, such as momentum:k=3, not {spec!r}")
    name, _, rest = spec.strip().partition(":")
    known = [*BASELINES, *PRESETS]
    if name not in known:
        raise SettingError(f"there is no method {name!r}; choose of {', '.join(known)}, or `all` or `default`")
    options: dict[str, str] = {}
    allowed = ["loss", *(_COUPLING_OPTIONS if name in PRESETS else []), *(["budget"] if name == "compile" else [])]
    if name in PRESETS and name != "momentum":
        allowed = [key for key in allowed if key not in ("k", "gamma")]
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise SettingError(f"the method {name} has no option {part!r}; it takes {', '.join(allowed)}")
        if key in options:
            raise SettingError(f"the method {spec} gives {key} twice; leave one out")
        options[key] = value
    choices = {"loss": ("full", "chunked"), "arithmetic": ("exact", "float"), "granularity": ("block", "sublayer")}
    for key, values in choices.items():
        if options.get(key, values[0]) not in values:
            raise SettingError(f"{key} of the method {name} is {' or '.join(values)}, not {options[key]!r}")
    request = _Request(name, options)
    stored = _keep_last(request)
    if stored != "auto" and stored < 0:
        raise SettingError(f"keep_last of the method {name} is auto, or 0 or more, not {options['keep_last']}")
    return request


def _keep_last(request: _Request) -> int | Literal["auto"]:
    if request.options.get("keep_last", "auto") == "auto":
        return "auto"
    stored: int = request.number("keep_last", int)
    return stored


def _gamma(request: _Request) -> float:
    if "k" in request.options and "gamma" in request.options:
        raise SettingError("momentum takes k or gamma = 2^-k, not both")
    k = request.number("k", int)
    if k is not None and not 1 <= k <= 7:
        raise SettingError(f"k of the method momentum is 1 to 7, not {k}")
    gamma: float = 2.0**-k if k is not None else request.number("gamma", float, 0.125)
    if not 0 < abs(gamma) < 2:
        raise SettingError(f"gamma of the method momentum is between -2 and 2 and not 0, not {gamma:g}")
    return gamma


def _shortest(number: float) -> str:
    """The shortest text that is read as the same number."""
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


def _exponent(gamma: float) -> int | None:
    return next((k for k in range(1, 8) if gamma == 2.0**-k), None)


def _budget(request: _Request) -> float:
    budget: float = request.number("budget", float, 0.5)
    if not 0 <= budget <= 1:
        raise SettingError(f"budget of the method compile is a share of 0 to 1, not {budget:g}")
    return budget
