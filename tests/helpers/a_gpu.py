"""A CPU that torchao's offloading optimiser takes for a GPU: no stream runs beside, and no memory is pinned."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from autorev.optimizers import Optimizer


class Stream:
    """Of a GPU that is not there."""

    def wait_stream(self, other: Any) -> None:
        """Nothing runs beside."""

    def record_event(self) -> Any:
        """Done already."""
        return self

    def synchronize(self) -> None:
        """Likewise."""


def be_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends."""
    offload = pytest.importorskip("torchao.optim.cpu_offload")
    empty_like = torch.empty_like
    monkeypatch.setattr(offload, "get_available_devices", lambda: ["cpu", "xpu"])
    monkeypatch.setattr(torch.xpu, "Stream", Stream)
    monkeypatch.setattr(torch.xpu, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.xpu, "current_stream", Stream)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, pin_memory=False, **how: empty_like(tensor, **how))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(Optimizer, "check_device", lambda self, kind: None)
