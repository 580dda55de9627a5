"""What is shown once instead of many times: runs of identical blocks, methods with identical figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from itertools import groupby

from autorev.analysis import Analysis, Block, Category, Prediction, Reach, Sweep, Verdict
from autorev.format import clean
from autorev.known_methods import BASELINES
from autorev.methods import TILES
from autorev.words import method_label

_FARTHEST_CAPACITY = 3
"""In units of the highest peak: a capacity farther away would leave the bars too short to read."""
LONGEST_BAR = 2
"""In device capacities: a longer bar is cut, or it would hide how the others compare."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks that look the same."""

    blocks: tuple[Block, ...]

    @property
    def first(self) -> Block:
        """The block that stands for all of them."""
        return self.blocks[0]

    @property
    def label(self) -> str:
        """`model.layers.0-29`: the paths of all blocks in one."""
        return clean(_join_paths([block.path for block in self.blocks]))


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One line of a comparison: a method, or couplings of which every figure is the same."""

    names: tuple[str, ...]
    prediction: Prediction
    """Of the first of them, and apart from name and note of all."""
    reach: Reach | None
    notes: tuple[str, ...]
    """Each after the name of its method where several share the row."""

    @property
    def label(self) -> str:
        """`leapfrog, midpoint`."""
        return ", ".join(method_label(name) for name in self.names)


def identical_runs(blocks: Iterable[Block]) -> list[Run]:
    """Consecutive blocks that differ in nothing but their path and call."""
    return _runs(blocks, lambda block: replace(block, path="", call=0))


def similar_groups(blocks: Iterable[Block]) -> list[tuple[Block, list[Run]]]:
    """Blocks with the same class, verdict, reasons and steps, wherever they stand; for an overview."""
    groups: dict[Hashable, list[Run]] = {}
    for run in _runs(blocks, _look):
        groups.setdefault(_look(run.first), []).append(run)
    return [(runs[0].first, runs) for runs in groups.values()]


def step_kinds(block: Block) -> str:
    """`attention + mlp`."""
    return " + ".join(clean(step.kind) for step in block.steps)


def all_blocks(analysis: Analysis) -> tuple[Block, ...]:
    """Every block found: those of the chains in their order, then the refused ones that are in no chain."""
    chained = tuple(block for chain in analysis.chains for block in chain.blocks)
    return chained + analysis.refused


def reversible_count(analysis: Analysis) -> int:
    """How many blocks may be made reversible."""
    return sum(block.verdict is not Verdict.REFUSED for block in all_blocks(analysis))


def method_rows(analysis: Analysis) -> list[MethodRow]:
    """One row per method, in the order of the analysis; couplings with identical figures share one."""
    reaches = {reach.method: reach for reach in analysis.frontier}
    groups: dict[Hashable, list[Prediction]] = {}
    for prediction in analysis.predictions:
        name = prediction.method
        key = name if name in BASELINES or name.endswith(TILES) else _figures(prediction, reaches.get(name))
        groups.setdefault(key, []).append(prediction)
    return [_row(group, reaches.get(group[0].method)) for group in groups.values()]


def _row(group: list[Prediction], reach: Reach | None) -> MethodRow:
    names = tuple(prediction.method for prediction in group)
    notes = [(f"{p.method}: " if len(group) > 1 else "") + p.note for p in group if p.note]
    return MethodRow(names, group[0], reach, tuple(clean(note) for note in notes))


def fits(row: MethodRow, analysis: Analysis) -> bool:
    """Whether the peak is within what the device has to use; true where no device is named."""
    return analysis.device is None or row.prediction.peak_bytes <= analysis.device.usable_bytes


def is_chosen(row: MethodRow, analysis: Analysis) -> bool:
    """Is it what is recommended?"""
    return analysis.recommendation is not None and analysis.recommendation.method in row.names


def kept_and_scratch(analysis: Analysis) -> tuple[list[MethodRow], list[MethodRow]]:
    """What a pretrained model can be trained with as it is, and couplings that are for training from scratch."""
    rows = method_rows(analysis)
    kept = [row for row in rows if row.prediction.preserves_function or is_chosen(row, analysis)]
    return kept, [row for row in rows if row not in kept]


def bar_scale(analysis: Analysis, rows: list[MethodRow]) -> tuple[int, int | None]:
    """Where the scale of a bar chart of the peaks ends, and the device's capacity if it is on that scale."""
    highest = max([1, *(row.prediction.peak_bytes for row in rows)])
    if analysis.device is None:
        return highest, None
    capacity = analysis.device.memory_bytes
    if capacity > _FARTHEST_CAPACITY * highest:
        return highest, None
    return min(max(highest, capacity), LONGEST_BAR * capacity), capacity


def shown_categories(rows: list[MethodRow]) -> list[Category]:
    """The categories that hold a byte under some method, in the order in which they are stacked."""
    return [category for category in Category if any(row.prediction.categories.get(category) for row in rows)]


def sweep_rows(analysis: Analysis, axis: str) -> list[tuple[str, Sweep]]:
    """The sweeps along `axis` with their labels; couplings with the same line share one."""
    rows: dict[Hashable, tuple[list[str], Sweep]] = {}
    for sweep in analysis.sweeps:
        if sweep.axis == axis:
            apart = sweep.method in BASELINES or sweep.method.endswith(TILES)
            key = sweep.method if apart else (sweep.values, sweep.peak_bytes)
            rows.setdefault(key, ([], sweep))[0].append(method_label(sweep.method))
    return [(", ".join(names), sweep) for names, sweep in rows.values()]


def _figures(prediction: Prediction, reach: Reach | None) -> str:
    # repr, because a prediction's dictionaries are not hashable.
    return repr((replace(prediction, method="", note=""), reach and replace(reach, method="")))


def _look(block: Block) -> Hashable:
    return block.class_name, block.verdict, block.reasons, step_kinds(block)


def _runs(blocks: Iterable[Block], key: Callable[[Block], Hashable]) -> list[Run]:
    return [Run(tuple(run)) for _, run in groupby(blocks, key)]


def _join_paths(paths: list[str]) -> str:
    distinct = list(dict.fromkeys(paths))
    if len(paths) > len(distinct):
        return f"{_join_paths(distinct)} (called {len(paths) // len(distinct)} times)"
    if len(distinct) == 1:
        return distinct[0]
    parts = [re.split(r"(\d+)", path) for path in distinct]
    columns = zip(*parts, strict=False)
    varying = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    # "a.0.b" splits into "a.", "0", ".b": the odd places are numbers.
    if len({len(split) for split in parts}) == 1 and len(varying) == 1 and (place := varying[0]) % 2:
        numbers = [int(split[place]) for split in parts]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            first = parts[0]
            return "".join([*first[:place], f"{numbers[0]}-{numbers[-1]}", *first[place + 1 :]])
    return f"{distinct[0]} ... {distinct[-1]}"
