"""`finetune` in two processes, as `torchrun` starts them: what one computes with twice the batch, written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from autorev.errors import SettingError, TrainingError
from autorev.finetuning import world
from autorev.finetuning.options import Options, check
from autorev.finetuning.record import FineTuning
from tests.helpers.several import PAIRS, RUNS
from tests.helpers.tiny_run import USUAL, At, interrupt, tune, workplace

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "quick_collections")]
ROOT = Path(__file__).parents[2]
RANKS = 2


def launched(*command: str) -> subprocess.CompletedProcess[str]:
    """Two processes of `command`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*torchrun, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)


def by_command(folder: Path, out: str) -> subprocess.CompletedProcess[str]:
    """`autorev finetune` with the usual options."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in USUAL.items()]
    text = f"--text={folder / 'text.txt'}"
    return launched("cli.py", "finetune", str(folder / "llm"), text, f"--out={folder / out}", *options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all that two processes did."""
    place = workplace(tmp_path_factory.mktemp("several"))
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    with pytest.raises(TrainingError, match="interrupted after step 4 of 7"):
        tune(place, out="begun-alone", batch=1, accumulate=RANKS, callbacks=(At(3, interrupt),))
    done = launched("-m", "tests.helpers.several", str(place))
    assert "exitcode  : 3" in done.stderr, done.stderr
    return place


def record_of(folder: Path, name: str) -> FineTuning:
    """Of a run of two processes."""
    return FineTuning.read(folder / name / "run.json")


def assert_alike(folder: Path, name: str, other: str) -> None:
    """Two complete runs went the same way."""
    a, b = record_of(folder, name), record_of(folder, other)
    assert a.complete and b.complete and len(a.logged) == len(b.logged) == a.recipe.steps
    for x, y in zip(a.logged, b.logged, strict=True):
        assert x.loss == pytest.approx(y.loss, rel=1e-4)
        assert x.gradient_norm == pytest.approx(y.gradient_norm, rel=2e-3)
        assert (x.drift, x.side_bits) == (y.drift, y.side_bits)
        assert x.tokens and y.tokens and x.tokens <= y.tokens <= 2 * x.tokens  # each pads to its own longest row
        assert (x.divergence or 0) == pytest.approx(y.divergence or 0, rel=1e-2, abs=1e-6)
    assert [e.step for e in a.evaluations] == [e.step for e in b.evaluations]
    assert [e.loss for e in a.evaluations] == pytest.approx([e.loss for e in b.evaluations], rel=1e-4)
    (weights,) = (folder / name).glob("*model.safetensors")
    expected = load_file(folder / other / weights.name)
    for key, value in load_file(weights).items():
        torch.testing.assert_close(value, expected[key], atol=1e-5 if a.recipe.dtype == "fp32" else 1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_it_is_a_larger_batch(folder: Path, name: str) -> None:
    """Two processes with a row each and one with two rows train alike; where rows differ in tokens, too."""
    how = {option: value for option, value in RUNS[name].items() if option != "shard"}
    tune(folder, out=f"{name}-1", steps=3, batch=RANKS, **how)
    assert_alike(folder, name, f"{name}-1")
    recipe = record_of(folder, name).recipe
    assert (recipe.processes, recipe.batch, recipe.rows) == (RANKS, 1, RANKS * recipe.accumulate)
    assert recipe.shard == RUNS[name].get("shard", "none")
    assert not list((folder / name).glob("checkpoint-*")) and not list((folder / name).glob(".*"))


def test_one_is_told_to_stop(folder: Path) -> None:
    """All stop after the same step, and say the same; one process takes the run to the end that it had otherwise."""
    said = [(folder / f"interrupted.{rank}").read_text() for rank in range(RANKS)]
    assert said[0] == said[1] and "interrupted after step 4 of 7" in said[0]
    tune(folder, out="uninterrupted", batch=RANKS)
    record = tune(folder, out="interrupted", resume=True)
    assert_alike(folder, "interrupted", "uninterrupted")
    assert (record.recipe.processes, record.recipe.accumulate) == (1, 2)
    assert any("gone on with by 1 instead of 2 processes" in note for note in record.notes)


def test_a_checkpoint_is_whole(folder: Path) -> None:
    """One process goes on with a sharded run as with its own, and sharded processes with that of one."""
    tune(folder, out="alone", batch=RANKS)
    record = tune(folder, out="begun-sharded", resume=True, shard="none")
    for name, shard in (("begun-sharded", "none"), ("begun-alone", "fsdp")):
        assert_alike(folder, name, "alone")
        record = record_of(folder, name)
        assert record.recipe.shard == shard and any(f"gone on with by shard={shard}" in note for note in record.notes)


def test_what_cannot_be_sharded(folder: Path) -> None:
    """Says so before anything is written."""
    for rank in range(RANKS):
        assert "quantised to int8 cannot be sharded" in (folder / f"quantised.{rank}").read_text()
    assert not (folder / "quantised").exists()
    with pytest.raises(SettingError, match="this is the only one: start them with torchrun"):
        check(Options(shard="fsdp"))
    with pytest.raises(SettingError, match="shard is none or fsdp, not 'zero3'"):
        check(Options(shard="zero3"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "trains by FSDP, which `finetune` does not.*`shard=fsdp` spreads the weights"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "trains by DeepSpeed"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision of fp16; launch with --mixed_precision no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "launch with --dynamo_backend no, not inductor"),
    ],
)
def test_what_a_launcher_asks_for(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    """And the run's options do not say: its record would not either."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=said):
        check(Options())
    monkeypatch.setenv(name, "no")
    assert check(Options(autocast="bf16")).spec == "momentum:k=3"


def test_one_fails(folder: Path) -> None:
    """Weights that broke in one process end both; what was saved before is whole."""
    assert "not numbers" in (folder / "broken.1").read_text()
    assert [row.step for row in record_of(folder, "broken").logged] and not record_of(folder, "broken").complete


def test_an_optimizer_for_one_process(folder: Path) -> None:
    """It is refused everywhere, before anything is written."""
    for rank in range(RANKS):
        assert "before those of 2 processes are averaged" in (folder / f"stepping.{rank}").read_text()
    assert not (folder / "stepping").exists()


def test_the_command(folder: Path) -> None:
    """It prints one report, and its folder is taken for the next one, which says so once."""
    done = by_command(folder, "commanded")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps of 2 x 48 tokens in 2 processes") == 1
    assert record_of(folder, "commanded").recipe.processes == RANKS
    again = by_command(folder, "commanded")
    assert again.returncode == 1 and again.stdout == ""
    assert again.stderr.count("is there already; go on with its run by --resume") == 1
    assert "autorev/cli" not in again.stderr  # torchrun's own traceback is all there is


def test_a_step_that_cannot_be_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of two rows a step is not for three processes."""
    from autorev.finetuning.options import settled

    record = record_of(folder, "padded")
    assert settled({}, record, folder / "padded" / "run.json").accumulate == RANKS
    monkeypatch.setattr(world, "size", lambda: 3)
    with pytest.raises(SettingError, match="2 x 1 rows, which 3 processes cannot share evenly; go on with it in 2"):
        settled({}, record, folder / "padded" / "run.json")
    with pytest.raises(SettingError, match="before those of 3 processes are averaged"):
        check(Options(optimizer="sgd:step=backward"))
