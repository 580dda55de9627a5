"""`autorev.verify`: are the gradients of a converted model, on the user's own batch, those of ordinary autograd?

The oracle is the model's own code under the same coupling, with every activation stored: no tape, no second run, no
side bits. The model runs once each way from one random state; neither its `.grad`, its buffers, its attributes, nor the
random streams are touched. The oracle needs the memory that reversibility saves: choose a batch that plain training
could hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from autorev.conversion.convert import chains_of
from autorev.detection import call_of, forward_failed
from autorev.devices import check_devices
from autorev.engine.mode import ORACLE, ORIGINAL, REVERSIBLE, running
from autorev.engine.observed import observing
from autorev.engine.undisturbed import undisturbed
from autorev.errors import AutorevError, CaptureError, ConversionError, is_out_of_memory
from autorev.given import no_function
from autorev.integrations.transformers import without_cache
from autorev.losses import floating_outputs, returned_loss

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative gradient error that passes, by the narrowest dtype among the parameters."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found."""

    passed: bool
    loss: float
    oracle_loss: float
    original_loss: float
    """Of the blocks as they were before the conversion."""
    gradient_error: float
    """|g - g_oracle| / |g_oracle| over all parameters."""
    gradient_cosine: float
    worst: tuple[tuple[str, float], ...]
    """The parameters with the largest relative errors, worst first."""
    missing: tuple[str, ...]
    """Parameters that get a gradient from one of the two and none from the other."""
    drift: dict[str, float]
    tolerance: float
    rebuilt: dict[str, int]
    """By chain: branches that backward ran again on a rebuilt input. Of a chain with none nothing was verified."""

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        idle = [name for name, count in self.rebuilt.items() if not count]
        if idle:
            return (
                f"NOTHING VERIFIED of {', '.join(idle)}: backward rebuilt no block of it in this call\n"
                "  all blocks stored their activations: they were given a key-value cache (use_cache=False), keep_last "
                "covers them,\n  no gradient reaches them, or the coupling is the plain network in eval mode "
                "(model.train())"
            )
        verdict = "PASSED" if self.passed else "FAILED"
        lines = [
            f"{verdict}: gradients are those of ordinary autograd under the same coupling"
            if self.passed
            else f"{verdict}: gradients differ from ordinary autograd under the same coupling",
            f"  gradient error  {self.gradient_error:.3g} relative (tolerance {self.tolerance:g}), "
            f"cosine {self.gradient_cosine:.9f}",
            f"  loss            {self.loss:.6f}; by the oracle {self.oracle_loss:.6f}; "
            f"of the original model {self.original_loss:.6f} ({self.loss - self.original_loss:+.4f})",
            "  reconstruction  " + ("; ".join(f"{n}: off by {d:.3g}" for n, d in self.drift.items()) or "none ran"),
        ]
        if not self.passed:
            lines += [f"  {name}: {error:.3g}" for name, error in self.worst]
            lines += [f"  {name}: a gradient from one of the two only" for name in self.missing[:5]]
        return "\n".join(lines)


def verify(model: nn.Module, batch: Any = None, *, loss: Callable[[Any], torch.Tensor] | None = None) -> Verification:
    """Check the gradients of a converted model against the oracle, on `batch`; print the verdict and return it.

    `batch` is what the model is called with, as `autorev.detection.call_of` has it: a dict, a tuple, one tensor; a
    `transformers` model needs none. `loss` takes what the model returns to a scalar; by default its `.loss`, or the
    mean square of every floating tensor that it returns.

    Raises:
        ConversionError: the model is not converted, or there is nothing to compare.
        CaptureError: the model cannot be called on the batch.
        ReconstructionError: the reconstruction itself noticed that it went wrong.
    """
    _check_converted(model)
    found = verify_call(model, *call_of(model, batch, "verify"), loss=loss)
    print(found)
    return found


def verify_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Callable[[Any], torch.Tensor] | None = None
) -> Verification:
    """`verify` on the call `model(*args, **kwargs)`, without printing."""
    _check_converted(model)
    scalar = _default_loss if loss is None else loss
    if wrong := no_function(loss=scalar):
        raise ConversionError(f"{wrong}: it takes what the model returns to a scalar")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConversionError(f"no parameter of {type(model).__name__} requires a gradient; unfreeze some")

    def run(how: str) -> tuple[float, Gradients]:
        with running(how), undisturbed(model, (args, kwargs)), torch.inference_mode(False), torch.enable_grad():
            value = _checked(scalar(_called(model, args, kwargs)))
            if how == ORIGINAL:
                return float(value.detach()), {}
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            return float(value.detach()), dict(zip(parameters, found, strict=True))

    args, kwargs = without_cache(model, (args, kwargs))
    with observing() as observed:
        own_loss, own = run(REVERSIBLE)
    rebuilt = {chain.name: observed.rebuilt.get(chain.name, 0) for chain in chains_of(model)}
    oracle_loss, expected = run(ORACLE)
    with torch.no_grad():
        original_loss, _ = run(ORIGINAL)
    losses = (own_loss, oracle_loss, original_loss)
    found = compare(own, expected)
    if not math.isfinite(oracle_loss) or not math.isfinite(found.size):
        raise ConversionError(_not_finite(oracle_loss, expected))
    return _verdict(list(parameters.values()), found, losses, observed.drifts, rebuilt)


Gradients = Mapping[str, torch.Tensor | None]
"""By the parameter's name."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of gradients from those that they should be."""

    error: float
    """|g - g_reference| / |g_reference| over all parameters; a gradient that one of the two lacks is all error."""
    cosine: float
    by_parameter: dict[str, float]
    """Relative errors of those that both have."""
    missing: tuple[str, ...]
    """Parameters that get a gradient from one of the two and none from the other."""
    size: float
    """|g_reference|."""


def compare(found: Gradients, reference: Gradients) -> Difference:
    """How far gradients are from a reference's."""
    off = norm = own = dot = 0.0
    errors: dict[str, float] = {}
    missing = []
    for name in dict.fromkeys((*reference, *found)):
        mine, theirs = found.get(name), reference.get(name)
        a, b = (None if g is None else g.double() for g in (mine, theirs))
        if a is None or b is None:
            present = a if b is None else b
            if present is None:
                continue
            missing.append(name)
            a, b = (torch.zeros_like(present) if g is None else g for g in (a, b))
        difference, size = float((a - b).square().sum()), float(b.square().sum())
        off, norm, own, dot = off + difference, norm + size, own + float(a.square().sum()), dot + float((a * b).sum())
        if name not in missing:
            errors[name] = math.sqrt(difference / size) if size else math.sqrt(difference)
    return Difference(
        error=math.sqrt(off / norm) if norm else math.sqrt(off),
        cosine=dot / math.sqrt(norm * own) if norm and own else 0.0,
        by_parameter=errors,
        missing=tuple(missing),
        size=math.sqrt(norm),
    )


def _verdict(
    parameters: list[nn.Parameter],
    found: Difference,
    losses: tuple[float, float, float],
    found_drift: dict[str, float],
    rebuilt: dict[str, int],
) -> Verification:
    if not found.size and any(hasattr(p, "placements") for p in parameters):
        raise ConversionError(
            "the parameters are sharded, and their gradients are collected past autograd, where nothing can compare "
            "them; verify the model before fully_shard. autorev.drift(model) is 0 for a sharded model, too, when every "
            "block was rebuilt exactly"
        )
    if not found.size:
        raise ConversionError("every gradient of the oracle is zero, so there is nothing to compare; use another batch")
    narrowest = min((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).bits)
    tolerance = TOLERANCE.get(narrowest, TOLERANCE[torch.bfloat16])
    kinds = filter(torch.amp.is_autocast_available, {"cpu", *(p.device.type for p in parameters)})
    if any(map(torch.is_autocast_enabled, kinds)):
        tolerance = max(tolerance, TOLERANCE[torch.bfloat16])
    same_loss = abs(losses[0] - losses[1]) <= tolerance * max(abs(losses[1]), 1e-3)
    return Verification(
        passed=found.error <= tolerance and not found.missing and all(rebuilt.values()) and same_loss,
        loss=losses[0],
        oracle_loss=losses[1],
        original_loss=losses[2],
        gradient_error=found.error,
        gradient_cosine=found.cosine,
        worst=tuple(sorted(found.by_parameter.items(), key=lambda item: -item[1])[:5]),
        missing=found.missing,
        drift=found_drift,
        tolerance=tolerance,
        rebuilt=rebuilt,
    )


def _not_finite(loss: float, gradients: Gradients) -> str:
    """Of the oracle, which is then none."""
    what = f"the loss is {loss}"
    if math.isfinite(loss):
        bad = next(name for name, found in gradients.items() if found is not None and not found.isfinite().all())
        what = f"the gradient of {bad} is not finite"
    return (
        f"{what} under ordinary autograd, so there is nothing to compare: that is no fault of the reversible blocks; "
        "look at the model and the loss, or use another batch"
    )


def _check_converted(model: nn.Module) -> None:
    if not chains_of(model):
        raise ConversionError(f"{type(model).__name__} is not converted; call autorev.convert(model) first")
    check_devices(model.named_parameters())


def _called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except AutorevError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CaptureError(forward_failed(model, error)) from error


def _checked(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise ConversionError(f"the loss is a {type(loss).__name__}, not a tensor; let loss= return one")
    if loss.numel() != 1:
        raise ConversionError(f"the loss is {list(loss.shape)} numbers; let loss= return one, such as their mean")
    if not loss.is_floating_point():
        raise ConversionError(
            f"the loss is of dtype {loss.dtype}, which has no gradient; let loss= return a real number"
        )
    if not loss.requires_grad:
        raise ConversionError(
            "the loss depends on no parameter that requires a gradient: it was detached, or made of none of them; let "
            "loss= return what training calls backward on"
        )
    return loss


def _default_loss(returned: Any) -> torch.Tensor:
    """Not the mean, as a step is measured with: behind a norm that has a gradient of zero."""
    loss = returned_loss(returned)
    if loss is not None:
        return loss
    wide = [tensor.double() for tensor in floating_outputs(returned)]
    if not wide:
        raise ConversionError("the model returned no floating tensor; pass loss=, a function of what it returns")
    return torch.stack([t.square().mean() for t in wide]).sum()
