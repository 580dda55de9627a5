"""What each of several GPUs is predicted to hold: against FSDP2 in two processes, published figures, and arithmetic.

python -m pytest tests/integration/test_several_gpus.py
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from click.testing import CliRunner

import autorev
from autorev.analysis import Analysis, Category, Prediction
from autorev.cli import main
from autorev.errors import SettingError
from autorev.methods import Method
from autorev.optimizers import Optimizer
from autorev.pipeline import prepare
from autorev.prediction.forecast import Forecaster
from autorev.prediction.sharding import REDUCE_BUCKET, Division, Group, division_of
from autorev.prediction.update import updated_by
from autorev.profiler.passes.allocator import measure_memory
from autorev.profiler.passes.step import TrainingStep, optimizer_for
from autorev.setting import Setting
from autorev.workload import Workload

hf = pytest.importorskip("transformers")
from tests.integration.test_prediction import workload_of  # noqa: E402 - it needs transformers, too

RANKS = 2
BATCH, TOKENS = 8, 64
SHORT = 8
"""Tokens of a step whose memory is weights and gradients."""
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 101,  # no multiple of two
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 501,
}
ADAM = 2
"""Tensors of AdamW's state."""


def workload(**changes: Any) -> Workload:
    """A small Llama."""
    return workload_of(hf.LlamaForCausalLM, hf.LlamaConfig(**CONFIG | changes))


def forecast(given: Workload | None = None, **setting: Any) -> tuple[Analysis, Forecaster]:
    """Of one step on a CPU in fp32."""
    usual: dict[str, Any] = {"batch": BATCH, "sequence": TOKENS, "dtype": "fp32", "device": "cpu"}
    return prepare(given or workload(), **usual | setting)


def predicted(forecaster: Forecaster, name: str = "plain") -> Prediction:
    """A method's step."""
    setting, method = forecaster.setting, Method.parse(name)
    return forecaster.prediction(method, forecaster.trace(method, setting.batch, setting.sequence))


def divided(forecaster: Forecaster) -> Division:
    """How the model is divided."""
    assert forecaster.division is not None
    return forecaster.division


# -- FSDP2


class Here(TrainingStep):
    """What is alive before a step is this process's part."""

    def standing(self) -> list[torch.Tensor]:
        """Local tensors in the place of distributed ones."""
        return [t.to_local() if hasattr(t, "to_local") else t for t in super().standing()]


def lowest_peaks(step: TrainingStep) -> dict[str, int]:
    """By phase, of five steps: gloo's threads let go of their copies when they come to it."""
    peaks = [measure_memory(step).phase_peaks for _ in range(5)]
    return {phase: min(one[phase] for one in peaks) for phase in peaks[0]}


def work(rank: int, folder: str) -> None:
    """One of two processes: the bytes of what it holds after two steps, and the peak of the third."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "meet").as_uri(), rank=rank, world_size=RANKS)
    given = workload()
    model: Any = given.build(torch.float32).train()
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step = Here(model, given.example(BATCH, TOKENS), optimizer_for(model, "adamw"))
    for _ in range(2):
        step.run()
    parts = [p.to_local() for p in model.parameters()]
    states = [s for p in model.parameters() for s in step.optimizer.state[p].values()]
    local = [s.to_local() if hasattr(s, "to_local") else s for s in states]
    short = Here(model, given.example(1, SHORT), step.optimizer)
    short.run()
    found = {
        "parameters": sum(t.numel() * t.element_size() for t in parts),
        "states": sum(t.numel() * t.element_size() for t in local),
        "long": lowest_peaks(step),
        "short": lowest_peaks(short),
    }
    step.run(update=False)
    model(**step.call[1]).loss.backward()
    found["gradients"] = sum(p.grad.to_local().numel() * p.element_size() for p in model.parameters())
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both found."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
def test_parts_are_those_of_fsdp2_to_the_byte(ranks: list[dict[str, Any]]) -> None:
    """Weights, gradients and states of the rank that holds most; the other one has what is left."""
    _, forecaster = forecast(gpus=RANKS, shard="fsdp")
    division, plain = divided(forecaster), predicted(forecaster)
    whole = sum(p.numel() * p.element_size() for p in forecaster.twin.parameters())
    first, second = ranks
    groups = (*division.blocks, division.rest)
    assert sum(group.part for group in groups) == first["parameters"] > second["parameters"]
    assert first["parameters"] + second["parameters"] == whole
    assert sum(group.gradient_part for group in groups) == first["gradients"]
    assert forecaster.update().state == first["states"]
    assert plain.categories[Category.OPTIMIZER_STATE] == first["states"]


@pytest.mark.slow
def test_peaks_of_a_step_are_those_of_fsdp2(ranks: list[dict[str, Any]]) -> None:
    """What is gathered and reduced meanwhile included, but for the copy that gloo makes of what it gathers."""
    for name, size in (("long", {}), ("short", {"batch": 1, "sequence": SHORT})):
        _, forecaster = forecast(gpus=RANKS, shard="fsdp", **size)
        copy = max(group.gathered for group in divided(forecaster).blocks)
        for phase, peak in predicted(forecaster).phase_peaks.items():
            copies = 4 if phase == "optimizer" else 1  # those of backward may not have gone yet
            assert -1024 < ranks[0][name][phase] - peak < copies * copy + 1024, (name, phase)


# -- arithmetic


def test_what_is_not_divided_is_counted() -> None:
    """DDP's buckets; FSDP2's block in flight and the next one; DeepSpeed's buffer and fp32 weights."""
    one = predicted(forecast()[1])
    _, forecaster = forecast(gpus=8)
    gradients = divided(forecaster).gradients
    assert predicted(forecaster).peak_bytes == one.peak_bytes + gradients

    _, forecaster = forecast(gpus=8, shard="fsdp")
    division, found = divided(forecaster), predicted(forecaster)
    gathered = 2 * division.blocks[0].gathered + division.rest.gathered
    parts = sum(group.part for group in (*division.blocks, division.rest))
    assert parts < found.categories[Category.PARAMETERS] <= parts + gathered

    elements, one_setting = sum(p.numel() for p in forecaster.twin.parameters()), forecaster.setting
    for shard in ("zero1", "zero2", "zero3"):
        setting = replace(one_setting, shard=shard)
        divides = division_of(forecaster.twin, forecaster.layout, setting)
        forecaster = replace(forecaster, setting=setting, division=divides)
        division, found = divided(forecaster), predicted(forecaster)
        assert division.partition == pytest.approx(elements / 8, rel=0.01)
        assert found.categories[Category.OPTIMIZER_STATE] == (1 + ADAM) * division.partition * 4 + 4
        assert found.categories[Category.GRADIENTS] >= (REDUCE_BUCKET + division.partition) * 4
        whole = sum(p.numel() * 4 for p in forecaster.twin.parameters())
        if shard != "zero3":
            assert found.categories[Category.PARAMETERS] == whole + 64  # with buffers


def test_more_gpus_hold_less_each() -> None:
    """But for what is not divided; every method, and with gradients of a pass before."""
    for given in ({}, {"accumulate": 2}, {"trains": "lora", "lora_rank": 4}):
        _, one = forecast(**given)
        for shard in ("fsdp", "zero1", "zero2", "zero3"):
            settings = [replace(one.setting, gpus=gpus, shard=shard) for gpus in (2, 8)]
            forecasters = [replace(one, setting=s, division=division_of(one.twin, one.layout, s)) for s in settings]
            for method in ("plain", "momentum:k=3,keep_last=0"):
                few, many = (predicted(forecaster, method) for forecaster in forecasters)
                assert many.peak_bytes < few.peak_bytes, (given, shard, method)
                assert many.kept_bytes == few.kept_bytes
                assert sum(many.categories.values()) == many.peak_bytes
                assert min(many.categories.values()) >= 0


def test_tokens_are_divided_and_attention_sees_all_of_them() -> None:
    """Half of what is not attention; of attention half of the heads over the whole length."""
    _, whole = forecast(batch=1, sequence=1024)
    _, half = forecast(batch=1, sequence=1024, gpus=2, sequence_parallel=2)
    _, short = forecast(batch=1, sequence=512)
    flops, divided_flops, short_flops = (predicted(f).step_flops for f in (whole, half, short))
    assert divided_flops == flops / 2
    assert short_flops < 0.9 * divided_flops  # its attention sees half of the tokens
    # What attention returned is kept as it was exchanged, and as it was before.
    kept = CONFIG["num_hidden_layers"] * 512 * CONFIG["hidden_size"] * 4
    assert predicted(half).kept_bytes == predicted(short).kept_bytes + kept


def test_a_published_case() -> None:
    """A 7.5 B model with Adam in mixed precision on 64 GPUs: 120 GB, and 31.4, 16.6 and 1.9 under ZeRO (arXiv
    1910.02054, figure 1), without buffers and what is gathered."""
    parameters, gpus = 7.5e9, 64
    with torch.device("meta"):
        layers = torch.nn.ModuleList(torch.nn.Linear(2500, 3000, bias=False, dtype=torch.bfloat16) for _ in range(1000))
    group = Group(tuple(layers.parameters()), gpus)
    assert group.elements == parameters
    for shard, published in (("zero1", 31.4e9), ("zero2", 16.6e9), ("zero3", 1.9e9)):
        division = Division(gpus, shard, True, (), group)
        held = Counter({Category.PARAMETERS: group.whole, Category.GRADIENTS: division.gradients})
        held.update(division.standing())
        held[Category.GRADIENTS] -= division.bucket if shard == "zero3" else 0
        update = division.update(updated_by(layers, Optimizer("adamw"), "cuda"))
        assert held.total() + update.state == pytest.approx(published, rel=0.02), shard


# -- what a user sees


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Of a config."""
    hf.LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return str(tmp_path)


def test_reports_say_that_figures_are_per_gpu(folder: str) -> None:
    """On the terminal, with what is not in them."""
    how = ["--sequence", "64", "--gpus", "4", "--shard", "fsdp", "--sequence-parallel", "2"]
    result = CliRunner().invoke(main, ["fit", folder, *how, "--no-host"])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "per GPU, 4 GPUs, fsdp, 2 to a sample" in shown
    assert re.search(r"Peak [\d.]+ .iB of [\d.]+ GiB per GPU", shown)
    assert "what GPUs send each other is not in the times" in shown


SAID = {
    ("--gpus", "0"): "--gpus",
    ("--gpus", "-3"): "--gpus",
    ("--shard", "fsdp"): "divides a model among several GPUs; give --gpus, 2 or more",
    ("--shard", "ddp"): "--shard",
    ("--gpus", "4", "--sequence-parallel", "3"): "4 GPUs make no groups of 3",
    ("--gpus", "6", "--sequence-parallel", "6"): "64 tokens are not a multiple of it",
    ("--gpus", "4", "--sequence-parallel", "4"): "2 heads of keys, which --sequence-parallel 4 does not divide",
    ("--gpus", "2", "--shard", "fsdp", "--weights", "nf4", "--lora-rank", "8"): "are not predicted divided",
    ("--gpus", "2", "--optimizer", "adamw:step=backward"): "before it is summed over 2 GPUs",
    ("--gpus", "2", "--shard", "zero2", "--optimizer", "adamw-8bit"): "which --shard zero2 gives it",
}


@pytest.mark.parametrize("given", SAID, ids=" ".join)
def test_bad_input_is_one_sentence(given: tuple[str, ...], folder: str) -> None:
    """No traceback."""
    result = CliRunner().invoke(main, ["analyze", folder, "--no-html", "--sequence", "64", *given])
    assert result.exit_code == (2 if SAID[given].startswith("--") else 1), result.output
    assert SAID[given] in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_python_says_the_same() -> None:
    """Of a setting, of models that cannot be divided, and of plans that cannot be run."""
    for wrong in ({"gpus": 0}, {"gpus": True}, {"gpus": 2.0}, {"gpus": 2, "shard": "all"}, {"sequence_parallel": 0}):
        with pytest.raises(SettingError, match=r"gpus|shard|sequence_parallel"):
            forecast(**wrong)
    with pytest.raises(SettingError, match="not run here"):
        autorev.fit("smollm2-135m", gpus=2, measure=True)
    with pytest.raises(SettingError, match=r"no sequence axis"):
        autorev.predict("vit-large", gpus=2, sequence_parallel=2)


def test_a_record_of_before_is_one_gpu() -> None:
    """The fields that came later have a default."""
    recorded = Path(__file__).parents[2] / "profiles" / "recorded" / "analyses" / "llama-3.1-8b_lora_32k.json"
    setting = Analysis.from_json(recorded.read_text()).setting
    assert isinstance(setting, Setting)
    assert (setting.gpus, setting.shard, setting.sequence_parallel) == (1, "none", 1)
