"""What `profile` may be asked for: goals, optimisers, sweeps, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autorev.errors import SettingError
from autorev.given import is_count, is_number, no_function
from autorev.profiler.passes.sweep import UNITS
from autorev.profiler.record import GOALS
from autorev.profiler.subject import Subject
from autorev.setting import CHOICES


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """`batch`, or `batch=1,2,4`."""

    axis: str
    values: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> SweepRequest:
        """From the command line's form.

        Raises:
            SettingError: it is none.
        """
        axis, equals, values = text.partition("=") if isinstance(text, str) else (text, "", "")
        if axis not in UNITS:
            raise SettingError(f"a sweep goes along {', '.join(UNITS)}, not {axis!r}")
        try:
            numbers = tuple(int(value) for value in values.split(",")) if equals else ()
        except ValueError:
            raise SettingError(f"the sizes of the sweep {text!r} are whole numbers, as in {axis}=1,2,4") from None
        if any(number < 1 for number in numbers):
            raise SettingError(f"the sizes of the sweep {text!r} are 1 or more")
        if axis == "depth" and not numbers:
            raise SettingError("a sweep along depth needs its depths, as in depth=8,16,32")
        return cls(axis, tuple(sorted(set(numbers))))


def parse_sweeps(texts: str | Iterable[str]) -> list[SweepRequest]:
    """One sweep as text, or several.

    Raises:
        SettingError: one is none.
    """
    if not isinstance(texts, Iterable):
        raise SettingError(f"sweeps are text, or a list of it, not {texts!r}")
    return [SweepRequest.parse(text) for text in ([texts] if isinstance(texts, str) else texts)]


def check_options(goal: str, rounds: int, timed_steps: int, trains: str, longest_step: float, progress: Any) -> None:
    """Raises:
    SettingError: an option of `profile` makes no sense, whatever the model.
    """
    if wrong := no_function(progress=progress):
        raise SettingError(wrong)
    if goal not in GOALS:
        raise SettingError(f"a goal is one of {', '.join(GOALS)}, not {goal!r}")
    if not is_count(rounds) or not is_count(timed_steps):
        raise SettingError(f"rounds and timed_steps are whole numbers, 1 or more, not {rounds!r} and {timed_steps!r}")
    if not (is_number(longest_step) and longest_step > 0):
        raise SettingError(f"longest_step is a number of seconds above 0, not {longest_step!r}")
    if trains not in CHOICES["trains"]:
        raise SettingError(f"trains is full, lora or head, not {trains!r}")


def check_sweeps(requests: list[SweepRequest], subject: Subject) -> None:
    """Raises:
    SettingError: the model has no such axis.
    """
    for request in requests:
        if subject.live is not None or (request.axis == "batch" and not subject.resizable):
            raise SettingError(f"the batch of {subject.info.name} is given, so its size cannot be swept")
        if request.axis == "sequence" and subject.setting.sequence is None:
            raise SettingError(f"{subject.info.name} has no sequence axis to sweep along")
        if request.axis == "depth" and subject.pretrained:
            raise SettingError(f"{subject.info.name} has weights of one depth; sweep the depth of a config or profile")
