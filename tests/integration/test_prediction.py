"""Predicted memory against the truth: the CPU allocator's own events during a real training step.

The truth knows nothing of autorev: no dispatch mode, no fake tensor, every block run.

python -m pytest tests/integration/test_prediction.py
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

import autorev
from autorev.analysis import RESERVE_BYTES, Analysis, Category, Prediction
from autorev.couplings import arithmetic
from autorev.errors import SettingError
from autorev.methods import Method
from autorev.models.from_config import transformers_workload
from autorev.pipeline import prepare
from autorev.prediction import simulate
from autorev.prediction.forecast import Forecaster
from autorev.prediction.frontier import explore
from autorev.profiles import load_device
from autorev.workload import Workload
from tests.helpers import zoo
from tests.helpers.allocator import highest
from tests.helpers.comparing import comparing
from tests.helpers.zoo import BART, GPT2, HEADS, IMAGE, SIZES

DEEP = {"num_hidden_layers": 7, "hidden_size": 64, "intermediate_size": 128}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], int, int | None]] = {
    # model class, config class, sizes, batch, sequence
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, HEADS | DEEP | {"head_dim": 16}, 2, 32),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT2 | {"n_layer": 7, "n_embd": 64}, 2, 64),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, HEADS | DEEP | {"head_dim": 16}, 2, 32),
    "falcon": (
        hf.FalconForCausalLM,
        hf.FalconConfig,
        SIZES | DEEP | {"new_decoder_architecture": True},
        2,
        64,
    ),
    "mamba": (
        hf.MambaForCausalLM,
        hf.MambaConfig,
        {"hidden_size": 32, "num_hidden_layers": 5, "vocab_size": 99, "state_size": 4},
        2,
        32,
    ),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, HEADS | DEEP | {"num_local_experts": 4}, 2, 64),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 5, "num_decoder_layers": 4, "num_heads": 4}
        | {"vocab_size": 99, "decoder_start_token_id": 0},
        2,
        48,
    ),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, BART | {"encoder_layers": 5}, 2, 48),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, SIZES | DEEP, 2, 64),
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig,
        IMAGE | DEEP | {"intermediate_size": 256, "image_size": 64, "patch_size": 8},
        4,
        None,
    ),
    "swin": (
        hf.SwinForImageClassification,
        hf.SwinConfig,
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 6], "num_heads": [2, 4]}
        | {"window_size": 4},
        4,
        None,
    ),
}


@pytest.mark.parametrize("family", zoo.others_slow(FAMILIES))
def test_peak_agrees_with_the_allocator(family: str) -> None:
    """The categories of a plain and of a checkpointed AdamW step sum to what the allocator really reached."""
    model_cls, config_cls, sizes, batch, sequence = FAMILIES[family]
    config = config_cls(**sizes)
    workload = workload_of(model_cls, config)
    analysis, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype="fp32", device="cpu")
    for name, wrap in (("plain", None), ("checkpoint", checkpointed)):
        predicted = predict(forecaster, name)
        assert sum(predicted.categories.values()) == predicted.peak_bytes
        truth = allocator_peak(workload, analysis, wrap, batch, sequence)
        assert predicted.peak_bytes == pytest.approx(truth, rel=0.02), f"{family}, {name}"


def test_a_peak_in_the_optimizer_phase_agrees_with_the_allocator() -> None:
    """On a short sequence the update itself is the peak: weights, every gradient, optimiser state and temporaries."""
    model_cls, config_cls, sizes, _, _ = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes | {"vocab_size": 2000}))
    analysis, forecaster = prepare(workload, batch=1, sequence=8, dtype="fp32", device="cpu")
    predicted = predict(forecaster, "plain")
    assert predicted.phase == "optimizer"
    trained = analysis.model.parameters * 4
    assert predicted.categories[Category.GRADIENTS] == trained
    assert predicted.peak_bytes == pytest.approx(allocator_peak(workload, analysis, None, 1, 8), rel=0.02)


def test_other_settings_agree_with_the_allocator() -> None:
    """The setting's other axes are counted too: LoRA, a head alone, SGD with and without momentum."""
    model_cls, config_cls, sizes, batch, sequence = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes | {"vocab_size": 2000}))
    for setting in (
        {"trains": "lora", "lora_rank": 4},
        {"trains": "head"},
        {"optimizer": "sgd-momentum"},
        {"optimizer": "sgd"},
    ):
        analysis, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype="fp32", device="cpu", **setting)
        predicted = predict(forecaster, "plain")
        truth = allocator_peak(workload, analysis, None, batch, sequence)
        assert predicted.peak_bytes == pytest.approx(truth, rel=0.02), str(setting)


@pytest.mark.parametrize(
    ("family", "vocabulary", "setting", "stored"),
    [
        ("llama", 2000, {}, (0,)),
        ("llama", 2000, {"trains": "lora", "lora_rank": 4}, (0,)),
        ("llama", 99, {"trains": "lora", "lora_rank": 4}, (1,)),
        ("t5", 99, {}, (0, 1)),
    ],
)
def test_what_is_predicted_is_what_convert_does(
    family: str, vocabulary: int, setting: dict[str, Any], stored: tuple[int, ...]
) -> None:
    """`convert` chooses the `keep_last` that was predicted, and the step has the predicted peak."""
    model_cls, config_cls, sizes, batch, sequence = FAMILIES[family]
    workload = workload_of(model_cls, config_cls(**sizes | {"vocab_size": vocabulary}))
    analysis, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype="fp32", device="cpu", **setting)
    predicted = predict(forecaster, "momentum")
    assert predicted.keep_last == stored
    done: list[tuple[int, ...]] = []

    def convert(model: nn.Module) -> None:
        args, kwargs = workload.example(batch, sequence)
        conversion = autorev.convert(model, batch=(args, kwargs))
        done.append(tuple(chain.stored_blocks for chain in conversion.chains))

    truth = allocator_peak(workload, analysis, None, batch, sequence, prepared=convert)
    assert done == [stored]
    assert predicted.peak_bytes == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_attention_in_tiles_peaks_where_it_is_predicted(granularity: str) -> None:
    """On a CPU, whose kernel is given a mask for a few queries at a time."""
    model_cls, config_cls, sizes, _, _ = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes | {"vocab_size": 99, "max_position_embeddings": 512}))
    how = {"trains": "lora", "lora_rank": 4, "loss": "chunked"}
    analysis, forecaster = prepare(workload, batch=1, sequence=512, dtype="fp32", device="cpu", **how)
    method = Method.parse(f"momentum:k=3,granularity={granularity},keep_last=0,tile=128")
    predicted = forecaster.prediction(method, forecaster.trace(method, 1, 512))

    def convert(model: nn.Module) -> None:
        call = workload.example(1, 512)
        conversion = autorev.convert(model, call, granularity=granularity, keep_last=0, tile=128)
        assert not conversion.not_tiled
        autorev.chunk_loss(model)

    truth = allocator_peak(workload, analysis, None, 1, 512, prepared=convert)
    assert predicted.peak_bytes == pytest.approx(truth, rel=0.025)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_chunked_loss_takes_the_logits_off_the_peak(family: str) -> None:
    """With a wide vocabulary the full loss holds several copies of the logits, and the chunked one none."""
    model_cls, config_cls, sizes, _, _ = FAMILIES[family]
    workload = workload_of(model_cls, config_cls(**sizes | {"vocab_size": 4000}))
    batch, sequence = 8, 128  # many more tokens than the width: below that, chunking is no gain
    peaks = {}
    for loss in ("full", "chunked"):
        _, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype="fp32", device="cpu", loss=loss)
        peaks[loss] = predict(forecaster, "checkpoint").phase_peaks["forward"]
    assert peaks["full"] - peaks["chunked"] >= 4 * batch * sequence * 4000


def test_bf16_agrees_with_the_allocator() -> None:
    """Two-byte weights, activations and optimiser state."""
    model_cls, config_cls, sizes, batch, sequence = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes))
    analysis, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype="bf16", device="cpu")
    predicted = predict(forecaster, "plain")
    truth = allocator_peak(workload, analysis, None, batch, sequence, dtype=torch.bfloat16)
    assert predicted.peak_bytes == pytest.approx(truth, rel=0.02)


def test_kept_bytes_per_block_are_what_each_method_claims() -> None:
    """From 6 to 10 blocks, checkpointing keeps one stream more per block and k side bits cost k/8 bytes an element."""
    model_cls, config_cls, sizes, batch, sequence = FAMILIES["llama"]
    assert sequence is not None
    elements = batch * sequence * sizes["hidden_size"]
    kept: dict[str, list[int]] = {}
    for depth in (6, 10):
        workload = workload_of(model_cls, config_cls(**sizes | {"num_hidden_layers": depth}))
        _, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype="fp32", device="cpu")
        for method in forecaster.methods():
            if method.tile is None:
                kept.setdefault(method.name, []).append(predict(forecaster, method.name).kept_bytes)
    slope = {name: (after - before) / 4 for name, (before, after) in kept.items()}
    assert slope["checkpoint"] == 4 * elements
    assert slope["offload"] == 0
    assert slope["leapfrog"] == 0
    assert slope["momentum"] == 3 * elements / 8
    assert slope["bdia"] == elements / 8
    assert slope["plain"] > 10 * slope["checkpoint"]


@pytest.mark.parametrize(
    ("known", "spec"),
    [
        (
            "momentum:keep_last=4,keep=attention:3,host=side_bits:4",
            "momentum:keep_last=3,keep=attention:4,host=side_bits:5",
        ),
        ("checkpoint:keep_last=9", "checkpoint:keep_last=5"),
        ("offload:host=inputs:4", "offload:host=inputs:9"),
    ],
)
def test_so_many_blocks_are_not_simulated_anew(known: str, spec: str) -> None:
    """The segments of one simulation make the step with other numbers, to the byte and the operation."""
    model_cls, config_cls, sizes, _, _ = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes | {"num_hidden_layers": 16}))
    _, forecaster = prepare(workload, batch=1, sequence=64, dtype="fp32", device="cpu")
    forecaster.trace(Method.parse(known), 1, 64)
    simulated = len(forecaster.simulated)
    method = Method.parse(spec)
    found = forecaster.prediction(method, forecaster.trace(method, 1, 64))
    assert len(forecaster.simulated) == simulated
    forecaster.simulated.clear()
    assert found == forecaster.prediction(method, forecaster.trace(method, 1, 64))


@pytest.mark.parametrize("spec", ["revnet", "momentum:k=3,keep_last=0,tile=20", "plain:tile=20", "checkpoint:tile=20"])
def test_pieces_that_are_alike_stand_for_each_other(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation of few of them predicts what one of all of them does."""
    model_cls, config_cls, sizes, _, _ = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes))
    _, forecaster = prepare(workload, batch=4, sequence=128, dtype="fp32", device="cpu", lora_rank=4)
    method = Method.parse(spec)
    monkeypatch.setattr(arithmetic, "SLICE", 2**10)
    found = forecaster.prediction(method, forecaster.trace(method, 4, 128))
    forecaster.simulated.clear()
    monkeypatch.setattr(simulate, "few_of_them", contextlib.nullcontext)
    every = forecaster.prediction(method, forecaster.trace(method, 4, 128))
    if method.tiles_attention:  # each tile counts as one of the last, as attention that is whole counts all pairs
        assert every.step_flops < found.step_flops < 1.15 * every.step_flops
        every = replace(every, step_flops=found.step_flops, step_seconds=found.step_seconds)
    assert found == every


def test_the_frontier_is_where_the_device_ends() -> None:
    """The largest batch fits the device and the next one does not, by simulating both."""
    model_cls, config_cls, sizes, _, _ = FAMILIES["gpt2"]
    workload = workload_of(model_cls, config_cls(**sizes | {"vocab_size": 5000}))
    room = load_device("cpu").memory_bytes - RESERVE_BYTES
    _, forecaster = prepare(workload, batch=8, sequence=64, dtype="fp32", device="cpu")
    for method in (method_of(forecaster, name) for name in ("plain", "checkpoint", "momentum")):
        here = forecaster.trace(method, 8, 64)
        reach = explore(forecaster, method, here).reach()
        assert reach.largest_batch is not None and reach.largest_batch > 100
        beyond = reach.largest_batch + max(reach.largest_batch // 200, 1)
        fits, does_not = (
            forecaster.peak(forecaster.trace(method, batch, 64), method) for batch in (reach.largest_batch, beyond)
        )
        assert fits <= room < does_not, method.name


def test_flops_are_three_forwards_and_four_with_recomputation() -> None:
    """Matrix products: plain 3 F, and every block's forward once more where it is recomputed."""
    model_cls, config_cls, sizes, batch, sequence = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes | {"vocab_size": 8, "num_hidden_layers": 12}))
    _, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype="fp32", device="cpu")
    flops = {s.name: predict(forecaster, s.name).step_flops for s in forecaster.methods()}
    assert 1.25 < flops["checkpoint"] / flops["plain"] < 4 / 3
    assert flops["momentum"] <= 4 / 3 * flops["plain"]
    assert flops["momentum"] == flops["leapfrog"] == flops["bdia"]
    # In pieces no block is stored: the last one is run twice, too.
    assert flops["momentum"] < flops["hamiltonian"] == flops["revnet"] <= 4 / 3 * flops["plain"]


def test_attention_drops_out_inside_of_a_gpus_kernel() -> None:
    """In the first run of a block and in the second: nothing else is kept, and nothing else computed, than without."""
    model_cls, config_cls, sizes, batch, sequence = FAMILIES["gpt2"]

    def forecast(dropout: float) -> dict[str, Prediction]:
        config = config_cls(**sizes | {"attn_pdrop": dropout, "resid_pdrop": 0.0, "embd_pdrop": 0.0})
        how = {"batch": batch, "sequence": sequence, "dtype": "bf16", "device": "h100-80gb"}
        _, forecaster = prepare(workload_of(model_cls, config), **how)
        # Attention that drops out is not tiled.
        return {m.known_as: predict(forecaster, m.known_as) for m in forecaster.methods() if m.tile is None}

    without = forecast(0.0)
    assert forecast(0.1) == without
    assert without.keys() > {"plain", "checkpoint", "momentum"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"trains": "LoRA"}, "trains is full, lora or head, not 'LoRA'"),
        ({"optimizer": "adam"}, "optimizer is adamw, adamw-fused, adamw-8bit, adamw-paged, adamw-8bit-paged, adamw-h"),
        ({"loss": "fused"}, "loss is full or chunked, not 'fused'"),
        ({"dtype": "fp8"}, "dtype is fp32, bf16 or fp16, not 'fp8'"),
        ({"trains": "head", "lora_rank": 4}, "lora_rank has no meaning with trains='head'"),
        ({"lora_rank": 0}, "the rank of adapters is a whole number, 1 or more, not 0"),
    ],
)
def test_a_setting_that_is_none(setting: dict[str, Any], said: str) -> None:
    """Refused before the model is built."""
    with pytest.raises(SettingError, match=re.escape(said)):
        autorev.predict("gpt2", **setting)


def test_a_forecast_takes_what_can_be_built(tmp_path: Path) -> None:
    """A folder as a path, too; a model that is there already is told where to go."""
    model_cls, config_cls, sizes, _, _ = FAMILIES["llama"]
    config_cls(**sizes, architectures=[model_cls.__name__]).save_pretrained(tmp_path)
    with comparing("plain"):
        assert autorev.predict(tmp_path, sequence=32, device="cpu", dtype="fp32").predictions
    with pytest.raises(SettingError, match=r"from a name, a folder.*autorev\.analyze\(model\)"):
        autorev.predict(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("given", "meant"), [({"lora_rank": 4}, ("lora", 4)), ({"trains": "lora"}, ("lora", 16)), ({}, ("full", None))]
)
def test_a_rank_means_lora(given: dict[str, Any], meant: tuple[str, int | None]) -> None:
    """In Python as on the command line."""
    model_cls, config_cls, sizes, batch, sequence = FAMILIES["llama"]
    analysis, _ = prepare(workload_of(model_cls, config_cls(**sizes)), batch=batch, sequence=sequence, **given)
    assert analysis.setting is not None
    assert (analysis.setting.trains, analysis.setting.lora_rank) == meant


def test_a_head_alone_leaves_nothing_to_reverse() -> None:
    """Where only the head trains, blocks keep nothing under any method; couplings hold their state in forward."""
    model_cls, config_cls, sizes, batch, sequence = FAMILIES["llama"]
    workload = workload_of(model_cls, config_cls(**sizes))
    _, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype="fp32", device="cpu", trains="head")
    predictions = {s: predict(forecaster, s.name) for s in forecaster.methods()}
    assert len({p.peak_bytes for s, p in predictions.items() if not s.reversible}) == 1
    assert len({p.kept_bytes for p in predictions.values()}) == 1
    stream = 4 * batch * (sequence or 1) * sizes["hidden_size"]
    plain, *others = predictions.values()
    assert plain.categories[Category.STORED_ACTIVATIONS] <= stream  # the head's own input
    assert all(plain.peak_bytes <= p.peak_bytes <= plain.peak_bytes + 4 * stream for p in others)


def method_of(forecaster: Forecaster, name: str) -> Method:
    """A method with its `keep_last`, without a simulation of the others."""
    return forecaster.settled(Method(name))


def predict(forecaster: Forecaster, name: str) -> Prediction:
    """One method's prediction at the setting's own sizes."""
    method = method_of(forecaster, name)
    trace = forecaster.trace(method, forecaster.setting.batch, forecaster.setting.sequence)
    return forecaster.prediction(method, trace)


# -- the truth ---------------------------------------------------------------------------------------------------------


def workload_of(model_cls: Any, config: Any) -> Workload:
    """The workload of a config, built in any dtype with random weights."""
    from autorev.integrations.building import building

    def build(dtype: torch.dtype) -> nn.Module:
        with building(dtype):
            model: nn.Module = model_cls._from_config(config, dtype=dtype)
        return model

    return transformers_workload(config, model_cls, build, model_cls.__name__, "a test")


def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward under PyTorch's own checkpoint."""
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def allocator_peak(
    workload: Workload,
    analysis: Analysis,
    wrap: Callable[..., Any] | None,
    batch: int,
    sequence: int | None,
    dtype: torch.dtype = torch.float32,
    prepared: Callable[[nn.Module], None] = lambda model: None,
) -> int:
    """Bytes at the highest point of the second (warm) training step of the real model."""
    assert analysis.setting is not None
    setting = analysis.setting
    torch.manual_seed(0)
    model = workload.build(dtype).train()
    args, kwargs = workload.example(batch, sequence)
    blocks = [b.path for chain in analysis.chains for b in chain.blocks] + [b.path for b in analysis.refused]
    freeze(model, setting.trains, setting.lora_rank, blocks)
    prepared(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if setting.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, foreach=False)
    else:
        momentum = 0.9 if setting.optimizer == "sgd-momentum" else 0.0
        optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=momentum, foreach=False)

    def step() -> None:
        model(*args, **kwargs).loss.backward()
        optimizer.step()

    patches = []
    if wrap is not None:
        modules = {path: model.get_submodule(path) for path in blocks}
        patches = [mock.patch.object(m, "forward", wrap(m.forward)) for m in modules.values()]
    for patch in patches:
        patch.start()
    try:
        step()
        optimizer.zero_grad(set_to_none=True)
        above = highest(step)
    finally:
        for patch in patches:
            patch.stop()
    inputs = [value for value in kwargs.values() if isinstance(value, torch.Tensor)]
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *inputs, *state]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + above


def freeze(model: nn.Module, trains: str, rank: int | None, blocks: list[str]) -> None:
    """An independent version of what `--trains` means."""
    if trains == "full":
        return
    model.requires_grad_(False)
    if trains == "head":
        model.get_output_embeddings().requires_grad_(True)  # type: ignore[operator, union-attr]
        return
    assert rank is not None
    for path in blocks:
        for parent in list(model.get_submodule(path).modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Adapter(child, rank))


class Adapter(nn.Module):
    """LoRA as anyone would write it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        result: torch.Tensor = self.base(x) + self.b(self.a(x))
        return result
