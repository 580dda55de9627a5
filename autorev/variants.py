"""The ways to train a model that a profile compares, by name, and putting one in place.

A variant is written `NAME` or `NAME:option=value,...`:

    plain  checkpoint  sac  offload  compile[:budget=0.5]
    momentum[:k=3]  leapfrog  midpoint  midpoint_a  bdia  hamiltonian  revnet
        couplings take arithmetic=exact|float, granularity=block|sublayer, keep_last=N (else convert chooses),
        fraction_bits=N; momentum takes k or gamma
    every one takes loss=full|chunked
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from autorev.chunked_loss import chunk_loss, unchunk_loss
from autorev.couplings.arithmetic import side_bits_of
from autorev.couplings.presets import PRESERVING_GAMMA, PRESETS
from autorev.errors import ConversionError, SettingError
from autorev.predict.strategies import selective_policy
from autorev.predict.training import NO_LABELS
from autorev.profiler.record import Variant

if TYPE_CHECKING:
    from torch import nn

    from autorev.conversion.summary import Conversion
    from autorev.profiler.passes.offload import HostStore
    from autorev.workload import Call

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
"""What a spec leaves out, so that the same variant has the same spec."""
_COUPLING_OPTIONS = ("k", "gamma", *_USUAL, "fraction_bits")


class NotApplicable(Exception):  # noqa: N818 - no error: a variant that this model has no use for
    """The variant cannot be had of this model, for the reason it holds."""


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
            raise SettingError(f"{key} of the variant {self.name} is a {what}, not {self.options[key]!r}") from None


def parse_variants(specs: Iterable[str]) -> list[Variant]:
    """The variants of `specs`, each once, in order; `all` stands for `ALL` and `default` for `DEFAULT`.

    Raises:
        SettingError: a spec is not of the form above, or there is none.
    """
    expanded: list[str] = []
    for spec in [specs] if isinstance(specs, str) else specs:
        expanded += {"all": ALL, "default": DEFAULT}.get(spec, (spec,))
    if not expanded:
        raise SettingError("there is no variant to run; name one, or `default`, or `all`")
    return list({v.spec: v for v in map(parse_variant, expanded)}.values())


def parse_variant(spec: str) -> Variant:
    """The variant that `spec` names.

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
    return Variant(
        spec=name + (f":{','.join(shown)}" if shown else ""),
        strategy=name,
        title=title,
        loss=loss,
        reversible=reversible,
        preserves_function=not reversible or (name == "momentum" and abs(_gamma(request)) <= PRESERVING_GAMMA),
        note=BASELINES.get(name) or PRESETS[name].source,
    )


def coupling_options(variant: Variant) -> dict[str, Any]:
    """What `autorev.convert` is called with for a reversible variant."""
    request = _parse(variant.spec)
    how: dict[str, Any] = {"coupling": request.name}
    if request.name == "momentum":
        how["gamma"] = _gamma(request)
    for key in ("arithmetic", "granularity"):
        if key in request.options:
            how[key] = request.options[key]
    how["keep_last"] = keep_last(variant)
    if "fraction_bits" in request.options:
        how["fraction_bits"] = request.number("fraction_bits", int)
    return how


def keep_last(variant: Variant) -> int | Literal["auto"]:
    """How many blocks at the end of each chain a reversible variant stores."""
    return _keep_last(_parse(variant.spec))


def side_bits(variant: Variant) -> int:
    """Side bits an element and step that a momentum or bdia variant keeps; 0 for the rest."""
    request = _parse(variant.spec)
    if request.options.get("arithmetic") == "float":
        return 0
    if request.name == "momentum":
        return side_bits_of(Fraction(_gamma(request)))
    return {"bdia": 1, "midpoint_a": 3}.get(request.name, 0)


def _parse(spec: str) -> _Request:
    name, _, rest = spec.strip().partition(":")
    known = [*BASELINES, *PRESETS]
    if name not in known:
        raise SettingError(f"there is no variant {name!r}; choose of {', '.join(known)}, or `all` or `default`")
    options: dict[str, str] = {}
    allowed = ["loss", *(_COUPLING_OPTIONS if name in PRESETS else []), *(["budget"] if name == "compile" else [])]
    if name in PRESETS and name != "momentum":
        allowed = [key for key in allowed if key not in ("k", "gamma")]
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise SettingError(f"the variant {name} has no option {part!r}; it takes {', '.join(allowed)}")
        if key in options:
            raise SettingError(f"the variant {spec} gives {key} twice; leave one out")
        options[key] = value
    choices = {"loss": ("full", "chunked"), "arithmetic": ("exact", "float"), "granularity": ("block", "sublayer")}
    for key, values in choices.items():
        if options.get(key, values[0]) not in values:
            raise SettingError(f"{key} of the variant {name} is {' or '.join(values)}, not {options[key]!r}")
    request = _Request(name, options)
    stored = _keep_last(request)
    if stored != "auto" and stored < 0:
        raise SettingError(f"keep_last of the variant {name} is auto, or 0 or more, not {options['keep_last']}")
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
        raise SettingError(f"k of the variant momentum is 1 to 7, not {k}")
    gamma: float = 2.0**-k if k is not None else request.number("gamma", float, 0.125)
    if not 0 < abs(gamma) < 2:
        raise SettingError(f"gamma of the variant momentum is between -2 and 2 and not 0, not {gamma:g}")
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
        raise SettingError(f"budget of the variant compile is a share of 0 to 1, not {budget:g}")
    return budget


# -- in place


@dataclass(frozen=True, slots=True)
class Blocks:
    """The residual blocks of a model, as analysis found them."""

    paths: tuple[str, ...]
    """Module paths in calling order, each once."""
    inline: bool
    """Is there one that is a turn of a loop and no module of its own?"""
    draws_random: bool


@dataclass(eq=False)
class InPlace:
    """What putting a variant in place brought with it."""

    side_bits: int = 0
    host: HostStore | None = None
    conversion: Conversion | None = None
    """What `convert` did, for a coupling."""


@contextmanager
def in_place(
    model: nn.Module, variant: Variant, blocks: Blocks, call: Call, fraction_bits: dict[str, int] | None = None
) -> Iterator[InPlace]:
    """While it lasts, `model` trains as `variant`. Its modules, weights and `state_dict` keys stay what they are.

    `fraction_bits`: the grids of a coupling's chains by name, where they are known already.

    Raises:
        NotApplicable: the variant cannot be had of this model; it is as it was.
    """
    from autorev.conversion.convert import convert, revert

    placed = InPlace()
    with ExitStack() as stack:
        try:
            if variant.loss == "chunked":
                if call[1].get("labels") is None:
                    raise NotApplicable(NO_LABELS)
                chunk_loss(model)
                stack.callback(unchunk_loss, model)
            if variant.reversible:
                how = coupling_options(variant)
                if fraction_bits:
                    how["fraction_bits"] = fraction_bits
                done = convert(model, example_args=call[0], example_kwargs=call[1], **how)
                stack.callback(revert, model)
                placed.conversion = done
                if done.arithmetic == "exact":
                    placed.side_bits = max(bits for chain in done.chains for bits in chain.side_bits)
        except ConversionError as error:
            raise NotApplicable(str(error)) from error
        if variant.strategy == "compile":
            stack.enter_context(_compiled(model, blocks, _budget(_parse(variant.spec))))
        elif variant.strategy in ("checkpoint", "sac", "offload"):
            stack.enter_context(_checkpointed(model, blocks, variant.strategy, placed))
        yield placed


@contextmanager
def _checkpointed(model: nn.Module, blocks: Blocks, strategy: str, placed: InPlace) -> Iterator[None]:
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    from autorev.profiler.passes.offload import HostStore

    if blocks.inline:
        raise NotApplicable("its blocks are turns of a loop: there is no module to put a checkpoint around")
    run: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    if strategy == "sac":
        run = partial(run, context_fn=lambda: create_selective_checkpoint_contexts(selective_policy()))
    elif strategy == "offload":
        placed.host = HostStore()
        run = partial(placed.host.around, run)
    modules = [model.get_submodule(path) for path in blocks.paths]
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.__dict__["forward"] = partial(run, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


@contextmanager
def _compiled(model: nn.Module, blocks: Blocks, budget: float) -> Iterator[None]:
    import torch
    import torch._functorch.config as functorch

    if blocks.inline:
        raise NotApplicable("its blocks are turns of a loop: there is no module to compile")
    if blocks.draws_random and budget < 1:
        raise NotApplicable(
            "its blocks draw random numbers (dropout), which torch.compile replays wrongly under a budget below 1"
        )
    modules = [model.get_submodule(path) for path in blocks.paths]
    torch._dynamo.reset()
    before = functorch.activation_memory_budget
    functorch.activation_memory_budget = budget
    calls = [module.__dict__.get("_compiled_call_impl") for module in modules]
    try:
        for module in modules:
            module.compile()
        yield
    finally:
        functorch.activation_memory_budget = before
        for module, call in zip(modules, calls, strict=True):
            module.__dict__.pop("_compiled_call_impl", None)
            if call is not None:
                module._compiled_call_impl = call
