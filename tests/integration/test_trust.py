"""Code that a model's files bring or name runs where the user says so, and nowhere else."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import autorev
from autorev.cli import main
from autorev.errors import UntrustedCodeError
from autorev.finetuning.record import FILE
from autorev.models.load import load_model, tokenizer_of
from autorev.models.resolve import recorded_model, resolve
from autorev.models.trust import check_config
from tests.helpers import finetune_examples
from tests.helpers.zoo import HEADS

CONFIG = {"model_type": "llama", **HEADS, "num_hidden_layers": 2}
CONFIGURING = """
from pathlib import Path
from transformers import LlamaConfig

Path("ran").touch()

class OwnConfig(LlamaConfig):
    model_type = "autorev-tests-own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZING = """
from pathlib import Path
Path("ran").touch()
class OwnTokenizer: ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Code that runs leaves the file `ran` in the folder where the command was given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "payload.py").write_text("from pathlib import Path\ndef make(): Path('ran').touch()\n")
    yield tmp_path
    sys.modules.pop("payload", None)


def own_model(folder: Path) -> Path:
    """A model with code of its own, as the hub has them."""
    found = folder / "own"
    found.mkdir()
    named = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {**CONFIG, "model_type": "autorev-tests-own", "auto_map": named, "architectures": ["OwnForCausalLM"]}
    (found / "config.json").write_text(json.dumps(config))
    (found / "configuration_own.py").write_text(CONFIGURING)
    (found / "modeling_own.py").write_text(MODELING)
    return found


def run(*arguments: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments], input=answer)


def refused(result: Result, words: str) -> None:
    assert result.exit_code == 1, result.output
    assert words in result.stderr
    assert "bug in autorev" not in result.stderr
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("analyze", "own", "--no-html"),
        ("verify", "own"),
        ("profile", "own", "--predict", "--no-html"),
        ("finetune", "own", "--out", "out"),
        ("evaluate", "own"),
        ("export", "own", "--out", "out"),
    ],
)
def test_code_beside_a_config_is_not_run(folder: Path, command: tuple[str, ...]) -> None:
    """Nobody is asked on the terminal, whatever is typed there, and the error names the option."""
    own_model(folder)
    if command[0] == "export":
        data = json.loads((folder / "own" / "config.json").read_text())
        (folder / "own" / "config.json").write_text(json.dumps({**data, "autorev": {}}))
    refused(run(*command, answer="y\n" * 9), "--trust-remote-code")


@pytest.mark.usefixtures("without_predictions")
def test_code_beside_a_config_runs_when_it_is_trusted(folder: Path) -> None:
    """With the option, and with the keyword in Python, its own class is analysed and verified."""
    own_model(folder)
    result = run("verify", "own", "--seq", 8, "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.stdout
    assert Path("ran").exists()
    result = run("analyze", "own", "--seq", 8, "--no-html", "--trust-remote-code")
    assert "OwnForCausalLM" in result.stdout, result.output
    with pytest.raises(UntrustedCodeError, match="trust_remote_code"):
        autorev.predict("own", sequence=8)
    assert autorev.predict("own", sequence=8, trust_remote_code=True).model.class_name == "OwnForCausalLM"


def test_a_trusted_model_is_loaded_with_its_weights(folder: Path) -> None:
    """A folder of weights with code of its own."""
    own = own_model(folder)
    model = load_model("own", torch.float32, 1, 8, trust_remote_code=True).model
    model.save_pretrained(own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "auto_map": _auto_map()}))
    again = load_model("own", torch.float32, 1, 8, trust_remote_code=True)
    assert again.pretrained
    assert all(map(torch.equal, model.parameters(), again.model.parameters()))
    with pytest.raises(UntrustedCodeError):
        load_model("own", torch.float32, 1, 8)


def _auto_map() -> dict[str, str]:
    return {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "org/kernel"},
        {"_attn_implementation": "org/kernel@main:function"},
        {"attn_implementation": "paged|org/kernel"},
        {"_attn_implementation": {"": "sdpa", "text_config": "org/kernel"}},
        {"experts_implementation": "org/kernel"},
        {"_attn_implementation_internal": "org/kernel"} | {"attn_implementation": "org/kernel"},
        {"text_config": {"model_type": "llama", "attn_implementation": "org/kernel"}},
        {"parts": [{"experts_implementation": "org/kernel"}]},
    ],
)
def test_a_kernel_of_the_hub_is_not_fetched(folder: Path, entry: dict[str, object]) -> None:
    """Wherever in a config it is named; `trusted` lets it pass."""
    with pytest.raises(UntrustedCodeError, match="org/kernel"):
        check_config({**CONFIG, **entry}, "config.json", trusted=False)
    check_config({**CONFIG, **entry}, "config.json", trusted=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **entry}))
    refused(run("analyze", "config.json", "--no-html"), "--trust-remote-code")
    refused(run("verify", "."), "--trust-remote-code")


@pytest.mark.parametrize("kind", ["sdpa", "eager", "flash_attention_2", "paged|eager", None])
def test_ordinary_attention_is_no_kernel(kind: str | None) -> None:
    """Names that `transformers` implements itself; and code beside a type that it knows stays unused."""
    check_config({**CONFIG, "attn_implementation": kind}, "config.json", trusted=False)
    check_config({**CONFIG, "auto_map": {"AutoModel": "own.Model"}}, "config.json", trusted=False)


@pytest.mark.parametrize("kind", ["flash_attention_2", "flash_attention_3", "paged|flash_attention_2"])
def test_attention_whose_package_is_missing_is_not_fetched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` takes a kernel of the hub in its place, where it can."""
    monkeypatch.setattr("autorev.models.trust.is_installed", lambda package: True)
    monkeypatch.setattr(f"transformers.utils.import_utils.is_flash_attn_{kind[-1]}_available", lambda: False)
    entry = {**CONFIG, "attn_implementation": kind}
    with pytest.raises(UntrustedCodeError, match="flash_attention"):
        check_config(entry, "config.json", trusted=False)
    check_config(entry, "config.json", trusted=True)
    monkeypatch.setattr(f"transformers.utils.import_utils.is_flash_attn_{kind[-1]}_available", lambda: True)
    check_config(entry, "config.json", trusted=False)


def test_nested_code_is_refused_where_it_would_be_asked_for() -> None:
    """A part of a composite config whose type has no model here."""
    part = {"model_type": "autorev-tests-own", "auto_map": {"AutoModel": "org/repo--own.Model"}}
    with pytest.raises(UntrustedCodeError, match=r"org/repo--own\.py"):
        check_config({"model_type": "llava", "text_config": part}, "config.json", trusted=False)


def test_a_tokenizer_of_its_own_is_said_to_be_one(folder: Path) -> None:
    """It is not taken for a folder without a tokenizer."""
    found = folder / "llm"
    found.mkdir()
    (found / "config.json").write_text(json.dumps({**CONFIG, "model_type": "gpt_bigcode"}))
    named = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenizing_own.OwnTokenizer", None]}}
    (found / "tokenizer_config.json").write_text(json.dumps(named))
    (found / "tokenizing_own.py").write_text(TOKENIZING)
    with pytest.raises(UntrustedCodeError, match="tokenizer"):
        tokenizer_of(str(found))
    assert not Path("ran").exists()


@pytest.mark.parametrize("command", ["export", "evaluate"])
def test_a_record_names_no_code(folder: Path, command: str) -> None:
    """A run's record says where its adapters' model comes from; a module there is not imported."""
    run_folder = folder / "run"
    found = finetune_examples.momentum()
    recipe = replace(found.recipe, trains="lora", lora_rank=4)
    record = replace(found, recipe=recipe, model=replace(found.model, source="payload:make"), run="", complete=True)
    record.write(run_folder / FILE)
    arguments = ("--out", "plain") if command == "export" else ()
    refused(run(command, "run", *arguments), "--base payload:make")
    result = run(command, "run", *arguments, "--base", "payload:make")
    assert Path("ran").exists(), result.output  # the user repeated it
    assert "bug in autorev" not in result.stderr


def test_what_else_a_record_may_name(folder: Path) -> None:
    """Paths, profiles and hub ids; a file of a factory's name is a file."""
    for model in ("smollm2", "gpt2", "org/name", "models/mine", "a.gguf"):
        assert recorded_model(model, Path("run.json"), "--base") == model
    with pytest.raises(UntrustedCodeError, match="--base os:abort"):
        recorded_model("os:abort", Path("run.json"), "--base")


@pytest.mark.parametrize("entry", [{"megatron_config": {}}, {"megatron_core": "payload"}])
def test_adapters_import_nothing(folder: Path, entry: dict[str, object]) -> None:
    """PEFT imports the module that adapters name for Megatron."""
    (folder / "payload.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (folder / "llm").mkdir()
    load_model(_written(folder, CONFIG), torch.float32, 1, 8).model.save_pretrained(folder / "llm")
    adapters = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "megatron_config": {}, **entry}
    (folder / "llm" / "adapter_config.json").write_text(json.dumps(adapters))
    refused(run("verify", "llm", "--seq", 8), "megatron_core")
    refused(run("evaluate", "llm"), "megatron_core")


def _written(folder: Path, config: dict[str, object]) -> str:
    (folder / "tiny.json").write_text(json.dumps(config))
    return str(folder / "tiny.json")


def test_trust_is_for_a_model_and_not_for_a_name() -> None:
    """A profile has no code; trusting it changes nothing."""
    assert resolve("gpt2", trust_remote_code=True).name == resolve("gpt2").name
