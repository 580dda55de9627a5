"""What a profile's sweeps say: throughput at a point, and how far each method got."""

from __future__ import annotations

from statistics import quantiles

from autorev.profiler.record import Point, Profile


def point_per_second(profile: Profile, point: Point) -> float | None:
    """Tokens (or samples) a second at the point's own size; None where it was not timed."""
    batch = point.value if point.axis == "batch" else None
    sequence = point.value if point.axis == "sequence" else None
    return profile.per_second(point.step_seconds, batch, sequence)


def largest_points(profile: Profile, axis: str) -> dict[str, Point]:
    """Each method's largest value on `axis` that fits, by spec in the order of the sweep."""
    return {point.method: point for point in profile.points if point.axis == axis and point.largest}


def point_spread(point: Point) -> float | None:
    """The distance of the quartiles relative to the median; None for fewer than three samples."""
    if len(point.seconds) < 3:
        return None
    low, middle, high = quantiles(point.seconds, n=4, method="inclusive")
    return (high - low) / middle
