"""Models with quantised weights, by the libraries that people quantise with: converted, verified, predicted, trained.

What is compared with is the quantised model's own code under ordinary autograd. All of it runs on a CPU.

python -m pytest tests/integration/test_quantised.py
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from click.testing import CliRunner, Result
from optimum import quanto
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import autorev
from autorev.capture.fake import fake_copy, new_fake_mode
from autorev.capture.quantised import Kept, StandIn, held_by, is_quantised, kept_by, quantised_linears
from autorev.cli import main
from autorev.engine.mode import running
from autorev.errors import AutorevError, ConversionError, SettingError, TrainingError
from autorev.finetuning.evaluate import logits_of
from autorev.finetuning.export import export
from autorev.models.load import load_model
from autorev.models.quantization import scheme_of
from autorev.models.resolve import resolve
from autorev.pipeline import prepare
from autorev.profiler.passes.step import storage_bytes
from tests.helpers.one_step import gap, gradients_of, one_step
from tests.helpers.tiny_llm import tokenizer_of_bytes
from tests.helpers.tiny_run import TEXT, At, interrupt, loss_of, tune

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
CALL = {"input_ids": TOKENS, "labels": TOKENS, "use_cache": False}
LINEARS, BLOCKS = 7, 3
pytestmark = [
    pytest.mark.usefixtures("one_thread", "quick_collections"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small model, unquantised, and in folders beside it what bitsandbytes made of it; and a text."""
    folder = tmp_path_factory.mktemp("quantised")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=259, max_position_embeddings=128, eos_token_id=256, pad_token_id=257, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "llm")
    for name, quantization in {"nf4": four_bits("nf4", True), "int8": BitsAndBytesConfig(load_in_8bit=True)}.items():
        loaded(folder, quantization_config=quantization).save_pretrained(folder / name)
    for name in ("llm", "nf4", "int8"):
        tokenizer_of_bytes().save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    yield folder


def four_bits(kind: str, twice: bool = False, compute: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=twice,
        bnb_4bit_compute_dtype=compute,
    )


def loaded(folder: Path, **how: Any) -> Any:
    return LlamaForCausalLM.from_pretrained(folder / "llm", **how)


def by_torchao(config: Any, dtype: torch.dtype = torch.float32) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        model = loaded(folder, dtype=dtype)
        quantize_(model.model.layers, config)
        return model

    return make


def by_quanto(kind: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        model = loaded(folder)
        quanto.quantize(model.model.layers, weights=kind)
        quanto.freeze(model.model.layers)
        return model

    return make


def by_bitsandbytes(config: Any, **how: Any) -> Callable[[Path], Any]:
    return lambda folder: loaded(folder, quantization_config=config, **how)


NOTHING, INPUT, HIDDEN, UNPACKED = Kept(False, False), Kept(True, False), Kept(True, False, True), Kept(False, True)
QUANTISED: dict[str, tuple[Callable[[Path], Any], Kept]] = {
    "nf4": (by_bitsandbytes(four_bits("nf4")), NOTHING),
    "fp4": (by_bitsandbytes(four_bits("fp4")), NOTHING),
    "nf4-twice-bf16": (by_bitsandbytes(four_bits("nf4", True, torch.bfloat16), dtype=torch.bfloat16), NOTHING),
    "nf4-fp32-inputs-bf16-weights": (by_bitsandbytes(four_bits("nf4", True, torch.bfloat16)), NOTHING),
    "int8": (by_bitsandbytes(BitsAndBytesConfig(load_in_8bit=True)), HIDDEN),
    "int8-no-outliers": (by_bitsandbytes(BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)), HIDDEN),
    "torchao-int8": (by_torchao(Int8WeightOnlyConfig()), UNPACKED),
    "torchao-int8-bf16": (by_torchao(Int8WeightOnlyConfig(), torch.bfloat16), UNPACKED),
    "torchao-int4": (by_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))), UNPACKED),
    "quanto-int8": (by_quanto(quanto.qint8), INPUT),
    "quanto-int4": (by_quanto(quanto.qint4), INPUT),
}
COMPILES = pytest.param("quanto-int4", marks=pytest.mark.slow)
"""quanto compiles an extension when it first unpacks four bits."""
each_library = pytest.mark.parametrize("name", [*(name for name in QUANTISED if name != "quanto-int4"), COMPILES])
one_of_each = pytest.mark.parametrize("name", ["nf4-twice-bf16", "int8", "torchao-int8", COMPILES])


def quantised(name: str, folder: Path) -> Any:
    return QUANTISED[name][0](folder)


def adapted(model: Any, **how: Any) -> Any:
    """With PEFT's LoRA, whose second factor is not zero, as after some training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **how))
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.05)
    return wrapped.train()


def packed_weights(model: nn.Module) -> list[torch.Tensor]:
    layers = [layer for layer in model.modules() if is_quantised(layer)]
    held = {t.untyped_storage()._cdata: t for layer in layers for t in held_by(layer)}
    return [tensor.detach().clone() for tensor in held.values()]


# -- gradients


@each_library
@pytest.mark.parametrize("order", ["adapters first", "converted first"])
def test_gradients_are_those_of_ordinary_autograd(name: str, order: str, place: Path) -> None:
    """Exactly, as a second run unpacks the same weights. Weights, names and the vanilla loss stay what they were."""
    model, other = quantised(name, place), quantised(name, place)
    if order == "adapters first":
        model, other = adapted(model), adapted(other)
    before, keys = packed_weights(model), list(model.state_dict())
    with torch.no_grad():
        loss = other.train()(**CALL).loss  # of another one: what the first run changes in a layer is still to come

    autorev.convert(model, batch=CALL)
    assert list(model.state_dict()) == keys
    with torch.no_grad(), running("original"):
        assert torch.equal(model.train()(**CALL).loss, loss)
    if order == "converted first":
        model = adapted(model)
    found = autorev.verify(model, CALL)

    assert found.passed and found.gradient_error == 0 and all(found.rebuilt.values())
    after = packed_weights(model)
    assert len(after) == len(before) and all(map(torch.equal, before, after))
    autorev.revert(model)
    if order == "adapters first":
        with torch.no_grad():
            assert torch.equal(model(**CALL).loss, loss)


@one_of_each
@pytest.mark.parametrize("how", [{"granularity": "sublayer"}, {"method": "hamiltonian"}])
def test_in_steps(name: str, how: dict[str, Any], place: Path) -> None:
    """Attention and MLP as steps of their own."""
    model = adapted(quantised(name, place))
    autorev.convert(model, batch=CALL, **how)
    assert autorev.verify(model, CALL).gradient_error == 0


def test_adapters_that_read_the_weight(place: Path) -> None:
    """DoRA takes the norm of each row of the unpacked weight."""
    model = adapted(quantised("nf4", place), use_dora=True)
    autorev.convert(model, batch=CALL)
    assert autorev.verify(model, CALL).gradient_error == 0


@one_of_each
def test_training_with_evaluations_between(name: str, place: Path) -> None:
    """Three steps of the adapters end where those of ordinary autograd end. An evaluation leaves the layers as they
    train: in eval mode bitsandbytes repacks 4-bit weights on some CPUs, and rounds the inputs of 8-bit layers."""
    ends, modes = [], []
    for mode in ("reversible", "oracle"):
        model = adapted(quantised(name, place))
        autorev.convert(model, batch=CALL)
        before = packed_weights(model)
        layer = next(module for module in model.modules() if is_quantised(module))
        layer.register_forward_pre_hook(lambda module, args: modes.append(module.training))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            one_step(model, mode=mode, **CALL)
            optimizer.step()
            logits_of(model)({"input_ids": TOKENS})
        assert all(map(torch.equal, before, packed_weights(model)))
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert gap(*ends) == 0 and all(modes)
    assert model.training


def test_prepared_by_peft(place: Path) -> None:
    """`prepare_model_for_kbit_training` before and after conversion; the checkpointing that it switches on is refused
    before, and explained and left off after."""
    with pytest.raises(ConversionError, match=r"checkpoints its blocks.*use_gradient_checkpointing=False"):
        autorev.convert(prepare_model_for_kbit_training(quantised("nf4", place)), batch=CALL)
    with pytest.raises(SettingError, match="checkpoints its blocks by itself"):
        autorev.profile(prepare_model_for_kbit_training(quantised("nf4", place)), CALL)

    first = prepare_model_for_kbit_training(quantised("int8", place), use_gradient_checkpointing=False)
    autorev.convert(adapted(first), batch=CALL)
    assert autorev.verify(first, CALL).gradient_error == 0

    later = quantised("nf4-twice-bf16", place)
    autorev.convert(later, batch=CALL)
    later = adapted(prepare_model_for_kbit_training(later))
    found = autorev.verify(later, CALL)
    assert found.passed and set(found.rebuilt.values()) == {BLOCKS}


def test_a_model_without_transformers() -> None:
    """A layer by itself in a model by hand, whose inputs are wider than what it computes in."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.adapter = nn.LayerNorm(64), nn.Linear(64, 64)
            self.packed = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
            self.packed.bias.data = self.packed.bias.data.bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.packed(self.norm(x)) + self.adapter(self.norm(x))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*(Block() for _ in range(4))).to("cpu")
        x = torch.randn(2, 64)
    plain = copy.deepcopy(model)
    autorev.convert(model, batch=(x,))
    assert autorev.verify(model, (x,)).gradient_error == 0
    autorev.revert(model)
    one_step(model, x)
    one_step(plain, x)
    assert gap(gradients_of(model), gradients_of(plain)) == 0


# -- prediction


@each_library
def test_what_stands_in_holds_and_keeps_as_much(name: str, place: Path) -> None:
    """A fake copy has as many parameters as the unquantised model, and as many bytes as the quantised one."""
    model = quantised(name, place)
    layers = list(quantised_linears(model))
    twin = fake_copy(model, new_fake_mode())

    assert len(layers) == LINEARS * BLOCKS
    assert all(isinstance(twin.get_submodule(path), StandIn) for path, _, _ in layers)
    assert autorev.analyze(model, CALL).model.parameters == loaded(place).num_parameters()
    assert {kept_by(layer, found) for _, layer, found in layers} == {QUANTISED[name][1]}
    bytes_of = [storage_bytes(held_by(m)) for m in (model, twin)]
    assert bytes_of[1] == pytest.approx(bytes_of[0], abs=4 * len(layers))  # a storage is a whole number of elements


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_profile_measures_what_is_predicted(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Any]
) -> None:
    """Of a folder that was saved quantised, adapters trained."""
    monkeypatch.chdir(place)
    how = {"methods": ["plain", "checkpoint"], "lora_rank": 4, "trains": "lora", "sequence": 64, "rounds": 1}
    record = autorev.profile(str(place / name), timed_steps=1, out=place / "records", **how)
    for result in record.results:
        assert result.memory is not None and result.prediction is not None
        states = 5056 * BLOCKS * (result.method.spec == "checkpoint")  # of the random generator, which it keeps
        assert result.prediction.kept_bytes + states == pytest.approx(result.memory.kept_bytes, rel=0.01)
        assert result.prediction.peak_bytes == pytest.approx(result.memory.peak_bytes, rel=0.04)
    assert any("quantised as its config says" in note for note in record.notes)


def test_bytes_by_the_formats() -> None:
    """Of a layer of 4096 x 4096 by what a config says; unknown formats and versions are said, and not guessed."""

    def bits(**said: Any) -> float | None:
        scheme = scheme_of({"quantization_config": said})
        assert scheme is not None
        return round(8 * scheme.bytes(4096, 4096) / 4096**2, 2) if scheme.bits else None

    assert scheme_of({"model_type": "llama"}) is None and scheme_of({"quantization_config": None}) is None
    assert bits(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4") == 4.5
    assert bits(load_in_4bit=True, bnb_4bit_use_double_quant=True) == 4.13
    assert bits(quant_method="bitsandbytes", load_in_8bit=True) == 8.01
    assert bits(quant_method="gptq", bits=4, group_size=128) == 4.16
    assert bits(quant_method="awq", bits=4, group_size=128) == 4.16
    assert bits(quant_method="quanto", weights="int4") == 4.5
    assert bits(quant_method="torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}) == 8.01
    assert bits(quant_method="fp8", weight_block_size=[128, 128]) == 8.0
    assert bits(quant_method="gptq") is None  # without what it should say
    assert bits(quant_method="mxfp4") is None and bits(quant_method="quanto", weights=["int8"]) is None


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    ("said", "trains", "note"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "lora", "quantised as its config says"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "full", "quantised weights do not train"),
        ({"quant_method": "of tomorrow"}, "lora", "not known here how many bytes they take"),
    ],
)
def test_analysis_of_a_config(said: dict[str, Any], trains: str, note: str, place: Path, tmp_path: Path) -> None:
    """The bytes are the packed ones, or a note says that they are not."""
    config = json.loads((place / "llm" / "config.json").read_text())
    found = {}
    for name, more in {"plain": {}, "quantised": {"quantization_config": said}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**config, **more}))
        how = {"trains": trains, "lora_rank": 8 if trains == "lora" else None}
        found[name] = prepare(resolve(str(tmp_path / f"{name}.json")), sequence=32, **how)
    (plain, of_plain), (packed, of_packed) = found["plain"], found["quantised"]
    assert note in " ".join(packed.notes) and note not in " ".join(plain.notes)
    assert packed.model.parameters == plain.model.parameters and packed.chains == plain.chains
    sizes = [storage_bytes(held_by(forecaster.twin)) for forecaster in (of_packed, of_plain)]
    assert (sizes[0] < 0.6 * sizes[1]) if note == "quantised as its config says" else (sizes[0] == sizes[1])


# -- saved quantised, and fine-tuned


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_folder_of_quantised_weights(name: str, place: Path) -> None:
    """It is loaded quantised, verified on the command line, and what would train its weights is refused."""
    assert sum(map(is_quantised, load_model(str(place / name), torch.float32, 1, 16).model.modules())) == 7 * BLOCKS
    done = run("verify", str(place / name), "--sequence", "32")
    assert done.exit_code == 0 and "gradient error  0 relative" in done.stdout
    refused = run("profile", str(place / name), "--no-html", "--out", str(place / "records"))
    assert refused.exit_code == 1 and "quantised weights do not train: train adapters" in refused.stderr


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_fine_tuning_with_quantised_weights(kind: str, place: Path) -> None:
    """The record says so; a run that goes on takes it from there; `export` merges into what was quantised."""
    out = f"run-{kind}"
    with pytest.raises(TrainingError, match="interrupted after step"):
        tune(place, out, lora_rank=4, quantize=kind, callbacks=(At(4, interrupt),))
    record = tune(place, out, resume=True)

    assert record.recipe.quantize == kind and any("quantised: bitsandbytes" in note for note in record.notes)
    assert record.model.parameters == loaded(place).num_parameters()
    assert record.final.loss < record.original.loss - 0.1
    assert {row.drift for row in record.logged} == {0.0}
    done = export(place / out, place / f"plain-{kind}")
    plain = LlamaForCausalLM.from_pretrained(place / f"plain-{kind}")
    assert not any(map(is_quantised, plain.modules())) and "quantization_config" not in plain.config.to_dict()
    assert done.vanilla_loss == pytest.approx(loss_of(plain, place / out), abs=1e-4)
    base = dict(loaded(place).named_parameters())
    changed = {key.split(".")[-2] for key, p in plain.named_parameters() if not torch.equal(p, base[key])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_fine_tuning_of_a_quantised_folder(place: Path) -> None:
    """Adapters train beside it, and are exported merged into what its weights unpack to; all weights are refused."""
    with pytest.raises(SettingError, match=r"quantised \(bitsandbytes nf4.*do not train.*`lora_rank=16`"):
        tune(place, "refused", model="nf4")
    with pytest.raises(SettingError, match="quantised already"):
        tune(place, "refused", model="nf4", lora_rank=4, quantize="nf4")
    record = tune(place, "run-folder", model="nf4", lora_rank=4, steps=4)
    done = export(place / "run-folder", place / "plain-folder")
    assert abs(done.vanilla_loss - record.vanilla.loss) < 1e-3
    assert not any(map(is_quantised, LlamaForCausalLM.from_pretrained(place / "plain-folder").modules()))


def test_quantise_without_adapters_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded or made."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    done = run("finetune", "llm", "--quantize", "nf4", "--out", "nothing")
    assert done.exit_code == 1 and "weights that do not train: give --lora-rank" in done.stderr
    assert not Path("nothing").exists()
    with pytest.raises(AutorevError, match="quantised to nf4 or int8"):
        tune(place, "nothing", lora_rank=4, quantize="int3")
