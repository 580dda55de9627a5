"""What Python code may pass to the public functions by mistake: an error of autorev's own says so, and nothing changed.

python -m pytest tests/integration/test_bad_values.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autorev
from autorev.conversion.convert import chains_of
from autorev.errors import AutorevError, CaptureError, ConversionError, RecordError, SettingError
from tests.helpers.tiny_llm import tiny_llm, tiny_model

NAN, INFINITE = float("nan"), float("inf")
CALL = {"input_ids": torch.arange(8)[None]}
NO_NUMBERS: tuple[Any, ...] = (
    *(NAN, INFINITE, -INFINITE, "x", "0.5", True, 1j, [0.5], torch.tensor(0.5), 10**400),
    *({"*": NAN}, {"*": "x"}, {1: 0.5}),
)


@pytest.fixture(scope="module")
def converted() -> Any:
    model = tiny_model()
    autorev.convert(model, batch=CALL)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llm(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.mark.parametrize(
    "given",
    [
        *({name: value} for name in ("gamma", "c") for value in NO_NUMBERS),
        *({"method": value} for value in (None, [], 3, "compile", "momentum:loss=chunked")),
        {"method": "momentum:k=2", "gamma": 0.5},
        *({"keep_last": value} for value in (True, 1.5, "all", [1, 1], [True])),
        *({"fraction_bits": value} for value in (1.5, "x", True, [10], NAN, -1, 31)),
        *({"fraction_bits": value} for value in ({"model.layers": "x"}, {"stranger": 3})),
        *({name: value} for name in ("blocks", "exclude") for value in (3, [3], [None], b"x")),
    ],
    ids=str,
)
def test_convert(given: dict[str, Any]) -> None:
    """The model is as it was."""
    model = tiny_model()
    with pytest.raises(ConversionError) as error:
        autorev.convert(model, **{"batch": CALL, **given})
    assert (
        next(iter(given)) in str(error.value)
        or "patterns" in str(error.value)
        or "coupling" in str(error.value)
        or "gamma" in str(error.value)
    )
    assert autorev.revert(model) == 0


@pytest.mark.parametrize("batch", [[1], 3, {1: 2}, {"stranger": 3}, "text"], ids=str)
def test_convert_on_no_batch(batch: Any) -> None:
    """It is no call of the model, which is as it was."""
    model = tiny_model()
    with pytest.raises(CaptureError):
        autorev.convert(model, batch)
    assert autorev.revert(model) == 0


@pytest.mark.parametrize("given", [{"gamma": None}, *({"gamma": v} for v in NO_NUMBERS), {"gamma": 0.5, "c": "x"}])
def test_recouple(converted: Any, given: dict[str, Any]) -> None:
    """Likewise."""
    with pytest.raises(ConversionError):
        autorev.recouple(converted, **given)


@pytest.mark.parametrize("model", [None, "tiny", 3])
@pytest.mark.parametrize(
    "function",
    [
        *(autorev.convert, autorev.revert, autorev.verify, autorev.drift, autorev.chunk_loss, autorev.unchunk_loss),
        lambda model: autorev.recouple(model, gamma=0.5),
        lambda model: autorev.calibrate(model, lambda: 1.0),
        autorev.analyze,
    ],
)
def test_what_is_no_model(function: Any, model: Any) -> None:
    """Every function that takes one says so."""
    with pytest.raises(AutorevError, match=type(model).__name__):
        function(model)


@pytest.mark.parametrize("function", [autorev.analyze, autorev.profile])
def test_what_is_converted_already(converted: Any, function: Any) -> None:
    """It has no plain training to compare with, and other blocks."""
    with pytest.raises(ConversionError, match=rf"is converted, and autorev.{function.__name__} is of plain models"):
        function(converted, CALL)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda out: None, "a NoneType, not a tensor"),
        (lambda out: 1.0, "a float, not a tensor"),
        (lambda out: out.logits, r"\[1, 8, 259\] numbers"),
        (lambda out: out.logits.sum().detach(), "depends on no parameter that requires a gradient"),
        (lambda out: out.logits.sum().long(), "of dtype torch.int64, which has no gradient"),
        (lambda out: out.logits.sum() * 1j, "of dtype torch.complex64, which has no gradient"),
        (3, "loss is a function, not 3"),
    ],
)
def test_a_loss_that_is_none(converted: Any, loss: Any, words: str) -> None:
    """Of `verify`."""
    with pytest.raises(ConversionError, match=words):
        autorev.verify(converted, CALL, loss=loss)


@pytest.mark.parametrize("batch", [[1], 3, {}, {"stranger": 3}, "text"], ids=str)
def test_verify_on_no_batch(converted: Any, batch: Any) -> None:
    """As `convert` says it: where the model fails, and on what."""
    with pytest.raises(CaptureError, match=r"the forward of LlamaForCausalLM failed at transformers/.*; check"):
        autorev.verify(converted, batch)


def test_verify_without_memory(converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no fault of the batch's."""

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(converted, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        autorev.verify(converted, CALL)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *(({"max_loss_increase": v}, "max_loss_increase is a number of nats") for v in (NAN, INFINITE, "x", None, -1)),
        *(({"tokens": value}, "tokens is a whole number") for value in ("x", -1, 1.5)),
        *(({name: 3}, f"{name} is a function, not 3") for name in ("loss", "check", "progress")),
        *(
            ({"loss": lambda value=value: value}, "loss and check return a number")
            for value in (None, "x", torch.ones(2))
        ),
        ({"check": lambda: None}, "loss and check return a number, not a NoneType"),
    ],
    ids=lambda given: ", ".join(given) if isinstance(given, dict) else given[:40],
)
def test_calibrate(converted: Any, given: dict[str, Any], words: str) -> None:
    """The couplings are as they were."""
    before = [list(chain.couplings) for chain in chains_of(converted)]
    with pytest.raises(SettingError, match=words):
        autorev.calibrate(converted, **{"loss": lambda: 1.0, **given})
    assert [list(chain.couplings) for chain in chains_of(converted)] == before


@pytest.mark.parametrize("path", [None, 3, []])
def test_what_is_no_path(folder: str, path: Any) -> None:
    """`load` says so, and whatever writes."""
    with pytest.raises(AutorevError, match="a path is text"):
        autorev.load(path)
    with pytest.raises(AutorevError, match="a path is text"):
        autorev.finetune(folder, out=path)
    if path is not None:
        with pytest.raises(AutorevError, match="a path is text"):
            autorev.profile(folder, out=path, predict=True)


@pytest.mark.parametrize(
    "given",
    [
        *({name: value} for name in ("batch", "sequence") for value in ("x", 1.5, True, NAN)),
        *({"lora_rank": value} for value in ("x", 1.5, True)),
        *({"device": value} for value in (3, [])),
        {"progress": None},
    ],
    ids=str,
)
def test_forecast(folder: str, given: dict[str, Any]) -> None:
    """Before anything is predicted."""
    with pytest.raises(AutorevError):
        autorev.predict(folder, **{"sequence": 8, **given})


@pytest.mark.parametrize(
    "given",
    [
        *({"methods": value} for value in ([1], "", [None], None, 3)),
        *({name: value} for name in ("rounds", "timed_steps") for value in ("x", 1.5, NAN, True)),
        *({"sweeps": value} for value in ([3], ["batch="], "x", 3, None)),
        *({"longest_step": value} for value in (NAN, "x", 0, INFINITE)),
        *({"memory": 3}, {"device": 3}, {"name": 3}, {"lora_rank": "x"}, {"text": 3}, {"progress": None}),
    ],
    ids=str,
)
def test_profile(folder: str, tmp_path: Path, given: dict[str, Any]) -> None:
    """Before anything runs."""
    with pytest.raises(AutorevError):
        autorev.profile(folder, **{"methods": ["plain"], "sequence": 8, "out": tmp_path, "predict": True, **given})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given",
    [
        *({name: v} for name in ("learning_rate", "clip", "max_loss_increase") for v in ("x", NAN, INFINITE, True)),
        *({"distill": True, "distill_weight": value} for value in ("x", NAN)),
        *({name: True} for name in ("steps", "lora_rank", "batch")),
        *({"method": 3}, {"callbacks": 3}, {"progress": 3}),
    ],
    ids=str,
)
def test_finetune(folder: str, tmp_path: Path, given: dict[str, Any]) -> None:
    """Before the model is loaded, and without a folder left behind."""
    with pytest.raises(SettingError, match=r"not (by )?(True|'x'|nan|inf|3)"):
        autorev.finetune(folder, out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../x", "", "a/b", "\x1b[2J", 3])
def test_a_name_that_a_record_cannot_have(folder: str, tmp_path: Path, name: Any) -> None:
    """Refused where it is given, and not where it is read."""
    with pytest.raises(RecordError, match="which a record cannot have"):
        autorev.finetune(folder, out=tmp_path / "run", name=name)
    assert not (tmp_path / "run").exists()
