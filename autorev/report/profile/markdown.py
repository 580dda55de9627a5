"""Profiles as Markdown with GitHub's tables, for the README or a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autorev.format import NOTHING, format_bytes, format_integer, format_seconds, format_share
from autorev.profiler.points import largest_points, point_per_second
from autorev.profiler.readings import Memory
from autorev.profiler.record import Profile, Result, Status
from autorev.report.analysis.markdown import code, literal, table
from autorev.words import setting_facts

_MEANINGS = (
    "Peak: the most that the allocator held during a step. Kept: between forward and backward, beyond parameters, "
    "optimiser state and inputs. Spread: the distance of the quartiles relative to the median. Gradient error: "
    "relative to ordinary autograd. Loss change: before any training, in nats."
)


def render_markdown(profiles: Sequence[Profile]) -> str:
    """A table per record, and, where batches were swept, one of throughput by method and number of blocks."""
    parts = [part for profile in profiles for part in _record(profile)]
    if parts:
        parts.append(_MEANINGS)
    parts += largest_batches([p for p in profiles if any(point.axis == "batch" for point in p.points)])
    return "\n\n".join(parts) + "\n" if parts else ""


def _record(profile: Profile) -> Iterator[str]:
    yield f"### {_heading(profile)}"
    yield "  \n".join(code(line) for line in profile.command.splitlines())
    heads = (
        f"method,peak,of plain,kept,s/step (median),spread,{profile.units}/s,gradient error,loss change,"
        "predicted/measured peak"
    )
    yield table(heads.split(","), [_cells(profile, result) for result in profile.results], right=range(1, 10))
    reasons = [f"- {_name(profile, r)}: {r.status.value}; {literal(r.reason)}" for r in profile.results if r.reason]
    if reasons:
        yield "\n".join(reasons)
    if not profile.complete:
        yield "The run is not complete; `--resume` goes on with it."


def _heading(profile: Profile) -> str:
    setting, environment = profile.setting, profile.environment
    size = f"batch {format_integer(setting.batch)}"
    if setting.sequence is not None:
        size += f" x {format_integer(setting.sequence)} tokens"
    day = environment.date.split("T", 1)[0]
    trains = setting_facts(setting)["Trains"] + ("" if profile.pretrained else " (random weights)")
    facts = (profile.model.name, trains, size, setting.dtype, environment.machine, day)
    return literal(", ".join(facts))


def _cells(profile: Profile, result: Result) -> list[str]:
    memory, fidelity, seconds = result.memory, result.fidelity, result.step_seconds
    plain = profile.result("plain")
    of_plain = plain.memory.peak_bytes if plain and plain.memory else None
    rate = profile.per_second(seconds)
    return [
        _name(profile, result),
        _peak(result),
        format_share(memory.peak_bytes, of_plain) if memory else NOTHING,
        format_bytes(memory.kept_bytes) if memory else NOTHING,
        NOTHING if seconds is None else format_seconds(seconds),
        _spread(result),
        NOTHING if rate is None else _rate(rate),
        NOTHING if fidelity is None else f"{fidelity.gradient_error:.1e}" if fidelity.gradient_error else "0",
        NOTHING if fidelity is None else f"{fidelity.loss - fidelity.original_loss:+.3f}",
        _quality(result, memory),
    ]


def _name(profile: Profile, result: Result) -> str:
    name = literal(result.method.title)
    if profile.pretrained and not result.method.preserves_function:
        name += " (from scratch only)"
    chosen = profile.recommendation is not None and profile.recommendation.method == result.method.spec
    return f"**{name}**" if chosen else name


def _peak(result: Result) -> str:
    if result.memory:
        return format_bytes(result.memory.peak_bytes)
    if result.status is Status.PREDICTED and result.prediction:
        return f"{format_bytes(result.prediction.peak_bytes)}, predicted"
    return result.status.value


def _spread(result: Result) -> str:
    if result.spread is None:
        return NOTHING
    return f"{result.spread:.1%}, in doubt" if result.in_doubt else f"{result.spread:.1%}"


def _quality(result: Result, memory: Memory | None) -> str:
    if memory is None or result.prediction is None:
        return NOTHING
    return f"{result.prediction.peak_bytes / memory.peak_bytes:.3f}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:,.3g}"


def largest_batches(profiles: Sequence[Profile]) -> Iterator[str]:
    if not profiles:
        return
    ordered = sorted(profiles, key=lambda profile: profile.blocks)
    limits = dict.fromkeys(profile.memory_limit or "the whole memory" for profile in ordered)
    yield "### Throughput at the largest batch"
    units = " or ".join(dict.fromkeys(profile.units for profile in ordered))
    yield f"In {units} a second within {literal(', '.join(limits))}; the batch in brackets."
    blocks = [profile.blocks for profile in ordered]
    heads = [
        f"{p.blocks} blocks" if blocks.count(p.blocks) == 1 else f"{literal(p.name)}, {p.blocks} blocks"
        for p in ordered
    ]
    titles = {result.method.spec: result.method.title for p in ordered for result in p.results}
    swept = dict.fromkeys(point.method for p in ordered for point in p.points if point.axis == "batch")
    rows = [[literal(titles.get(spec, spec)), *(_at_largest(p, spec) for p in ordered)] for spec in swept]
    yield table(["method", *heads], rows, right=range(1, 1 + len(heads)))


def _at_largest(profile: Profile, spec: str) -> str:
    point = largest_points(profile, "batch").get(spec)
    if point is None:
        tried = any(p.axis == "batch" and p.method == spec and p.status is Status.OUT_OF_MEMORY for p in profile.points)
        return "does not fit" if tried else NOTHING
    rate = point_per_second(profile, point)
    return f"{NOTHING if rate is None else _rate(rate)} ({format_integer(point.value)})"
