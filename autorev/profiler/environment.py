"""Where a profile was measured, read once per run; and budgets of memory as people write them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import autorev
from autorev.errors import ProfileError, SettingError
from autorev.profiler.record import Environment
from autorev.profiles import DeviceProfile, device_names, load_device

_PACKAGES = ("torch", "transformers", "peft", "gguf")
_SIZE = re.compile(r"(\+?)(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def environment(on: str, threads: int) -> Environment:
    """Of this process; `on` is cpu or cuda."""
    versions = {"autorev": autorev.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if on == "cuda":
        machine = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        machine = _processor()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Environment(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=machine,
        system=f"{platform.system()} {platform.release()}",
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_bytes=memory,
        versions=versions,
        commit=_commit(),
    )


def device_profile(on: str, name: str | None) -> DeviceProfile:
    """The device profile that figures are relative to: `name`, or the one of this machine's device.

    Raises:
        ProfileError: there is none of that name, or none of this GPU.
    """
    if name is not None:
        return load_device(name)
    if on == "cpu":
        return load_device("cpu")
    gpu = torch.cuda.get_device_name()
    words = set(re.findall(r"[a-z0-9]+", gpu.lower()))
    for known in device_names():
        title = set(re.findall(r"[a-z0-9]+", load_device(known).title.lower()))
        if known.split("-")[0] in words and title & words:
            return load_device(known)
    raise ProfileError(f"there is no device profile of {gpu}; give the one nearest to it with --device, of " + _names())


def _names() -> str:
    return ", ".join(device_names())


def parse_memory(text: str) -> tuple[int, bool]:
    """`2GiB` -> (2147483648, False); `+128MiB` -> (134217728, True): beside weights, gradients and optimiser state.

    Raises:
        SettingError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    size = 0 if match is None else float(match[2])
    if match is None or not 0 < size < 1e18:
        raise SettingError(f"{text!r} is no amount of memory; write 2GiB, 500MB or, beside the weights, +128MiB")
    power = " KMGT".index(match[3].upper() or " ")
    return round(size * (1024 if match[4] else 1000) ** power), bool(match[1])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout that this package lies in."""
    root = Path(autorev.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    commands = (["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "--", "autorev"])
    try:
        head, changes = (
            subprocess.run(c, cwd=root, capture_output=True, text=True, check=True).stdout.strip() for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+" if changes else head
