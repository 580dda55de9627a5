"""`autorev.convert` and `autorev.revert`: the only place that touches the user's model.

Everything that can fail on the arguments or on the model fails before the first block is changed; the one thing that
has to run the converted model, the probe that chooses the grid, undoes the conversion when it fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from autorev.couplings.arithmetic import Arithmetic, FixedPoint, Floating
from autorev.couplings.coupling import Coupling
from autorev.couplings.presets import Preset, check_dyadic, coupling_for, preset_named
from autorev.couplings.velocity import Velocity
from autorev.detect.chains import chain_name
from autorev.detect.judge import Finding, argument_of
from autorev.engine.chain import ReversibleChain
from autorev.engine.tape import TOLERANCE
from autorev.errors import ConversionError
from autorev.rewrite.adds import KnownAdds
from autorev.rewrite.block_forward import ReversibleForward, WholeBlock, replacements_of
from autorev.rewrite.checkpointing import SWITCH_OFF, checkpoints_itself, explain_checkpointing, stop_explaining
from autorev.rewrite.estimate import Estimate
from autorev.rewrite.in_steps import StepsOfBlock, StepsOfLoop, by_steps
from autorev.rewrite.loop_forward import install_loops
from autorev.rewrite.notes import notes_on
from autorev.rewrite.probe import USUAL_FRACTION_BITS, choose_grids
from autorev.rewrite.remember import forget, remember
from autorev.rewrite.select import Chosen, Numbers, choose, patterns
from autorev.rewrite.summary import Conversion, ConvertedChain
from autorev.rewrite.trained_by import notice_trainers, stop_noticing


@dataclass(frozen=True)
class Request:
    """The arguments of `convert`."""

    coupling: str = "momentum"
    gamma: Numbers = None
    c: Numbers = None
    arithmetic: str = "exact"
    blocks: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None
    keep_last: int | Literal["auto"] = "auto"
    granularity: str = "block"
    fraction_bits: int | Mapping[str, int] | None = None


def convert(
    model: nn.Module,
    *,
    coupling: str = "momentum",
    gamma: Numbers = None,
    c: Numbers = None,
    arithmetic: str = "exact",
    blocks: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    keep_last: int | Literal["auto"] = "auto",
    granularity: str = "block",
    fraction_bits: int | Mapping[str, int] | None = None,
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
) -> Conversion:
    """Make the residual chains of `model` reversible, in place.

    The class, the module tree, the `state_dict` keys, hooks and the optimiser's parameters stay; `revert` undoes it.
    A `transformers` model needs no example call.

    Args:
        coupling: momentum, leapfrog, midpoint, midpoint_a, bdia, hamiltonian or revnet; `autorev.couplings.presets`.
        gamma: for momentum: a number n / 2^k, or a dict from block patterns to numbers. Default 1/8.
        c: the factor of the branches, likewise. Default: the coupling's own (for momentum 1 - gamma / 2, and 1
            in the first and the last step).
        arithmetic: "exact" (int32 fixed point and side bits: reconstruction without any error) or "float".
        blocks: patterns of the blocks to convert (`model.layers.*`); default: all that are eligible.
        exclude: patterns of blocks to leave out.
        keep_last: so many blocks at the end of each chain are stored instead of recomputed. "auto": the last one, where
            that does not raise the peak of a training step of the example (its proportions count, not its size).
        granularity: "block", or "sublayer" for a step per residual add.
        fraction_bits: the fixed-point grid is 2^-fraction_bits, for all chains or by chain name; default: chosen per
            chain by a probe of the example.
        example_args: positional arguments of a call of the model.
        example_kwargs: keyword arguments of that call.

    Raises:
        ConversionError: nothing can be converted that way; says why, and the model is as it was.
        CaptureError: the model cannot be called with the example arguments.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"autorev.convert needs a torch.nn.Module, and got a {type(model).__name__}")
    blocks, exclude = patterns(blocks), patterns(exclude)
    request = Request(coupling, gamma, c, arithmetic, blocks, exclude, keep_last, granularity, fraction_bits)
    preset = check_request(request)
    if any(forwards_of(model)):
        raise ConversionError(
            f"{type(model).__name__} is converted already; call autorev.revert(model) before converting it anew"
        )
    if checkpoints_itself(model):
        raise ConversionError(
            f"{type(model).__name__} checkpoints its blocks, which reversible ones make superfluous; first {SWITCH_OFF}"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ConversionError(
            f"the weights of {type(model).__name__} were made under torch.inference_mode, and such tensors cannot be "
            "trained; build or load the model outside of it"
        )
    args, kwargs = _example(model, example_args, example_kwargs)
    chosen = choose(model, args, kwargs, request.blocks, request.exclude)
    _check_patterns(request, chosen)
    if not chosen.chains:
        raise ConversionError(_nothing(model, chosen))
    estimate = Estimate(chosen.twin, (args, kwargs), chosen.chains, chosen.others)
    couplings = [c for chain in chosen.chains for c in couplings_of(request, preset, [f.path for f in chain])]
    bits = 0 if request.arithmetic == "float" else max(coupling.side_bits for coupling in couplings)
    stored = estimate.stored(request.keep_last, bits, in_pieces(request, preset))
    built: list[_Built] = []
    for chain, kept in zip(chosen.chains, stored.blocks, strict=True):
        built.append(_Built(model, chain, kept, request, preset, taken={item.chain.name for item in built}))
    names = list(model.state_dict())
    for item in built:
        item.install()
    install_loops(model, [(item.findings, item.chain) for item in built])
    try:
        notes = choose_grids(model, [item.chain for item in built], request.fraction_bits, args, kwargs)
        notes += notes_on(model, [item.chain for item in built], forwards_of(model))
        if list(model.state_dict()) != names:
            raise ConversionError("the conversion changed the state_dict's keys; please report the model")
        explain_checkpointing(model)
        notice_trainers(model)
        remember(model, request, {item.chain.name: item.chain for item in built})
    except BaseException:
        revert(model)
        raise
    return Conversion(
        coupling=preset.name,
        arithmetic=request.arithmetic,
        granularity=request.granularity,
        chains=tuple(item.summary(why) for item, why in zip(built, stored.why, strict=True)),
        not_converted=tuple(chosen.left_out),
        notes=tuple(notes),
        simulated=partial(estimate.memory, max(item.side_bits for item in built), stored.blocks),
    )


def revert(model: nn.Module) -> int:
    """Restore every converted block of `model`; returns how many there were. The weights stay as they are.

    A block whose forward another library has wrapped since is restored within the wrapper.
    """
    found = list(replacements_of(model))
    for replacement in reversed(found):
        replacement.remove()
    stop_explaining(model)
    stop_noticing(model)
    forget(model)
    return sum(isinstance(replacement, ReversibleForward) for replacement in found)


def drift(model: nn.Module) -> dict[str, float]:
    """By chain, what the integrity check of the last backward pass found: 0.0 in exact arithmetic; in float arithmetic
    the largest leftover of the first partner stream, relative to the stream.

    A chain that began anew within the forward pass has an entry for each piece. Chains whose last backward pass did
    not reach their beginning are missing: of them nothing is known.
    """
    return {label: drift for chain in chains_of(model) for label, drift in chain.drifts.items()}


def chains_of(model: nn.Module) -> list[ReversibleChain]:
    """The converted chains of `model`, each once."""
    return list({id(forward.chain): forward.chain for forward in forwards_of(model)}.values())


def forwards_of(model: nn.Module) -> Iterable[ReversibleForward]:
    """The replaced forwards of `model`'s converted blocks."""
    return (found for found in replacements_of(model) if isinstance(found, ReversibleForward))


# -- arguments


def check_request(request: Request) -> Preset:
    """The preset of a request whose options make sense.

    Raises:
        ConversionError: one does not.
    """
    preset = preset_named(request.coupling)
    if request.arithmetic not in ("exact", "float"):
        raise ConversionError(f"arithmetic is 'exact' or 'float', not {request.arithmetic!r}")
    if request.granularity not in ("block", "sublayer"):
        raise ConversionError(f"granularity is 'block' or 'sublayer', not {request.granularity!r}")
    number = isinstance(request.keep_last, int) and request.keep_last >= 0
    if request.keep_last != "auto" and not number:
        raise ConversionError(f"keep_last is 'auto' or a number of blocks, 0 or more, not {request.keep_last!r}")
    if request.fraction_bits is not None and request.arithmetic == "float":
        raise ConversionError("fraction_bits belongs to arithmetic='exact'; leave it out")
    return preset


def in_pieces(request: Request, preset: Preset) -> bool:
    """Is a step less than a block?"""
    return request.granularity == "sublayer" or preset.two_streams


def _example(model: nn.Module, args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None) -> tuple[Any, Any]:
    if args or kwargs:
        return tuple(args or ()), dict(kwargs or {})
    from autorev.pipeline import example_call_of

    return example_call_of(model, "convert")


def _check_patterns(request: Request, chosen: Chosen) -> None:
    paths = [finding.path for chain in chosen.chains for finding in chain]
    for name in ("gamma", "c"):
        numbers = getattr(request, name)
        for pattern, number in numbers.items() if isinstance(numbers, Mapping) else ():
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ConversionError(f"the pattern {pattern!r} of {name} matches none of the blocks to convert")
            if not isinstance(number, int | float | Fraction):
                raise ConversionError(f"{name} of {pattern!r} is a number, not {number!r}")


def _nothing(model: nn.Module, chosen: Chosen) -> str:
    text = f"no chain of blocks of {type(model).__name__} can be converted"
    if not chosen.left_out:
        return f"{text}: it has no residual block"
    path, reason = chosen.left_out[0]
    more = f" (and {len(chosen.left_out) - 1} more; autorev.analyze lists them)" if len(chosen.left_out) > 1 else ""
    return f"{text}: {path}: {reason}{more}"


# -- one chain


class _Built:
    """A chain ready to be installed."""

    def __init__(
        self, model: nn.Module, findings: list[Finding], kept: int, request: Request, preset: Preset, taken: set[str]
    ) -> None:
        """`kept`: so many blocks are stored."""
        pieces = in_pieces(request, preset)
        inline = findings[0].inline
        self.kept = kept
        if pieces and inline:
            kept = sum(len(finding.steps) for finding in findings[len(findings) - kept :])
            findings = by_steps(findings)
        self.findings, self.preset = findings, preset
        self.first: list[int] = []
        """Number of each block's first step."""
        paths: list[str] = []
        for finding in findings:
            self.first.append(len(paths))
            paths += [finding.path] * (len(finding.steps) if pieces and not inline else 1)
        couplings = couplings_of(request, preset, paths)
        stored_from = self.first[len(findings) - kept] if kept else len(couplings)
        stream = findings[0].stream_in
        double = stream is not None and stream.dtype is torch.float64
        arithmetic = arithmetic_for(request, couplings[:stored_from], paths, chain_name(findings), double)
        name = plain_name = chain_name(findings)
        while name in taken:
            name = f"{plain_name} ({1 + sum(other.startswith(plain_name) for other in taken)})"
        self.chain = ReversibleChain(name, couplings, arithmetic, stored_from, preset.averages, paths)
        self.forwards = self._forwards(model, pieces)

    def _forwards(self, model: nn.Module, pieces: bool) -> list[ReversibleForward]:
        if self.findings[0].inline:
            holder = model.get_submodule(self.findings[0].call.path)
            return [StepsOfLoop.of(holder, self.findings, self.chain, in_steps=pieces)]
        by_module: dict[str, list[int]] = {}
        for position, finding in enumerate(self.findings):
            by_module.setdefault(finding.call.path, []).append(position)
        made: list[ReversibleForward] = []
        for path, positions in by_module.items():
            finding = self.findings[positions[0]]
            block = model.get_submodule(path)
            assert finding.start is not None
            known: dict[str, Any] = {
                "block": block,
                "path": path,
                "chain": self.chain,
                "numbers": tuple(self.first[p] for p in positions),
                "argument": argument_of(finding.start),
                "output_at": finding.output_at,
                "written": finding.call.buffers_written,
                "overwrites": any(o.code == "in-place-add" for o in finding.caveats),
            }
            if pieces:
                made.append(StepsOfBlock(**known, adds=KnownAdds.of_block(finding), steps=len(finding.steps)))
            else:
                made.append(WholeBlock(**known))
        return made

    def install(self) -> None:
        """Put the new forwards in place."""
        for forward in self.forwards:
            forward.install()

    @property
    def side_bits(self) -> int:
        """The most that a block which is recomputed keeps of an element."""
        chain = self.chain
        if not isinstance(chain.arithmetic, FixedPoint):
            return 0
        per_block = max(len(chain.couplings) // max(len(set(chain.paths)), 1), 1)
        return per_block * max((c.side_bits for c in chain.couplings[: chain.stored_from]), default=0)

    def summary(self, why_stored: str) -> ConvertedChain:
        """What the user is told about it."""
        chain = self.chain
        gammas = tuple(float(c.gamma) for c in chain.couplings if isinstance(c, Velocity))
        return ConvertedChain(
            name=chain.name,
            blocks=tuple(finding.path for finding in self.findings),
            steps=len(chain.couplings),
            stored_steps=len(chain.couplings) - chain.stored_from,
            stored_blocks=self.kept,
            why_stored=why_stored,
            gamma=gammas,
            c=tuple(c.c for c in chain.couplings if isinstance(c, Velocity)),
            side_bits=tuple(c.side_bits for c in chain.couplings),
            fraction_bits=chain.arithmetic.fraction_bits if isinstance(chain.arithmetic, FixedPoint) else None,
        )


def couplings_of(request: Request, preset: Preset, paths: list[str]) -> list[Coupling]:
    """One for each step, of which `paths` are the blocks."""
    return [
        coupling_for(preset, path, n, len(paths), number_for(request.gamma, path), number_for(request.c, path))
        for n, path in enumerate(paths)
    ]


def number_for(numbers: Numbers, path: str) -> float | None:
    """gamma or c of a block; None: the coupling's own."""
    if not isinstance(numbers, Mapping):
        return numbers
    return next((number for pattern, number in numbers.items() if fnmatchcase(path, pattern)), None)


def arithmetic_for(
    request: Request, recomputed: list[Coupling], paths: list[str], name: str, double: bool
) -> Arithmetic:
    """The arithmetic of the chain `name`, of which the steps `recomputed` (in the blocks `paths`) are undone.

    Raises:
        ConversionError: a gamma is no n / 2^k, or float streams would drift too far.
    """
    if request.arithmetic == "exact":
        for coupling, path in zip(recomputed, paths, strict=False):
            if isinstance(coupling, Velocity):
                check_dyadic(coupling.gamma, path)
        return FixedPoint(USUAL_FRACTION_BITS)
    worst, product = 1.0, 1.0
    for coupling in recomputed:
        product *= coupling.growth if coupling.invertible else 1.0
        worst = max(worst, product)
    error = worst * (2.0**-53 if double else 2.0**-24)
    if error > TOLERANCE:
        raise ConversionError(
            f"in float arithmetic, rounding errors of {name} would grow to {error:.1g} of the stream "
            f"over its {len(recomputed)} steps (each divides by gamma); use arithmetic='exact', which has none, or "
            "|gamma| = 1"
        )
    return Floating()
