"""What a branch depends on besides its input and its modules: random numbers, autocast, defaults, attention kernels.

They are written down before the first run of a branch, and are in force again around every later one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

Device = tuple[str, int]
"""Type and index, as in ("cuda", 0)."""


def devices_of(*devices: torch.device) -> list[Device]:
    """The accelerators among them: each has a random generator of its own."""
    return sorted({(d.type, d.index or 0) for d in devices if d.type not in ("cpu", "meta")})


class RandomStates:
    """The states of every random stream that a branch may draw from: torch's by device, Python's and numpy's."""

    def __init__(self, devices: list[Device]) -> None:
        self.devices = devices
        self.states = _states(devices)

    def keep_moved(self) -> None:
        """Called after the first run: a stream that it did not draw from need not be put back."""
        after = _states(self.devices)
        self.states = {key: state for key, state in self.states.items() if not _same(state, after[key])}

    def put_back(self) -> None:
        """As they were when this was made."""
        _set(self.states)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """As before the first run; afterwards as if nothing had been drawn."""
        if not self.states:
            yield
            return
        now = _states([key for key in self.states if isinstance(key, tuple)])
        before = {key: now[key] for key in self.states}
        try:
            _set(self.states)
            yield
        finally:
            _set(before)


def _states(devices: list[Device]) -> dict[str | Device, Any]:
    states: dict[str | Device, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    for kind, index in devices:
        module = torch.get_device_module(kind)
        if hasattr(module, "get_rng_state"):
            states[kind, index] = module.get_rng_state(index)
    return states


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, tuple) and len(a) > 2 and hasattr(a[1], "tobytes"):  # numpy's: name, words, position, ...
        return bool(a[2:] == b[2:] and (a[1] == b[1]).all())
    return bool(a == b)


def _set(states: dict[str | Device, Any]) -> None:
    for key, state in states.items():
        if key == "torch":
            torch.set_rng_state(state)
        elif key == "python":
            random.setstate(state)
        elif key == "numpy":
            sys.modules["numpy"].random.set_state(state)
        elif isinstance(key, tuple):
            torch.get_device_module(key[0]).set_rng_state(state, key[1])


_KERNELS = (
    (SDPBackend.FLASH_ATTENTION, "flash_sdp_enabled"),
    (SDPBackend.EFFICIENT_ATTENTION, "mem_efficient_sdp_enabled"),
    (SDPBackend.MATH, "math_sdp_enabled"),
    (SDPBackend.CUDNN_ATTENTION, "cudnn_sdp_enabled"),
)


class Settings:
    """The switches of this thread and process that choose what an operator does."""

    def __init__(self, devices: list[Device]) -> None:
        self.kinds = sorted({"cpu", *(kind for kind, _ in devices)})
        self.autocast = _autocast(self.kinds)
        self.dtype = torch.get_default_dtype()
        self.device = _device_context()
        self.kernels = _kernels()
        self.precision = torch.get_float32_matmul_precision()
        self.deterministic = _deterministic()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """In force again, where they are not."""
        with ExitStack() as stack:
            for state, current in zip(self.autocast, _autocast(self.kinds), strict=True):
                if state != current:
                    kind, enabled, dtype = state
                    stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
            if torch.get_default_dtype() != self.dtype:
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self.dtype)
            if _device_context() != self.device:
                stack.enter_context(torch.device(self.device or "cpu"))
            if _kernels() != self.kernels:
                stack.enter_context(sdpa_kernel(list(self.kernels)))
            if torch.get_float32_matmul_precision() != self.precision:
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision(self.precision)
            if _deterministic() != self.deterministic:
                now, warn = _deterministic()
                stack.callback(torch.use_deterministic_algorithms, now, warn_only=warn)
                enabled, warn = self.deterministic
                torch.use_deterministic_algorithms(enabled, warn_only=warn)
            yield


def _autocast(kinds: list[str]) -> list[tuple[str, bool, torch.dtype]]:
    return [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in kinds
        if torch.amp.is_autocast_available(kind)
    ]


def _device_context() -> torch.device | None:
    """The innermost `with torch.device(...)` or `torch.set_default_device`."""
    modes = (mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, DeviceContext))
    return next((torch.device(mode.device) for mode in modes), None)


def _kernels() -> tuple[SDPBackend, ...]:
    return tuple(backend for backend, asked in _KERNELS if getattr(torch.backends.cuda, asked)())


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
