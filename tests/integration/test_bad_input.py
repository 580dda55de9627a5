"""Hostile command lines, in process: what a user or a stranger's file can say is answered in a line, and soon."""

import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autorev import records
from autorev.cli import main
from autorev.errors import RecordError, UnreadableError
from autorev.files import DEEPEST, parse_json, path_of
from autorev.integrations import building
from autorev.models.resolve import resolve
from autorev.profiler.record import Profile
from tests.helpers import profile_examples
from tests.helpers.zoo import HEADS

CONFIG = {"model_type": "llama", **HEADS, "num_hidden_layers": 2}
HUGE = 10**18
EVERY = (
    *(("analyze", "--no-html"), ("verify",), ("profile", "--predict", "--no-html")),
    *(("finetune", "--out", "out"), ("evaluate",), ("export", "--out", "out"), ("report",)),
)
CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, count=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()

class Raises(Net):
    @property
    def config(self):
        raise RuntimeError("no config")

    @property
    def main_input_name(self):
        raise KeyError("no name")

class Odd(Net):
    config, main_input_name = {"a": 1}, "x"

class Untrainable(Net):
    def train(self, mode=True):
        raise RuntimeError("never")

class Hidden(Net):
    def named_parameters(self, *args, **kwargs):
        raise RuntimeError("hidden")

def property_that_raises(): return Raises()
def config_of_its_own(): return Odd()
def cannot_train(): return Untrainable(), (torch.randn(2, 8),)
def hides(): return Hidden(), (torch.randn(2, 8),)
def empty_batch(): return Net(), (torch.randn(0, 8),)
def empty_rows(): return Net(), {"x": torch.randn(4, 0)}
def without_end(): return Net(10**9), (torch.randn(2, 8),)
def odd_names(): return Net(), {1: torch.randn(2, 8)}
def nothing(): return ()
def recursive(): return recursive()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(building, "MOST_MODULES", 3_000)
    (tmp_path / "hostile.py").write_text(CODE)
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    yield tmp_path
    sys.modules.pop("hostile", None)


def refused(*arguments: object) -> str:
    """The one line that says what is wrong."""
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    check_polite(result)
    assert result.exit_code in (1, 2), result.output
    return result.stderr.strip().splitlines()[-1]


def check_polite(result: Result) -> None:
    assert "bug in autorev" not in result.stderr
    assert "Traceback" not in result.stderr
    assert not set("\x1b\x9b\u202e") & set(result.output)


JSON = {
    "nested lists": "[" * 5000 + "]" * 5000,
    "nested objects": '{"model_type":' * 900 + "1" + "}" * 900,
    "too many levels": '{"model_type": "llama", "x":' + "[" * DEEPEST + "]" * DEEPEST + "}",
    "a number of 5,000 digits": '{"model_type": "llama", "hidden_size":' + "9" * 5000 + "}",
    "2^64": '{"model_type": "llama", "hidden_size": 18446744073709551616}',
    "no text": "\udcff",
    "a list": "[]",
    "null": "null",
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_json_of_any_kind_is_a_config_a_record_or_an_error(folder: Path, text: str) -> None:
    """For every command, as a file, as a folder's config and record, and as a device."""
    content = text.encode(errors="surrogateescape")
    inside = folder / "inside"
    inside.mkdir()
    for path in (folder / "x.json", inside / "config.json", inside / "run.json"):
        path.write_bytes(content)
    for command in EVERY:
        refused(*command, "inside" if command[0] == "export" else "x.json")
    refused("evaluate", "inside")
    refused("finetune", "--resume", "--out", "inside")
    refused("analyze", "tiny.json", "--device", "x.json")


def test_bounds_of_json() -> None:
    """What is in use passes; the error reads on from a file's name."""
    assert parse_json(b'{"a": [1, -9223372036854775807, 0.5, null]}') == {"a": [1, -(2**63) + 1, 0.5, None]}
    assert parse_json("[" * (DEEPEST - 1) + "1" + "]" * (DEEPEST - 1))
    with pytest.raises(UnreadableError, match=r"^is nested deeper"):
        parse_json("[" * (DEEPEST + 1) + "1" + "]" * (DEEPEST + 1))
    with pytest.raises(UnreadableError, match=r"^holds the number 9223372036854775808"):
        parse_json("[9223372036854775808]")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"architectures": [{}]}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"vocab_size": 0}, "correct"),
        ({"hidden_size": -8}, "correct"),
        ({"hidden_size": 2**62}, "correct"),
        ({"hidden_size": None}, "correct"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_hidden_layers": 4_000}, "modules"),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts = 1000000000"),
        ({"num_attention_heads": 0}, "correct"),
        ({"model_type": "swin", "depths": [10**9]}, "depths"),
        ({"model_type": "llava", "text_config": []}, "correct"),
        ({"model_type": "clip", "vision_config": [1]}, "correct"),
    ],
)
def test_a_config_of_odd_numbers(folder: Path, entry: dict[str, Any], words: str) -> None:
    """What cannot be built is told of the config, and nothing is built without end."""
    (folder / "odd.json").write_text(json.dumps({**CONFIG, **entry}))
    result = CliRunner().invoke(main, ["analyze", "odd.json", "--no-html", "--seq", "8"])
    check_polite(result)
    assert result.exit_code == 1
    assert words in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("analyze", "tiny.json", "--batch", HUGE),
        ("analyze", "tiny.json", "--batch", 2**31 - 1, "--sequence", 1024),
        ("analyze", "gpt2", "--lora-rank", 2**64),
        ("verify", "tiny.json", "--batch", 2**31 - 1, "--sequence", 32),
        ("verify", "tiny.json", "--method", "momentum:gamma=nan"),
        ("verify", "tiny.json", "--method", "momentum:gamma=inf"),
        ("verify", "tiny.json", "--method", "momentum:c=-inf"),
        ("profile", "tiny.json", "--predict", "--batch", HUGE),
        ("profile", "tiny.json", "--predict", "--depth", 10**9),
        ("profile", "tiny.json", "--predict", "--memory", "9" * 400 + "GiB"),
        ("profile", "tiny.json", "--predict", "--longest-step", "nan"),
        ("profile", "tiny.json", "--predict", "--method", "momentum:gamma=nan"),
        ("profile", "tiny.json", "--predict", "--name", "../x"),
        ("profile", "tiny.json", "--predict", "--name", "x" * 400),
        ("finetune", "tiny.json", "--learning-rate", "nan"),
        ("finetune", "tiny.json", "--steps", HUGE),
        ("finetune", "tiny.json", "--text", "/dev/zero"),
        ("report", "/dev/zero"),
        ("report", "x" * 5000),
        ("export", "x" * 5000, "--out", "out"),
        ("analyze", "tiny.json", "--device", "x" * 5000),
    ],
)
def test_options_out_of_bounds(arguments: tuple[object, ...]) -> None:
    """Told before anything is built."""
    refused(*arguments)


@pytest.mark.parametrize(
    "model", ["", "~nouser", "~nouser/x", "x" * 5000, "a/" * 3000, "/dev/zero", ":", "\x1b[31m\u202e"]
)
@pytest.mark.parametrize("command", EVERY, ids=lambda command: command[0])
def test_models_that_are_none(command: tuple[str, ...], model: str) -> None:
    """Names that the system, or a terminal, takes for something else."""
    refused(*command, "--", model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config_of_its_own", "without example inputs"),
        ("property_that_raises", "without example inputs"),
        ("cannot_train", "RuntimeError at hostile.py"),
        ("hides", "RuntimeError at hostile.py"),
        ("empty_batch", "empty example input of shape [0, 8]"),
        ("empty_rows", "empty example input of shape [4, 0]"),
        ("without_end", "more than 3,000 modules"),
        ("odd_names", "names are no text"),
        ("nothing", "returned a tuple"),
        ("recursive", "RecursionError"),
    ],
)
def test_factories(name: str, words: str) -> None:
    """A model's own code is told of, with its line, before anything is made of it."""
    assert words in refused("analyze", f"hostile:{name}", "--no-html")
    if "without example" not in words:
        assert words in refused("verify", f"hostile:{name}")


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _gguf(pairs: int, *keys: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(keys)


LLAMA = _text("general.architecture") + struct.pack("<I", 8) + _text("llama")
GGUF = {
    "empty": b"",
    "more tensors than there are": _gguf(0, tensors=2**63),
    "more keys than there are": _gguf(2**63),
    "a string without end": _gguf(1, struct.pack("<Q", 2**62)),
    "lists in lists": _gguf(1, _text("x"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 3000),
    "no sizes": _gguf(1, LLAMA),
}


@pytest.mark.parametrize("content", GGUF.values(), ids=GGUF)
def test_gguf_files(folder: Path, content: bytes) -> None:
    """Damaged ones, and one that does not say how large its model is."""
    (folder / "x.gguf").write_bytes(content)
    for command in EVERY[:5]:
        refused(*command, "x.gguf")


@pytest.mark.usefixtures("without_predictions")
def test_what_a_config_leaves_open_is_said(folder: Path) -> None:
    """It is no 7 B model in silence; what says its sizes gets no note."""
    (folder / "bare.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    (note,) = resolve("bare.json").notes
    assert note.startswith("bare.json does not say n_embd = 768, n_head = 12, vocab_size = 50257")
    assert "n_layer" not in note
    assert resolve("tiny.json").notes == ()
    (folder / "almost.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "vocab_size"}))
    result = CliRunner().invoke(main, ["analyze", "almost.json", "--seq", "8", "--no-html"])
    assert "almost.json does not say vocab_size = 32000" in " ".join(result.stdout.split())


# -- records


def signed(data: dict[str, Any]) -> str:
    """A record whose digest is right, whatever it says."""
    data.pop("digest", None)
    return json.dumps({**data, "digest": records._digest(data)})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("results", 0, "rounds", 0, "forward"), [0.1]),
        (("results", 0, "rounds", 0, "backward", 0), float("nan")),
        (("results", 0, "rounds", 0, "optimizer", 0), 0.0),
        (("results", 0, "memory", "peak_bytes"), 0),
        (("results", 0, "memory", "phase"), "never"),
        (("results", 0, "memory", "timeline", "seconds"), []),
        (("results", 0, "memory", "timeline", "blocks"), [0]),
        (("results", 0, "memory", "timeline", "peak_at"), 10**6),
        (("results", 0, "memory", "timeline", "marks", 0, 0), "never"),
        (("results", 0, "work", "flops"), -1),
        (("results",), []),
        (("goal",), "fame"),
    ],
)
def test_records_whose_parts_do_not_fit_each_other(folder: Path, path: tuple[Any, ...], value: object) -> None:
    """Their digest is right: whoever wrote them was no measurement."""
    data = json.loads(profile_examples.smollm2().to_json())
    part = data
    for key in path[:-1]:
        part = part[key]
    assert path[-1] in part if isinstance(part, dict) else path[-1] < len(part)
    part[path[-1]] = value
    (folder / "odd.json").write_text(signed(data))
    assert "does not follow its schema" in refused("report", "odd.json")


@pytest.mark.parametrize("name", ["../../x", "/x", "a\\b", "", "..", "\x1b[31m", "a\u202eb", "a\nb", "x" * 151])
def test_a_record_is_written_nowhere_else(folder: Path, name: str) -> None:
    """Its name is a file's, and looked at where it is read."""
    data = json.loads(profile_examples.smollm2().to_json())
    with pytest.raises(RecordError, match="which a record cannot have"):
        Profile.from_json(signed({**data, "name": name}), "stranger.json")
    (folder / "stranger.json").write_text(signed({**data, "name": name}))
    refused("report", "stranger.json")


def test_a_record_under_another_name_is_not_gone_on_with(folder: Path) -> None:
    """It would be written to the file of its own name."""
    made = ("profile", "tiny.json", "--seq", "8", "--predict", "--method", "plain", "--no-html")
    assert CliRunner().invoke(main, [*made, "--name", "one"]).exit_code == 0
    (folder / "profiles" / "recorded" / "one.json").rename(folder / "profiles" / "recorded" / "two.json")
    assert "its name differ" in refused(*made, "--name", "two", "--resume")
    assert not (folder / "profiles" / "recorded" / "one.json").exists()


def test_control_codes_are_shown_and_not_sent(folder: Path) -> None:
    """Of a model's, a module's and a method's name: on the terminal, in HTML and in Markdown."""
    code = "\x1b]0;owned\x07\u202e"
    text = profile_examples.smollm2().to_json()
    data = json.loads(text.replace("model.layers", "model.\\u001b]0;owned\\u0007\\u202elayers"))
    data["model"]["name"] += code
    data["notes"] = [code]
    (folder / "odd.json").write_text(signed(data))
    result = CliRunner().invoke(main, ["report", "odd.json", "--html", "odd.html", "--markdown", "odd.md"])
    assert result.exit_code == 0, result.output
    page = Path("odd.html").read_text(encoding="utf-8")
    for shown in (result.stdout, page[page.rindex("</script>") :], Path("odd.md").read_text(encoding="utf-8")):
        assert not set("\x1b\x07\u202e") & set(shown)
    assert r"\x1b]0;owned\x07\u202e" in result.stdout
    figures = re.findall(r'"[^"]*owned[^"]*"', page[page.rindex("Plotly.") - 10**6 :])
    assert all("\\\\u202e" in each for each in figures if "u202e" in each)  # JSON, in which an escape is doubled


def test_a_path_of_nobody_is_a_name() -> None:
    """`~name` may be a file's."""
    assert path_of("~nouser/x") == Path("~nouser/x")
    assert path_of("~") == Path.home()
