"""Which results of a profile a report shows, in which order, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable

from autorev.analysis import Category
from autorev.methods import Method
from autorev.profiler.readings import Memory, Work
from autorev.profiler.record import Profile, Result, Status
from autorev.report.palette import Look, Looks
from autorev.report.plots import row_name

_NOT_ASKED_FOR = Method("checkpoint")


def results(profile: Profile) -> list[Result]:
    """Every result in the record's order; activation checkpointing has a row also where it was not asked for."""
    found = list(profile.results)
    if not any(each.method.name == "checkpoint" for each in found):
        at = 1 + max((i for i, each in enumerate(found) if each.method.name == "plain"), default=-1)
        reason = "it was not among the methods that this run was asked for"
        found.insert(at, Result(_NOT_ASKED_FOR, Status.PENDING, reason))
    return found


def labels(profile: Profile) -> dict[str, str]:
    """What each method is called, by spec."""
    return {each.method.spec: each.method.title for each in results(profile)}


def looks(profile: Profile) -> dict[str, Look]:
    """Colour and symbol by method; methods of one method differ in symbol and dash. By spec."""
    methods = {each.method.spec: each.method.name for each in results(profile)}
    for point in profile.points:
        methods.setdefault(point.method, point.method.partition(":")[0])
    found = Looks()
    return {spec: found.of(method, spec) for spec, method in methods.items()}


def row_label(profile: Profile, result: Result) -> str:
    """What a method is called at the left of a row of a plot."""
    name = labels(profile)[result.method.spec]
    return row_name(f"{name} (predicted)" if result.status is Status.PREDICTED else name)


def by_method(profile: Profile, method: str) -> Result | None:
    """The result of `method` without options (`plain`, not `plain:loss=chunked`), or else the first with memory."""
    found = [each for each in profile.results if each.method.name == method]
    bare = profile.result(method)
    return bare or next((each for each in found if each.memory), found[0] if found else None)


def chosen(profile: Profile) -> Result | None:
    """The result that the recommendation names."""
    name = None if profile.recommendation is None else profile.recommendation.method
    return None if name is None else profile.result(name) or by_method(profile, name)


def rival(profile: Profile) -> Result | None:
    """What the recommended method stands against: plain training, or else checkpointing; with figures if possible."""
    best = chosen(profile)
    found = [by_method(profile, name) for name in ("plain", "checkpoint")]
    others = [each for each in found if each is not None and each is not best]
    return next((each for each in others if each.memory), others[0] if others else None)


def after(profile: Profile) -> Result | None:
    """The reversible method that is shown beside plain: the recommended one if it is one, or else the first."""
    best = chosen(profile)
    if best and best.method.reversible and best.memory:
        return best
    reversible = [each for each in profile.results if each.method.reversible]
    return next((each for each in reversible if each.memory), reversible[0] if reversible else None)


def before_and_after(profile: Profile) -> list[Result]:
    """Plain, checkpoint and one reversible method, as far as their memory is known."""
    three = (by_method(profile, "plain"), by_method(profile, "checkpoint"), after(profile))
    return [each for each in three if each is not None and each.memory is not None]


def block_results(profile: Profile) -> list[Result]:
    """Plain, checkpoint and one reversible method, as far as their blocks were timed."""
    three = (by_method(profile, "plain"), by_method(profile, "checkpoint"), after(profile))
    return [each for each in three if each is not None and each.work is not None and each.work.blocks]


def with_timeline(profile: Profile) -> tuple[list[Result], list[Result]]:
    """The results whose timelines are shown at once, and those that are shown when asked for."""
    first = [each for each in before_and_after(profile) if each.memory and each.memory.timeline]
    rest = [r for r in profile.results if r.memory and r.memory.timeline and not any(r is each for each in first)]
    return first, rest


def measured_memory(profile: Profile) -> list[tuple[Result, Memory]]:
    """Every result of which the memory is known, with it."""
    return [(each, each.memory) for each in profile.results if each.memory is not None]


def peak_categories(result: Result) -> dict[str, int]:
    """Bytes by category at the peak: measured where they were, or else predicted; empty where there is neither."""
    if result.memory is not None:
        return dict(result.memory.categories)
    if result.status is Status.PREDICTED and result.prediction is not None:
        return dict(result.prediction.categories)
    return {}


def peak_bytes(result: Result) -> int | None:
    """The peak by the allocator; that of the prediction where nothing is measured and that was the intention."""
    if result.memory is not None:
        return result.memory.peak_bytes
    if result.status is Status.PREDICTED and result.prediction is not None:
        return result.prediction.peak_bytes
    return None


def shown_categories(found: Iterable[Result]) -> list[Category]:
    """The categories that hold a byte at the peak or at any time, in the order in which they are stacked."""
    held: set[str] = set()
    for each in found:
        held.update(name for name, size in peak_categories(each).items() if size)
        if each.memory and each.memory.timeline:
            held.update(name for name, sizes in each.memory.timeline.categories.items() if any(sizes))
    return [category for category in Category if category in held]


def ended(result: Result) -> str:
    """How it ended with a method, in a word or two."""
    if result.status is Status.PENDING:
        return "times not measured yet" if result.memory else "not measured"
    return "predicted, not measured" if result.status is Status.PREDICTED else result.status.value


def fits(profile: Profile, peak: int | None) -> bool:
    """Whether a peak is within the budget; true where there is none."""
    return peak is None or profile.budget_bytes is None or peak <= profile.budget_bytes


def waiting(profile: Profile) -> int:
    """How many methods are not measured to the end."""
    return sum(each.status is Status.PENDING for each in profile.results)


def only_predicted(profile: Profile) -> bool:
    """Is nothing measured, and was nothing meant to be?"""
    return bool(profile.results) and all(each.status is Status.PREDICTED for each in profile.results)


def largest(profile: Profile, spec: str, axis: str) -> tuple[int, float | None] | None:
    """The largest value of `axis` that fits under a method, and tokens (or samples) a second there; None: not sought.

    The throughput is None where that point was not timed."""
    for point in profile.points:
        if point.method == spec and point.axis == axis and point.largest:
            return point.value, throughput_at(profile, axis, point.value, point.step_seconds)
    return None


def throughput_at(profile: Profile, axis: str, value: int, seconds: float | None) -> float | None:
    """Tokens (or samples) a second of a step of `seconds` at one value of a sweep."""
    if axis == "batch":
        return profile.per_second(seconds, batch=value)
    return profile.per_second(seconds, sequence=value if axis == "sequence" else None)


def axes(profile: Profile) -> list[str]:
    """The axes along which a profile has points, in their order."""
    return list(dict.fromkeys(point.axis for point in profile.points))


def sought_largest(profile: Profile, axis: str) -> bool:
    """Was the largest value of `axis` that fits sought for any method?"""
    return any(point.largest for point in profile.points if point.axis == axis)


def doubtful(profile: Profile) -> bool:
    """Do the steps of any timed method lie so far apart that small differences mean nothing?"""
    return any(each.samples and each.in_doubt for each in profile.results)


def has_fidelity(profile: Profile) -> bool:
    """Is anything known of gradients and losses?"""
    return any(each.fidelity for each in profile.results)


def methods(profile: Profile) -> list[str]:
    """The methods of all methods, each once."""
    return list(dict.fromkeys(each.method.name for each in results(profile)))


def peak_categories_shown(profile: Profile) -> list[Category]:
    """The categories that hold a byte at the peak of any method."""
    held = {name for each in profile.results for name, size in peak_categories(each).items() if size}
    return [category for category in Category if category in held]


def budget_in_sight(profile: Profile) -> bool:
    """Is there a budget, near enough to the highest peak that bars on one scale with it can be read?"""
    peaks = [peak_bytes(each) or 0 for each in profile.results]
    return profile.budget_bytes is not None and profile.budget_bytes <= 2 * max(peaks, default=0)


def front_points(profile: Profile) -> list[tuple[Result, int, float]]:
    """(result, peak, throughput) of every method that has both."""
    found = [(each, memory, profile.per_second(each.step_seconds)) for each, memory in measured_memory(profile)]
    return [(each, memory.peak_bytes, rate) for each, memory, rate in found if rate]


def front(points: list[tuple[Result, int, float]]) -> list[tuple[Result, int, float]]:
    """Those to which no other point is at least equal in both memory and throughput and better in one."""

    def beaten(peak: int, rate: float) -> bool:
        return any(p <= peak and r >= rate and (p, r) != (peak, rate) for _, p, r in points)

    return [point for point in points if not beaten(point[1], point[2])]


def overhead_results(profile: Profile) -> list[tuple[Result, Work]]:
    """Plain training, and every method of whose step it is known what it was spent on.

    Recomputation inside PyTorch's own checkpointing is a part of its backward pass, and not told apart there.
    """
    found = [(each, each.work) for each in profile.results if each.work]
    return [(each, work) for each, work in found if work.overhead or each.method.name == "plain"]


def prediction_ratios(profile: Profile) -> list[tuple[Result, float | None, float | None]]:
    """(result, predicted over measured peak, attributed over measured peak) where one of the two is known."""
    found = []
    for each, memory in measured_memory(profile):
        peak, attributed = memory.peak_bytes, memory.attributed_bytes
        predicted = each.prediction.peak_bytes / peak if each.prediction else None
        followed = attributed / peak if attributed is not None else None
        if predicted is not None or followed is not None:
            found.append((each, predicted, followed))
    return found


def largest_batches(profile: Profile) -> list[tuple[str, int, float | None]]:
    """(spec, largest batch, tokens or samples a second there) of every method for which it was sought."""
    specs = dict.fromkeys(point.method for point in profile.points if point.axis == "batch")
    found = [(spec, largest(profile, spec, "batch")) for spec in specs]
    return [(spec, *reached) for spec, reached in found if reached is not None]
