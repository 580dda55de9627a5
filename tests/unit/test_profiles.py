"""Profiles: all of them valid, sourced and true to their models; wrong ones refused with the field's name."""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autorev.errors import ProfileError
from autorev.profiles import device_names, load_device, load_model, main, model_names

ROOT = Path(__file__).parents[2]
Edit = Callable[[dict[str, Any]], Any]


def written(folder: Path, kind: str, name: str, edit: Edit) -> Path:
    """A copy of one of autorev's own profiles, changed by `edit`."""
    data = json.loads((ROOT / "profiles" / kind / f"{name}.json").read_text())
    edit(data)
    path = folder / "mine.json"
    path.write_text(json.dumps(data))
    return path


def test_all_profiles_follow_their_schemas(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m autorev.profiles` finds every profile valid and prints one line for each."""
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(device_names()) + len(model_names())


@pytest.mark.parametrize("kind", ["devices", "models"])
def test_schemas_are_valid_schemas(kind: str) -> None:
    """The published schemas follow JSON Schema, draft 2020-12, themselves."""
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(json.loads((ROOT / "profiles" / f"{kind}.schema.json").read_text()))


@pytest.mark.parametrize("name", device_names())
def test_every_figure_of_a_device_has_a_source(name: str) -> None:
    """No figure stands in a device profile without saying where it comes from."""
    device = load_device(name)
    assert device.name == name
    assert device.sources.keys() == {"memory_bytes", "peak_flops", "bandwidth", "host_bandwidth"}
    assert device.sources["peak_flops"].keys() == device.peak_flops.keys()


@pytest.mark.parametrize("name", device_names())
def test_figures_of_a_device_are_of_the_right_order(name: str) -> None:
    """A wrong unit, a figure with sparsity or one for both directions would break these relations."""
    device = load_device(name)
    flops = {dtype: peak for dtype, peak in device.peak_flops.items() if peak is not None}
    assert device.memory_bytes % 1024 == 0
    assert device.host_bandwidth < device.bandwidth < 10e12
    assert flops["fp32"] < 100e12
    assert all(peak < 1e15 for peak in flops.values())
    assert len({flops[dtype] for dtype in ("bf16", "fp16") if dtype in flops}) == 1
    if "tf32" in flops:
        assert 1.9 < flops["bf16"] / flops["tf32"] < 2.1


def test_info_gives_the_figures_of_one_dtype() -> None:
    """The analysis gets the peak rate of its own dtype."""
    device = load_device("rtx-3090")
    info = device.info("bf16")
    assert (info.name, info.peak_flops, info.memory_bytes) == ("rtx-3090", 71e12, 24576 * 2**20)
    assert device.info("fp32").peak_flops == 35.6e12


@pytest.mark.parametrize(("name", "dtype"), [("t4", "bf16"), ("cpu", "fp16"), ("h100-80gb", "fp8")])
def test_a_dtype_that_the_device_lacks_is_refused(name: str, dtype: str) -> None:
    """The error names the dtype and those the device does have."""
    with pytest.raises(ProfileError, match=f"{name} does not compute in {dtype}; its dtypes are .*fp32"):
        load_device(name).info(dtype)


@pytest.mark.parametrize("name", model_names())
def test_a_model_profile_builds_with_its_parameter_count(name: str) -> None:
    """The configuration gives the class it names, with exactly as many parameters as the public model."""
    transformers = pytest.importorskip("transformers")
    profile = load_model(name)
    assert profile.name == name
    config = transformers.AutoConfig.for_model(**profile.config)
    (architecture,) = profile.config["architectures"]
    images = architecture.endswith("ForImageClassification")
    auto = transformers.AutoModelForImageClassification if images else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    assert type(model).__name__ == architecture
    assert sum(parameter.numel() for parameter in model.parameters()) == profile.parameters


@pytest.mark.parametrize("name", model_names())
def test_transformers_takes_every_key_of_a_model_profile(name: str) -> None:
    """No key of a configuration is lost: rotary settings move to where transformers 5 keeps them."""
    transformers = pytest.importorskip("transformers")
    public = dict(load_model(name).config)
    config = transformers.AutoConfig.for_model(**public)
    rotary: dict[str, Any] = public.pop("rope_scaling", None) or {}
    if "rope_theta" in public:
        rotary["rope_theta"] = public.pop("rope_theta")
        assert rotary.items() <= config.rope_parameters.items()
    assert {key: getattr(config, key) for key in public} == public


def test_a_name_or_a_path_is_the_same_profile(tmp_path: Path) -> None:
    """A copy of a profile, given by its path, reads as the profile does by its name."""
    assert load_device(written(tmp_path, "devices", "a10", lambda data: None)) == load_device("a10")
    assert load_model(str(written(tmp_path, "models", "gpt2", lambda data: None))) == load_model("gpt2")


@pytest.mark.parametrize(
    ("load", "name", "guess", "listed"),
    [
        (load_device, "h100", "h100-80gb", "rtx-4090"),
        (load_device, "RTX-4090", "rtx-4090", "cpu"),
        (load_model, "lama-3.1-8b", "llama-3.1-8b", "gpt2"),
        (load_model, "meta-llama/Llama-3.1-8B", "llama-3.1-8b", "vit-large"),
        (load_model, "no/such/gpt2.json", "gpt2", "mixtral-8x7b"),
    ],
)
def test_an_unknown_name_gets_close_matches_and_the_list(
    load: Callable[[str], object], name: str, guess: str, listed: str
) -> None:
    """A mistyped name is answered with the nearest ones, then with all of them."""
    with pytest.raises(ProfileError) as raised:
        load(name)
    hint, _, rest = str(raised.value).partition("?")
    assert name in hint
    assert guess in hint
    assert listed in rest


def test_a_name_like_no_other_gets_the_list() -> None:
    """Without a close match the error still says which profiles there are."""
    with pytest.raises(ProfileError, match=r"JSON file\. The device profiles are: a10, .*t4$"):
        load_device("quantum")


def test_broken_json_is_reported_with_line_and_column(tmp_path: Path) -> None:
    """A syntax error is found by its place in the file."""
    path = tmp_path / "mine.json"
    path.write_text('{\n  "name": "mine",\n  "title" "Mine"\n}\n')
    with pytest.raises(ProfileError, match=r"mine\.json is not valid JSON \(line 3, column 11"):
        load_device(path)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[1, 2]", b"null", b"", b"{}"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: bytes) -> None:
    """Whatever a file holds, the answer is an error that names the file."""
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    for load in (load_device, load_model):
        with pytest.raises(ProfileError, match=r"mine\.json"):
            load(path)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda data: data.pop("bandwidth"),
            [r"$.bandwidth is missing", "bytes per second of device memory"],
        ),
        (lambda data: data["peak_flops"].pop("bf16"), ["$.peak_flops.bf16 is missing", "FLOP/s", "null"]),
        (lambda data: data["sources"].pop("memory_bytes"), ["$.sources.memory_bytes is missing", "source"]),
        (
            lambda data: data["sources"]["peak_flops"].pop("tf32"),
            ["$.sources.peak_flops.tf32 is missing", "the source of this figure"],
        ),
        (
            lambda data: data.update(memory_bytes="80 GB"),
            ["$.memory_bytes: '80 GB'", "bytes of device memory"],
        ),
        (lambda data: data.update(memory_bytes=0.5), ["$.memory_bytes: 0.5", "integer"]),
        (lambda data: data.update(bandwidth=None), ["$.bandwidth: None", "bytes per second"]),
        (lambda data: data.update(host_bandwidth=-1), ["$.host_bandwidth: -1", "one direction"]),
        (
            lambda data: data["peak_flops"].update(fp16="989 TFLOPS"),
            ["$.peak_flops.fp16: '989 TFLOPS'", "dense"],
        ),
        (lambda data: data.update(kind="tpu"), ["$.kind: 'tpu'", '"cuda" or "cpu"']),
        (lambda data: data.update(name="My GPU"), ["$.name: 'My GPU'", "lower case"]),
        (
            lambda data: data["sources"].update(bandwidth=""),
            ["$.sources.bandwidth: ''", "the source of this"],
        ),
        (lambda data: data.update(watts=700), ["$.watts: no such field", "memory_bytes"]),
        (lambda data: data["peak_flops"].update(fp8=1e15), ["$.peak_flops.fp8: no such field", "fp32, tf32"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_device_profile_is_refused_with_the_field(tmp_path: Path, edit: Edit, expected: list[str]) -> None:
    """The error names the file, the path of the wrong field, and what is expected there."""
    with pytest.raises(ProfileError) as raised:
        load_device(written(tmp_path, "devices", "h100-80gb", edit))
    assert all(part in str(raised.value) for part in ["mine.json: not a device profile", *expected])
    assert str(raised.value).count("(expected: ") == 1, "one mistake, one problem"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda data: data.pop("config"), ["$.config is missing", "config.json"]),
        (lambda data: data["config"].pop("model_type"), ["$.config.model_type is missing", "family"]),
        (lambda data: data.update(parameters="124M"), ["$.parameters: '124M'", "tied weights count once"]),
        (lambda data: data.update(hub_id="gpt2"), ["$.hub_id: 'gpt2'", "Hugging Face Hub"]),
        (
            lambda data: data["config"].update(architectures=[]),
            ["$.config.architectures: []", "a list of one"],
        ),
        (lambda data: data["config"].update(architectures=[7]), ["$.config.architectures[0]: 7", "class"]),
        (lambda data: data.update(weights="w"), ["$.weights: no such field", "hub_id"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_model_profile_is_refused_with_the_field(tmp_path: Path, edit: Edit, expected: list[str]) -> None:
    """The error names the file, the path of the wrong field, and what is expected there."""
    with pytest.raises(ProfileError) as raised:
        load_model(written(tmp_path, "models", "gpt2", edit))
    assert all(part in str(raised.value) for part in ["mine.json: not a model profile", *expected])
    assert str(raised.value).count("(expected: ") == 1, "one mistake, one problem"


def test_several_mistakes_are_reported_together(tmp_path: Path) -> None:
    """Each mistake is named once, so that one run is enough to mend a file."""

    def edit(data: dict[str, Any]) -> None:
        del data["title"], data["peak_flops"]
        data |= {"kind": 3, "watts": 700, "price": 1}

    with pytest.raises(ProfileError) as raised:
        load_device(written(tmp_path, "devices", "a10", edit))
    for field in ("$.title is", "$.peak_flops is", "$.kind:", "$.watts, $.price:"):
        assert str(raised.value).count(field) == 1


def test_the_command_checks_the_files_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Good and bad files get one line each, of the kind they mean to be, and the exit status is 1."""
    bad = written(tmp_path, "models", "gpt2", lambda data: data.pop("config")).rename(tmp_path / "bad.json")
    good = written(tmp_path, "devices", "a10", lambda data: None)
    assert main([str(good), str(bad), str(tmp_path / "none.json")]) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"{good}: a valid device profile"
    assert second.startswith(f"{bad}: not a model profile: $.config is missing")
    assert third == f"{tmp_path / 'none.json'} cannot be read: No such file or directory"
    assert main([str(good)]) == 0


def test_an_installed_package_reads_its_own_copy_without_torch(tmp_path: Path) -> None:
    """Laid out as the wheel lays it out, the package finds every profile and imports no framework."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copies = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    (tmp_path / "autorev" / "_profiles").mkdir(parents=True)
    for module in ("__init__", "analysis", "errors", "files", "given", "optimizers", "profiles", "records", "setting"):
        shutil.copy(ROOT / "autorev" / f"{module}.py", tmp_path / "autorev")
    for source, target in copies.items():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / target)
    # Some other package's folder of that name must not be taken for the checkout's.
    (tmp_path / "profiles").mkdir()
    program = (
        "import sys, autorev.profiles as profiles; "
        "print(profiles.device_names() + profiles.model_names()); "
        "print(profiles.load_device('a10').name, profiles.load_model('gpt2').name); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.stdout.splitlines() == [str(device_names() + model_names()), "a10 gpt2"]
