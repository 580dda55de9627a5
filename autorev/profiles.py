"""Device and model profiles: JSON files, checked against a published schema, as frozen data.

A profile is asked for by its name (a file of the profiles folder) or by the path of a JSON file.
`python -m autorev.profiles [FILE...]` checks the files given, or every profile of that folder.

Reading a profile needs neither torch nor transformers; jsonschema is imported when a file is checked.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autorev.analysis import DeviceInfo
from autorev.errors import ProfileError, UnreadableError
from autorev.files import path_of, read_json, shortened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jsonschema import ValidationError

Kind = Literal["device", "model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProfile:
    """A device: how much memory it has, and how fast it computes and moves bytes at best."""

    name: str
    title: str
    kind: str
    """cuda or cpu."""
    memory_bytes: int
    peak_flops: dict[str, float | None]
    """FLOP/s by dtype (fp32, tf32, bf16, fp16), dense; None where the device has no such format."""
    bandwidth: float
    """Bytes per second of device memory."""
    host_bandwidth: float
    """Bytes per second between host and device, one direction."""
    sources: dict[str, Any]
    """Where each figure comes from, in words, under the figure's own name."""

    def info(self, dtype: str) -> DeviceInfo:
        """The figures that hold for `dtype`.

        Raises:
            ProfileError: the device does not compute in `dtype`.
        """
        peak = self.peak_flops.get(dtype)
        if peak is None:
            known = ", ".join(name for name, flops in self.peak_flops.items() if flops is not None)
            raise ProfileError(f"device {self.name} does not compute in {dtype}; its dtypes are {known}")
        return DeviceInfo(
            name=self.name,
            title=self.title,
            memory_bytes=int(self.memory_bytes),  # JSON counts 24e9 as an integer
            peak_flops=float(peak),
            bandwidth=float(self.bandwidth),
            host_bandwidth=float(self.host_bandwidth),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProfile:
    """A public model: all that is needed to build it without a download."""

    name: str
    title: str
    hub_id: str
    source: str
    """Where the configuration comes from, in words."""
    parameters: int
    """Number of parameter elements; tied weights count once."""
    config: dict[str, Any]
    """Keyword arguments of `transformers.AutoConfig.for_model`."""


def load_device(name_or_path: str | Path) -> DeviceProfile:
    """The device profile of that name, or the one in that JSON file.

    Raises:
        ProfileError: there is no such profile, or it does not follow its schema.
    """
    path = _find("device", name_or_path)
    return DeviceProfile(**_checked("device", path, _parsed(path)))


def load_model(name_or_path: str | Path) -> ModelProfile:
    """The model profile of that name, or the one in that JSON file.

    Raises:
        ProfileError: there is no such profile, or it does not follow its schema.
    """
    path = _find("model", name_or_path)
    return ModelProfile(**_checked("model", path, _parsed(path)))


def device_names() -> tuple[str, ...]:
    """Every name that `load_device` knows, sorted."""
    return tuple(_files("device"))


def model_names() -> tuple[str, ...]:
    """Every name that `load_model` knows, sorted."""
    return tuple(_files("model"))


def _folder() -> Path:
    """The checkout's `profiles/`, or the copy that an installed package carries."""
    package = Path(__file__).parent
    checkout = package.parent / "profiles"
    # Beside an installed package stand other packages, and one of them may be called `profiles`.
    return checkout if (checkout / "devices.schema.json").is_file() else package / "_profiles"


def _files(kind: Kind) -> dict[str, Path]:
    return {path.stem: path for path in sorted((_folder() / f"{kind}s").glob("*.json"))}


def _schema(kind: Kind) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((_folder() / f"{kind}s.schema.json").read_text(encoding="utf-8"))
    return schema


def _find(kind: Kind, name_or_path: str | Path) -> Path:
    files = _files(kind)
    if str(name_or_path) in files:
        return files[str(name_or_path)]
    path = path_of(name_or_path)
    if path.is_file():
        return path
    # A mistyped path ends in a name that can be compared, and so does a Hub id.
    close = get_close_matches(path.name.removesuffix(".json").lower(), files)
    guess = f"; did you mean {' or '.join(close)}?" if close else "."
    raise ProfileError(
        f"{shortened(str(name_or_path))} is neither a {kind} profile nor a JSON file{guess} The {kind} profiles are: "
        f"{', '.join(files)}"
    )


def _parsed(path: Path) -> object:
    try:
        found: object = read_json(path)
    except UnreadableError as error:
        raise ProfileError(f"{path} {error}") from None
    return found


def _checked(kind: Kind, path: Path, data: object) -> dict[str, Any]:
    """`data`, once it follows the schema of its kind."""
    from jsonschema import Draft202012Validator

    schema = _schema(kind)
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: not a {kind} profile: $ is not an object (expected: {schema['description']})")
    errors = sorted(Draft202012Validator(schema).iter_errors(data), key=lambda error: error.json_path)
    # jsonschema reports each missing field by itself, and `_problems` names them all each time.
    problems = dict.fromkeys(problem for error in errors for problem in _problems(error))
    if problems:
        raise ProfileError(f"{path}: not a {kind} profile: {'; '.join(problems)}")
    return data


def _problems(error: ValidationError) -> Iterator[str]:
    """Which field is wrong, how, and what the schema expects there."""
    fields = error.schema.get("properties", {})
    if error.validator == "required":
        for name in error.validator_value:
            if name not in error.instance:
                expected = fields.get(name, {}).get("description", "the source of this figure")
                yield f"{error.json_path}.{name} is missing (expected: {expected})"
    elif error.validator == "additionalProperties":
        unknown = ", ".join(f"{error.json_path}.{name}" for name in error.instance if name not in fields)
        yield f"{unknown}: no such field (expected: {', '.join(fields)})"
    else:
        yield f"{error.json_path}: {error.message} (expected: {error.schema['description']})"


def _kind(data: object) -> Kind:
    """What `data` means to be: the kind with which it shares more fields."""
    kinds: tuple[Kind, ...] = ("device", "model")
    names = data.keys() if isinstance(data, dict) else set()
    return max(kinds, key=lambda kind: len(names & _schema(kind)["properties"].keys()))


def main(arguments: list[str]) -> int:
    """Check the files given, or every profile; print one line each. 1 when any is wrong, else 0."""
    from argparse import ArgumentParser

    parser = ArgumentParser(prog="python -m autorev.profiles", description="Check device and model profiles.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="JSON files (default: autorev's own profiles)")
    given = [Path(file) for file in parser.parse_args(arguments).files]
    failed = False
    for path in given or [*_files("device").values(), *_files("model").values()]:
        try:
            data = _parsed(path)
            kind = _kind(data)
            _checked(kind, path, data)
            print(f"{path}: a valid {kind} profile")
        except ProfileError as error:
            failed = True
            print(error)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
