"""Plans: what they say fits, fits; nothing that was looked at is faster; and they are put in place as they say.

python -m pytest tests/integration/test_fit.py
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autorev
from autorev.chunked_loss import unchunk_loss
from autorev.cli import main
from autorev.errors import ConversionError, SettingError
from autorev.methods import Method
from autorev.plan import Plan
from autorev.planning import fit as fitting
from autorev.report.render import render_html, render_markdown
from tests.helpers.tiny_llm import tiny_llm

pytestmark = pytest.mark.usefixtures("one_thread")


def llama(blocks: int = 8, vocabulary: int = 2048) -> LlamaForCausalLM:
    """Small, with a vocabulary whose logits weigh as much as the blocks do."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=224,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).train()


IDS = torch.arange(600).reshape(2, 300) % 2048
BATCH = {"input_ids": IDS, "labels": IDS, "use_cache": False}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """By memory; what was simulated of the model for one is not simulated anew for the others."""
    sizes = ("+1GiB", "+32MiB", "+9MiB", "+5MiB", "+3.3MiB", "1MiB")
    with mock.patch.object(fitting, "Search", partial(fitting.Search, _forecasters={})):
        return {memory: autorev.fit(llama(), BATCH, memory=memory, device="cpu") for memory in sizes}


def test_every_kind_of_answer(plans: dict[str, Plan]) -> None:
    """From nothing to nothing."""
    assert plans["+1GiB"].method == Method("plain")
    assert plans["+1GiB"].why == "nothing is needed: plain training fits"
    assert plans["+32MiB"].method == Method("plain", loss="chunked")
    assert plans["+32MiB"].why == "a loss in chunks is enough"
    assert plans["1MiB"].method is None
    assert plans["1MiB"].why.startswith("does not fit: the weights and the optimiser's state alone take more")
    assert "checkpointing is enough" in {plan.why.partition(";")[0].partition(",")[0] for plan in plans.values()}


def test_a_plan_fits_and_nothing_else_that_fits_is_faster(plans: dict[str, Plan]) -> None:
    """Single methods among them; the ladder ends with the plan."""
    for plan in plans.values():
        if plan.method is None:
            assert not any(option.fits for option in plan.options)
            continue
        chosen = plan.option
        assert chosen is not None
        assert chosen.peak_bytes <= plan.memory_bytes
        assert all(option.fits == (option.peak_bytes <= plan.memory_bytes) for option in plan.options)
        rivals = [option.seconds for option in plan.options if option.fits]
        assert plan.method.name == "plain" or chosen.seconds <= min(rivals) * 1.005  # as they are shown
        assert plan.rungs[-1].option == chosen
        assert plan.rungs[0].option.method == Method("plain")


def test_blocks_are_stored_until_the_memory_is_full(plans: dict[str, Plan]) -> None:
    """One more would not fit."""
    stored = [p for p in plans.values() if p.method is not None and p.method.keep_last not in ("auto", 0)]
    assert stored
    for plan in stored:
        assert plan.method is not None
        more = int(str(plan.method.keep_last)) + 1
        one_more = replace(plan.method, keep_last=more) if more < 8 else Method("plain", loss=plan.method.loss)
        by = plan.setting.optimizer
        found = next(option for option in plan.options if (option.method, option.optimizer) == (one_more, by))
        assert not found.fits


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**BATCH).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_plan_is_put_in_place(plans: dict[str, Plan]) -> None:
    """The model trains as the plan says, with the gradients of the plain one, and is as it was afterwards."""
    expected = step(llama())
    for plan in plans.values():
        model = llama()
        if plan.method is None:
            with pytest.raises(ConversionError, match="the plan says that nothing fits"):
                autorev.convert(model, plan)
            continue
        conversion = autorev.convert(model, plan)
        assert bool(conversion.checkpointed) == (plan.method.name in ("checkpoint", "offload"))
        assert bool(conversion.tiled) == (plan.method.tile is not None)
        assert "The function is the model's own" in str(conversion)
        loss, grads = step(model)
        assert loss == pytest.approx(expected[0], rel=1e-5)
        for name, grad in grads.items():
            assert (grad - expected[1][name]).norm() <= 1e-5 * expected[1][name].norm(), name
        autorev.revert(model)
        unchunk_loss(model)
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_plan_with_a_coupling_is_put_in_place(plans: dict[str, Plan]) -> None:
    """Blocks, tiles, the host and the loss."""
    plan = replace(plans["+1GiB"], method=Method.parse("momentum:k=3,keep_last=0,tile=128,host=side_bits,loss=chunked"))
    model, by_hand = llama(), llama()
    conversion = autorev.convert(model, plan)
    assert conversion.coupling == "momentum"
    assert conversion.tiled
    autorev.convert(by_hand, keep_last=0)
    autorev.chunk_loss(by_hand)
    loss, grads = step(model)
    expected = step(by_hand)
    assert loss == pytest.approx(expected[0], rel=1e-4)
    assert all((grads[n] - g).norm() <= 1e-3 * g.norm() for n, g in expected[1].items())


def test_a_plan_for_another_model_changes_nothing(plans: dict[str, Plan]) -> None:
    """In one sentence."""
    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(ConversionError, match="the plan is for LlamaForCausalLM, and this is GPT2LMHeadModel"):
        autorev.convert(other, plans["+5MiB"])
    assert not any("forward" in vars(module) for module in other.modules())


def test_without_the_host_no_plan_uses_it() -> None:
    """Neither offloading nor side bits."""
    plan = autorev.fit(llama(), BATCH, memory="+5MiB", device="cpu", host=False)
    assert not any(option.host_bytes for option in plan.options)
    assert not any(option.method.name == "offload" for option in plan.options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with weights and a tokenizer."""
    return tiny_llm(tmp_path_factory.mktemp("fit") / "llm")


@pytest.mark.parametrize("axis", ["batch", "sequence"])
def test_as_much_as_fits(axis: str, folder: Path) -> None:
    """The size that is found fits, and a few more do not; plain training reaches less far than what is best."""
    how: dict[str, Any] = {"batch": "auto", "sequence": 64} if axis == "batch" else {"batch": 8, "sequence": "auto"}
    plan = autorev.fit(str(folder), memory="+1MiB", device="cpu", dtype="fp32", **how)
    assert plan.axis == axis
    size = getattr(plan.setting, axis)
    assert size == plan.longest[0].size
    assert plan.method is not None
    reached = {each.method.spec: each.size for each in plan.longest}
    assert reached["plain:loss=chunked"] < size or size == 128  # the model's own limit
    if size < 128:
        beyond = autorev.fit(
            str(folder), memory="+1MiB", device="cpu", dtype="fp32", **{**how, axis: size + max(2, size // 50)}
        )
        assert beyond.method is None or beyond.method not in reached


@pytest.mark.slow
@pytest.mark.parametrize("live", [False, True], ids=["by name", "of the user's own"])
def test_a_plan_that_is_run_holds(live: bool, folder: Path) -> None:
    """By the allocator, in a process of its own, with the adapters that it was made for."""
    how: dict[str, Any] = {"device": "cpu", "measure": True, "lora_rank": 2}
    if live:
        plan = autorev.fit(llama(), BATCH, memory="+9MiB", **how)
    else:
        plan = autorev.fit(str(folder), 8, sequence=64, memory="+2MiB", dtype="fp32", **how)
    assert plan.measured is not None
    assert plan.measured.holds
    assert plan.option is not None
    assert plan.measured.peak_bytes == pytest.approx(plan.option.peak_bytes, rel=0.02)


def test_a_plan_that_does_not_hold_is_tightened(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What was measured above its prediction says how far off all others are."""

    class Result:
        reason, step_seconds = "", 1.0

        def __init__(self, peak: int) -> None:
            self.memory = type("Memory", (), {"peak_bytes": peak, "host_bytes": 0})

    ran: list[str] = []

    def profile(model: Any, batch: Any, methods: list[str], **how: Any) -> Any:
        ran.append(methods[0])
        predicted = {option.method.spec: option.peak_bytes for option in before.options}
        return type("Profile", (), {"results": [Result(round(predicted[methods[0]] * 1.1))]})

    how: dict[str, Any] = {"sequence": 64, "memory": "+2MiB", "device": "cpu", "dtype": "fp32", "lora_rank": 2}
    before = autorev.fit(str(folder), 8, **how)
    monkeypatch.setattr(fitting, "profile", profile)
    plan = autorev.fit(str(folder), 8, measure=True, **how)
    assert ran[0] == before.method.spec if before.method else False
    assert plan.measured is not None
    assert plan.measured.holds == (plan.measured.peak_bytes <= plan.memory_bytes)
    if len(ran) > 1:
        assert ran[1] != ran[0]


def test_the_record_and_its_reports(plans: dict[str, Plan]) -> None:
    """Written, read again, and shown on every surface."""
    for plan in plans.values():
        assert Plan.from_json(plan.to_json()) == plan
        text, page = str(plan), render_html([plan], "autorev fit")
        assert plan.model.name in text
        title = "Nothing fits" if plan.method is None else plan.method.spec.split(",")[0]
        assert ("Train as it is" if title == "plain" else title) in text
        assert "time-against-memory" in page
        assert "What each step buys" in render_markdown([plan]) or len(plan.rungs) < 2


def test_frontier(plans: dict[str, Plan]) -> None:
    """Faster ones need more memory, and nothing off it beats one of them in both."""
    for plan in plans.values():
        best = plan.frontier
        assert all(a.peak_bytes > b.peak_bytes for a, b in itertools.pairwise(best))
        for option in plan.options:
            assert any(b.seconds <= option.seconds * 1.005 and b.peak_bytes <= option.peak_bytes for b in best)


# -- what is refused


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"memory": "lots"}, "'lots' is no amount of memory"),
        ({"memory": 0}, "'0' is no amount of memory"),
        ({"sequence": 64}, "a model of yours is planned for on the batch that it is given"),
        ({"batch": "auto"}, "a model of yours is planned for on the batch that it is given"),
        ({"optimizer": "adagrad"}, "adagrad"),
    ],
)
def test_bad_values(how: dict[str, Any], words: str) -> None:
    """One sentence."""
    with pytest.raises(SettingError, match=words):
        autorev.fit(llama(2), **{"batch": BATCH, "device": "cpu", **how})


def test_both_at_once(folder: Path) -> None:
    """Batch and sequence cannot both be looked for."""
    with pytest.raises(SettingError, match="cannot both be as large as fits"):
        autorev.fit(str(folder), "auto", sequence="auto", memory="1GiB")
    with pytest.raises(SettingError, match="batch is a number of samples"):
        autorev.fit(str(folder), {"input_ids": 1}, memory="1GiB")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """JSON is a plan; a memory below the weights ends with 1 and the reason; bad sizes are usage errors."""
    runner = CliRunner()
    usual = ["fit", str(folder), "--batch", "4", "--sequence", "64", "--dtype", "fp32", "--device", "cpu"]
    done = runner.invoke(main, [*usual, "--memory", "+2MiB", "--json"])
    assert done.exit_code == 0, done.output
    plan = Plan.from_json(done.stdout)
    assert plan.method is not None
    (tmp_path / "plan.json").write_text(done.stdout)
    shown = runner.invoke(main, ["report", str(tmp_path / "plan.json"), "--html", str(tmp_path / "plan.html")])
    assert shown.exit_code == 0, shown.output
    assert "Plan" in shown.output
    assert (tmp_path / "plan.html").stat().st_size > 10_000
    small = runner.invoke(main, [*usual, "--memory", "1KiB"])
    assert small.exit_code == 1
    assert "Nothing fits" in small.output
    several = (["--memory", "much"], ["--batch", "0"], ["--sequence", "none"], ["--lora-rank", "2", "--trains", "full"])
    for bad in several:
        refused = runner.invoke(main, [*usual, *bad])
        assert refused.exit_code != 0
        assert "bug" not in refused.output
        assert "Traceback" not in refused.output


def test_a_run_takes_its_method_from_a_plan(folder: Path, tmp_path: Path) -> None:
    """`finetune --plan`: method, sizes and adapters; a plan and a method contradict each other."""
    plan = autorev.fit(str(folder), 2, sequence=48, memory="+2MiB", device="cpu", dtype="fp32", lora_rank=2)
    plan = replace(plan, method=Method.parse("momentum:k=3,keep_last=0,loss=chunked"))
    plan = replace(plan, setting=replace(plan.setting, optimizer="adamw-fused:step=backward"))
    (tmp_path / "plan.json").write_text(plan.to_json())
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of a text that repeats itself: {n * n}." for n in range(120)))
    usual = ["finetune", str(folder), "--plan", str(tmp_path / "plan.json"), "--text", str(text), "--steps", "2"]
    run = CliRunner().invoke(main, [*usual, "--validation-rows", "2", "--out", str(tmp_path / "run"), "--json"])
    assert run.exit_code == 0, run.output
    record = json.loads(run.stdout)
    assert record["method"] == "momentum:k=3,keep_last=0,loss=chunked"
    assert (record["recipe"]["sequence"], record["recipe"]["lora_rank"]) == (48, 2)
    assert (record["recipe"]["optimizer"], record["recipe"]["clip"]) == ("adamw-fused:step=backward", 0)
    both = CliRunner().invoke(main, [*usual, "--method", "leapfrog", "--out", str(tmp_path / "other")])
    assert both.exit_code == 2
    assert "--plan says by which method; leave --method out" in both.output


# -- the optimiser


SHORT = {"input_ids": IDS[:, :8], "labels": IDS[:, :8], "use_cache": False}
"""Of a model with a large vocabulary: a step that is highest in its update."""


@pytest.fixture(scope="module")
def updates() -> dict[str, Plan]:
    """By memory."""
    return {m: autorev.fit(llama(2, 8192), SHORT, memory=m, device="cpu") for m in ("1GiB", "20MiB", "16.5MiB", "9MiB")}


def test_an_optimizer_that_makes_room(updates: dict[str, Plan]) -> None:
    """None where none is needed; then fused, then stepping in backward, which is said to clip nothing."""
    assert [plan.setting.optimizer for plan in updates.values()] == [
        *("adamw", "adamw-fused", "adamw-fused:step=backward", "adamw"),
    ]
    assert [plan.why for plan in updates.values()] == [
        "nothing is needed: plain training fits",
        "a loss in chunks is enough with fused AdamW",
        "plain training fits with fused AdamW, stepping in backward",
        "does not fit: the weights and the optimiser's state alone take more than there is",
    ]
    told = [any("they are not clipped" in note for note in plan.notes) for plan in updates.values()]
    assert told == [False, False, True, False]


def test_what_an_optimizer_buys_is_in_the_table(updates: dict[str, Plan]) -> None:
    """A step of its own, whose bytes are the difference of two simulated peaks."""
    plan = updates["16.5MiB"]
    assert [rung.what for rung in plan.rungs] == ["plain training", "fused AdamW, stepping in backward"]
    before, after = (rung.option for rung in plan.rungs)
    assert after.peak_bytes < plan.memory_bytes < before.peak_bytes
    assert plan.option == after
    text = str(plan)
    assert "Train with adamw-fused:step=backward" in text
    assert "fused AdamW, stepping in backward" in render_markdown([plan])
    assert "adamw-fused:step=backward" in render_html([plan], "autorev fit")
    assert Plan.from_json(plan.to_json()) == plan


def test_what_convert_leaves_to_do(updates: dict[str, Plan]) -> None:
    """An optimiser is no part of a model; the note makes it."""
    model = llama(2, 8192)
    conversion = autorev.convert(model, updates["20MiB"])
    assert 'make_optimizer(model, "adamw-fused", learning_rate)' in str(conversion)
    autorev.revert(model)
    unchunk_loss(model)
    assert not any("optimizer" in note for note in autorev.convert(model, updates["1GiB"]).notes)


def test_what_is_asked_for_stays(updates: dict[str, Plan]) -> None:
    """A named one is the only one; sums of several passes need their gradients; LoRA has next to nothing to free."""
    named = autorev.fit(llama(2, 8192), SHORT, memory="20MiB", device="cpu", optimizer="adamw")
    assert named.method is None
    eight = autorev.fit(llama(2, 8192), SHORT, memory="1GiB", device="cpu", optimizer="adamw-8bit")
    assert {option.optimizer for option in eight.options} == {eight.setting.optimizer} == {"adamw-8bit"}
    twice = autorev.fit(llama(2, 8192), SHORT, memory="16.5MiB", device="cpu", accumulate=2)
    assert twice.options
    assert not any("step=backward" in option.optimizer for option in twice.options)
    adapters = autorev.fit(llama(2, 8192), SHORT, memory="5MiB", device="cpu", lora_rank=2)
    assert {option.optimizer for option in adapters.options} == {"adamw"}


def test_the_host_where_nothing_else_fits() -> None:
    """And not without it."""
    how: dict[str, Any] = {"memory": "8MiB", "device": "h100-80gb"}
    plan = autorev.fit(llama(2, 8192), SHORT, **how)
    assert plan.setting.optimizer == "adamw-host:gradients=host"
    assert plan.option is not None and plan.option.host_bytes > 4 * plan.model.parameters * 3
    assert autorev.fit(llama(2, 8192), SHORT, host=False, **how).method is None


@pytest.mark.slow
def test_a_planned_optimizer_that_is_run_holds() -> None:
    """By the allocator."""
    plan = autorev.fit(llama(2, 8192), SHORT, memory="16.5MiB", device="cpu", measure=True)
    assert plan.measured is not None and plan.option is not None
    assert plan.setting.optimizer == "adamw-fused:step=backward"
    assert plan.measured.holds
    assert plan.measured.peak_bytes == pytest.approx(plan.option.peak_bytes, rel=0.01)
