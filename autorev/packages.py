"""Packages that some commands need and others do not: which one is missing, and the command that installs it here."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from autorev.errors import MissingPackageError

_CHECKOUT = Path(__file__).parents[1]
_MODULE = re.compile(r"[A-Za-z_][\w.]*")
_WANTED = re.compile(r"'([A-Za-z][\w.-]*[^']*)' distribution was not found")
_OTHER_VERSION = re.compile(r"(?:^|\s)([A-Za-z][\w.-]*[<>=!~]\S*) is required .*but found (\S+?)\.?(?:\s|$)")
"""In the words of `transformers`."""
_REQUIREMENT = re.compile(r"([\w.-]+)([^;]*);.*extra == ['\"]([\w-]+)['\"]")


def require(what: str, *packages: str) -> None:
    """Raise unless `packages` are installed; `what` needs them (`fine-tuning`).

    Raises:
        MissingPackageError: one is not; says how to install it.
    """
    for package in packages:
        if not is_installed(package):
            raise MissingPackageError(f"{what} needs {package}, which is not installed: {how_to_install(package)}")


def missing_by(error: ImportError) -> str:
    """What an import that failed lacks, and the command that installs it; empty where no package is missing or too old.

    `transformers` looks for what it needs as it is imported, and writes a sentence where Python has the module's name.
    """
    said = f"{error.name} {error}"
    if found := _WANTED.search(said):
        return f"{found[1]}, which is not installed: {pip_install(found[1])}"
    if found := _OTHER_VERSION.search(said):
        return f"{found[1]}, and {found[2]} is installed: {pip_install(found[1])}"
    package = str(error.name).partition(".")[0]
    if _MODULE.fullmatch(error.name or "") and not is_installed(package):
        return f"{package}, which is not installed: {how_to_install(package)}"
    return ""


def is_installed(package: str) -> bool:
    """Is there a package to import by that name?"""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a finder that refuses; or a module put in place by hand, without a spec
        return package in sys.modules


def how_to_install(package: str) -> str:
    """The command for `package` with what else its use needs: an extra of autorev, where one holds it.

    autorev is not on PyPI: its extras are installed from a checkout, and elsewhere by the packages that they stand for.
    """
    extras = _extras()
    holding = [name for name, held in extras.items() if package in held and name != "test"]
    extra = min(holding, key=lambda name: len(extras[name]), default=None)
    if extra is None:
        return pip_install(package)
    if (_CHECKOUT / "pyproject.toml").is_file():
        where = "." if Path.cwd() == _CHECKOUT else str(_CHECKOUT)
        return pip_install("-e", f"{where}[{extra}]")
    return pip_install(*extras[extra].values())


def pip_install(*what: str) -> str:
    """`pip install ...` for this interpreter, whose environment may have no pip of its own."""
    pip = ["pip"] if _has_pip() else ["python3", "-m", "pip", "--python", sys.executable]
    return " ".join([*pip, "install", *(f'"{part}"' if part != shlex.quote(part) else part for part in what)])


def _has_pip() -> bool:
    """Is pip installed here? Looked up without the import system, in which setuptools takes that for a signal."""
    try:
        return bool(version("pip"))
    except PackageNotFoundError:
        return False


def _extras() -> dict[str, dict[str, str]]:
    """Extra -> the packages that it holds -> as pip is given them."""
    found: dict[str, dict[str, str]] = {}
    try:
        listed = requires("autorev") or []
    except PackageNotFoundError:  # run from a checkout that was never installed
        listed = []
    for match in filter(None, map(_REQUIREMENT.match, listed)):
        package, version, extra = match.groups()
        found.setdefault(extra, {})[package] = f"{package}{version.strip()}"
    return found
