"""Stacked horizontal bars for a terminal: coloured blocks, or letters where there is no colour."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.text import Text

from autorev.analysis import Category
from autorev.report.palette import CATEGORY_COLORS
from autorev.words import CATEGORY_TITLES

CAPACITY_MARK = "|"
CUT_MARK = ">"
"""Ends a bar that is longer than the scale."""

_letters = {
    Category.PARAMETERS: "P",
    Category.GRADIENTS: "G",
    Category.OPTIMIZER_STATE: "O",
    Category.STORED_ACTIVATIONS: "A",
    Category.WORKING_SET: "W",
    Category.STREAMS: "S",
    Category.SIDE_BITS: "B",
    Category.LOGITS_AND_LOSS: "L",
    Category.OTHER: "x",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """Bytes by category on a scale from 0 to `scale`; the last cell is for what lies beyond it."""

    categories: dict[str, int]
    scale: int
    capacity: int | None

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(12, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        color = uses_color(console)
        bar = Text(no_wrap=True, end="")
        mark = int(self.capacity / self.scale * (width - 1)) if self.capacity is not None else None
        cut = sum(self.categories.values()) > self.scale
        for cell in range(width):
            if cut and cell == width - 1:
                bar.append(CUT_MARK, "bold")
                continue
            # Where two categories meet inside a cell, its halves take one colour each.
            left, right = (self._at((cell + part) / (width - 1)) for part in (0.25, 0.75))
            if cell == mark:
                bar.append(CAPACITY_MARK, Style(bold=True, bgcolor=_color(left) if color else None))
            elif color:
                bar.append(*_colored(left, right))
            else:
                middle = self._at((cell + 0.5) / (width - 1))
                bar.append(_letters[middle] if middle else " ")
        yield bar

    def _at(self, fraction: float) -> Category | None:
        """The category that covers this place of the scale."""
        position = fraction * self.scale
        for category in Category:
            position -= self.categories.get(category, 0)
            if position < 0:
                return category
        return None


def legend(shown: list[Category], color: bool, width: int) -> Text:
    """What the colours or letters of a bar stand for, in lines that break between two entries only."""
    text = Text()
    room = width
    for category in shown:
        title = CATEGORY_TITLES[category]
        gap = "" if room == width else "   "
        if len(gap + title) + 2 > room:
            gap, room = "\n", width
        room -= len(gap.strip("\n") + title) + 2
        sign = ("\u2588", CATEGORY_COLORS[category][1]) if color else (_letters[category], "bold")
        text.append_text(Text.assemble(gap, sign, f" {title}"))
    return text


def uses_color(console: Console) -> bool:
    """Whether `console` can show a bar's colours."""
    return console.color_system is not None and not console.no_color


def _color(category: Category | None) -> str | None:
    # Terminals are dark more often than not, and the dark palette is readable on white too.
    return CATEGORY_COLORS[category][1] if category else None


def _colored(left: Category | None, right: Category | None) -> tuple[str, Style]:
    if left is None:
        return " ", Style()
    if left == right:
        return "\u2588", Style(color=_color(left))
    return "\u258c", Style(color=_color(left), bgcolor=_color(right))
