"""What a person sees of a run while it goes on: a line with loss, speed, memory and drift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from autorev.format import format_bytes


class Told(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Tells `progress` after every step, and `save` after every checkpoint."""

    def __init__(self, progress: Callable[[str, float], None], save: Callable[[], None]) -> None:
        self.progress, self.save = progress, save
        self._memory = self._validation = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One step, or the evaluation after it: beside later steps, it is said which one it belongs to."""
        done = state.global_step / max(state.max_steps, 1)
        if "eval_loss" in logs:
            now = f"validation {logs['eval_loss']:.3f}"
            self._validation = f", {now} after step {state.global_step}"
            self.progress(f"step {state.global_step} of {state.max_steps}: {now}", done)
        if "loss" not in logs:
            return
        if "peak_bytes" in logs:
            self._memory = f", {format_bytes(logs['peak_bytes'])}"
        speed = f", {logs['tokens'] / logs['seconds']:.0f} tokens/s" if logs.get("tokens") else ""
        drift = f", drift {logs['drift']:g}" if "drift" in logs else ""
        bits = f", {logs['side_bits']:.2g} side bits" if "side_bits" in logs else ""
        self.progress(
            f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}{self._validation}{speed}"
            f"{self._memory}{bits}{drift}",
            done,
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is whole."""
        self.save()
