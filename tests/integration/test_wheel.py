"""A wheel of the checkout, in an environment of its own: it analyses, converts and reports outside the checkout.

The environment sees the packages that the tests run with, so that nothing is downloaded, and not the checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONVERT = """
import autorev, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM

assert not Path(autorev.__file__).is_relative_to({checkout!r}), autorev.__file__
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({folder!r}))
print(autorev.convert(model))
tokens = torch.zeros(1, 16, dtype=torch.long)
model(input_ids=tokens, labels=tokens).loss.backward()
print(autorev.drift(model))
print(autorev.revert(model))
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259,
    "max_position_embeddings": 64,
}  # fmt: skip

pytestmark = pytest.mark.slow


def done(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the backend that pyproject names."""
    pytest.importorskip("hatchling", reason="it builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    done(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment's folder of programs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = (Path(sys.base_prefix) / "bin" / "python3", "-m", "pip", "--python", folder / "bin" / "python")
    done(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # Only packages: the editable autorev of a checkout is a .pth file, and those of added folders are not read.
    (packages / "tests.pth").write_text("\n".join(p for p in sys.path if Path(p).name == "site-packages"))
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a model's config, outside the checkout."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_the_wheel_carries_its_data(wheel: Path) -> None:
    """Profiles, their schemas and templates; no tests, no benchmarks."""
    names = zipfile.ZipFile(wheel).namelist()
    for kind in ("devices", "models"):
        files = [path.name for path in (ROOT / "profiles" / kind).glob("*.json")]
        assert {f"autorev/_profiles/{kind}/{name}" for name in files} <= set(names)
        assert f"autorev/_profiles/{kind}.schema.json" in names
    sources = [p for p in (ROOT / "autorev").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {str(path.relative_to(ROOT)) for path in sources} <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"autorev"}


def test_it_analyses_and_reports(installed: Path, elsewhere: Path) -> None:
    """A folder's config, on a device of the wheel's own profiles; the record is shown and rendered as a page."""
    how = ("--sequence", "32", "--device", "h100-80gb", "--json", "--html", "analysed.html")
    (elsewhere / "record.json").write_text(done(installed / "autorev", "analyze", "tiny", *how, cwd=elsewhere))
    shown = done(installed / "autorev", "report", "record.json", "--html", "rendered.html", cwd=elsewhere)
    assert "4 of 4 blocks can be made reversible" in shown
    assert "H100" in shown
    for page in ("analysed.html", "rendered.html"):
        assert "<html" in (elsewhere / page).read_text(encoding="utf-8")


def test_it_has_the_profiles(installed: Path, elsewhere: Path) -> None:
    """Valid ones, and models by name as in a checkout."""
    done(installed / "python", "-m", "autorev.profiles", cwd=elsewhere)
    program = "from autorev.models.resolve import resolve; print(resolve('llama-3.1-8b').source)"
    assert done(installed / "python", "-c", program, cwd=elsewhere) == "profile llama-3.1-8b\n"


def test_it_converts(installed: Path, elsewhere: Path) -> None:
    """A model made in the user's own program, without the checkout on its path."""
    program = CONVERT.format(checkout=str(ROOT), folder="tiny")
    printed = done(installed / "python", "-c", program, cwd=elsewhere)
    assert "model.layers: 4 blocks reversible" in printed
    assert "{'model.layers': 0.0}" in printed
