"""Stages of a pipeline (`torch.distributed.pipelining`): each would begin its chain anew."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from autorev.errors import ConversionError

_STAGES = "torch.distributed.pipelining.stage"


def check_no_stage(path: str) -> None:
    """Called where a chain begins, with its first block.

    Raises:
        ConversionError: it runs in one of several stages. Each would begin with a velocity of zero, so the function
            would depend on where the model is cut, and a checkpoint of it could be used with no other division.
    """
    module = sys.modules.get(_STAGES)
    frame: FrameType | None = sys._getframe(1) if module is not None else None
    while frame is not None:
        if frame.f_globals.get("__name__") == _STAGES:
            stage: Any = frame.f_locals.get("self")
            if getattr(stage, "num_stages", 1) > 1:
                raise ConversionError(
                    f"{path} begins a chain in stage {stage.stage_index} of a pipeline of {stage.num_stages}: the "
                    "state of a reversible chain does not cross stages, so what is trained would depend on where the "
                    "model is cut. Call autorev.revert on the stage's module, and convert it with method='checkpoint'"
                )
        frame = frame.f_back
