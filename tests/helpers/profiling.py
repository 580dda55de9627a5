"""Profiles of tiny models, and jobs of them."""

from __future__ import annotations

from typing import Any

from autorev.in_place import Blocks
from autorev.methods import Method
from autorev.profiler.job import Job, Source
from autorev.profiler.record import Profile
from autorev.profiler.run import profile
from autorev.setting import Setting


def run(model: Any = "profiled_net:make", *specs: str, **options: Any) -> Profile:
    """A profile of one round of one step."""
    return profile(model, methods=specs or ("plain", "checkpoint"), **{"rounds": 1, "timed_steps": 1, **options})


def job_of(factory: str) -> Job:
    """One method of a factory's model, for a process of its own."""
    source = Source(f"profiled_net:{factory}", None, None, None, "cpu", 1)
    blocks = Blocks(tuple(f"blocks.{n}" for n in range(4)), inline=False, draws_random=False)
    setting = Setting(4, None, "fp32", "adamw", "full", None, "full", "this machine")
    return Job(source, Method.parse("plain"), blocks, setting, 0, 1, 1, passes=False)
