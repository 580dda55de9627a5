"""A headless Chromium for the tests of the reports.

Needs Debian's chromium and chromium-driver; as root they are installed when they are missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
def programs() -> tuple[str, str]:
    """Chromium and its driver, installed if this is root and they are missing."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        reason = install()
        if reason:
            print(f"\nSKIPPED: no test of the report in a browser: {reason}", file=sys.__stderr__)
            pytest.skip(reason)
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver
    return chromium, driver


def install() -> str:
    """Why Chromium could not be installed; empty when it was."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("apt-get"):
        return "chromium and chromedriver are missing; as root: apt-get install chromium chromium-driver"
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "chromium", "chromium-driver"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}"
    return ""


@pytest.fixture
def browser(programs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Chromium with an empty profile that logs its console and its network."""
    from selenium import webdriver

    # The driver is spoken to over localhost, which a proxy cannot reach.
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()
