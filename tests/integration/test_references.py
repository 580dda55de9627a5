"""trl's trainers that compare a policy with a reference: at learning rate 0 the two are the same function."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import autorev
from autorev.conversion.convert import chains_of
from autorev.conversion.references import match_references
from autorev.errors import ConversionError
from autorev.finetuning.callback import ReversibleCallback
from tests.helpers.tiny_llm import tiny_llm

trl = pytest.importorskip("trl", reason="the trainers are trl's")
datasets = pytest.importorskip("datasets", reason="trl's trainers read its data sets")
peft = pytest.importorskip("peft", reason="half of the trainings are LoRA")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true but no accelerator:UserWarning"),
    # trl 1.16 calls what transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
LN2 = math.log(2)
PAIRS = [
    {"prompt": f"{n} + {n} = ", "chosen": f"{2 * n}, of course.", "rejected": f"{3 * n + 1}, I would say."}
    for n in range(8)
]
LABELLED = [{"prompt": p["prompt"], "completion": p["chosen"], "label": n % 2 == 0} for n, p in enumerate(PAIRS)]
TEXTS = [{"text": p["prompt"] + p["chosen"]} for p in PAIRS]
COUPLINGS = [{}, {"method": "leapfrog"}, {"method": "momentum", "gamma": {"*.0": 0.5, "*": 0.25}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the trainers load their reference from, with an opinion on every token."""
    folder = tiny_llm(tmp_path_factory.mktemp("policy") / "llm")
    model = loaded(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Trainers seed the random numbers of the process."""
    with torch.random.fork_rng():
        yield


def loaded(folder: Path) -> Any:
    """The plain model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def letters(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs from one completion to the next."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def trainer_of(kind: str, model: Any, folder: Path, out: Path, *, lora: bool = False, **how: Any) -> Any:
    """One of trl's trainers that takes a step at a learning rate of 0."""
    usual: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    made: dict[str, Any] = {"model": model, "processing_class": AutoTokenizer.from_pretrained(folder)}
    if lora:
        made["peft_config"] = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if "ref_model" in how:
        made["ref_model"] = how.pop("ref_model")
    if kind in ("GRPO", "RLOO"):
        made |= {
            "reward_funcs": letters,
            "train_dataset": datasets.Dataset.from_list([{"prompt": p["prompt"]} for p in PAIRS]),
        }
        usual |= {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
    else:
        rows = {"KTO": LABELLED, "SFT": TEXTS}.get(kind, PAIRS)
        made["train_dataset"] = datasets.Dataset.from_list(rows)
    args = getattr(trl, f"{kind}Config")(**{**usual, **how})
    return getattr(trl, f"{kind}Trainer")(args=args, **made)


def first_log(trainer: Any) -> dict[str, Any]:
    """What the first step logs."""
    trainer.train()
    return next(row for row in trainer.state.log_history if "loss" in row)


def check_alike(kind: str, row: dict[str, Any]) -> None:
    """The policy is its reference: ln 2, or no divergence at all."""
    if kind == "DPO":
        assert row["loss"] == pytest.approx(LN2, abs=1e-4)
        assert row["rewards/margins"] == pytest.approx(0, abs=1e-4)
    elif kind == "KTO":
        assert row["loss"] == pytest.approx(0.5, abs=1e-4)
    else:
        assert row["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("how", "attached"),
    [(COUPLINGS[0], True), *((how, False) for how in COUPLINGS)],
    ids=["attached", "usual", "leapfrog", "momentum"],
)
def test_the_first_loss_of_dpo(folder: Path, tmp_path: Path, how: dict[str, Any], attached: bool, caplog: Any) -> None:
    """ln 2 under every coupling, whether our callback is there or not; and it is said that a model was converted."""
    model = loaded(folder)
    autorev.convert(model, **how)
    trainer = trainer_of("DPO", model, folder, tmp_path)
    assert not chains_of(trainer.ref_model)
    if attached:
        ReversibleCallback().attach(trainer)
    check_alike("DPO", first_log(trainer))
    policy, reference = (chains_of(m) for m in (trainer.model, trainer.ref_model))
    assert [c.couplings for c in policy] == [c.couplings for c in reference]
    assert "DPOTrainer.ref_model is converted like the policy" in caplog.text


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_every_trainer_with_a_reference(folder: Path, tmp_path: Path, kind: str, lora: bool) -> None:
    """Far from the plain function as leapfrog is; with adapters the reference is the policy without them."""
    model = loaded(folder)
    autorev.convert(model, method="leapfrog")
    trainer = trainer_of(kind, model, folder, tmp_path, lora=lora)
    assert (trainer.ref_model is None) == lora
    check_alike(kind, first_log(trainer))


def test_a_reference_that_is_kept_up_with_the_policy(folder: Path, tmp_path: Path) -> None:
    """`sync_ref_model` mixes the policy's weights into the reference, which stays coupled."""
    model = loaded(folder)
    autorev.convert(model, method="leapfrog")
    trainer = trainer_of("DPO", model, folder, tmp_path, sync_ref_model=True, ref_model_sync_steps=1)
    check_alike("DPO", first_log(trainer))
    assert chains_of(trainer.ref_model)


def test_a_copy_that_trl_makes(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """`create_reference_model` of a converted model is converted; nothing is left to do."""
    from trl.experimental.utils import create_reference_model

    model = loaded(folder)
    autorev.convert(model, method="leapfrog")
    reference = create_reference_model(model)
    assert chains_of(reference)[0] is not chains_of(model)[0]
    trainer = trainer_of("DPO", model, folder, tmp_path, ref_model=reference)
    check_alike("DPO", first_log(trainer))
    assert "is converted like" not in caplog.text and "than the policy" not in caplog.text


def test_a_model_that_is_converted_in_its_trainer(folder: Path, tmp_path: Path) -> None:
    """After trl and accelerate have wrapped its forward."""
    trainer = trainer_of("DPO", loaded(folder), folder, tmp_path)
    autorev.convert(trainer.model, method="leapfrog")
    check_alike("DPO", first_log(trainer))


@pytest.mark.parametrize("kind", ["DPO", "SFT"])
def test_adapters_that_the_trainer_makes_are_converted_in_it(folder: Path, tmp_path: Path, kind: str) -> None:
    """trl has wrapped the forward of the model within PEFT's."""
    trainer = trainer_of(kind, loaded(folder), folder, tmp_path, lora=True)
    assert "forward" in vars(trainer.model.get_base_model())
    assert len(autorev.convert(trainer.model, method="leapfrog").chains[0].blocks) == 4
    row = first_log(trainer)
    assert autorev.drift(trainer.model) == {"base_model.model.model.layers": 0.0}
    if kind == "DPO":
        check_alike(kind, row)


class Move(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Another gamma after the first step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """As a schedule does."""
        if state.global_step == 1:
            autorev.recouple(model, gamma={"*.0": 1 / 8, "*": 1.0})


@pytest.mark.parametrize("given", [False, True])
def test_a_reference_goes_along_when_gamma_moves(folder: Path, tmp_path: Path, given: bool) -> None:
    """One that trl loads, and one that was converted by hand."""
    model, reference = loaded(folder), loaded(folder)
    autorev.convert(model, gamma=0.5)
    autorev.convert(reference, gamma=0.5)
    how = {"ref_model": reference} if given else {}
    trainer = trainer_of("DPO", model, folder, tmp_path, max_steps=3, **how)
    trainer.add_callback(Move())
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        check_alike("DPO", row)


def test_adapters_of_a_policy_beside_a_reference_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Converted within PEFT's model, whose names are longer than the reference's."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(loaded(folder), config)
    autorev.convert(model, gamma={"base_model.model.model.layers.0": 0.5, "*": 0.25})
    trainer = trainer_of("DPO", model, folder, tmp_path, ref_model=loaded(folder))
    check_alike("DPO", first_log(trainer))
    policy, reference = (chains_of(m)[0] for m in (trainer.model, trainer.ref_model))
    assert policy.couplings == reference.couplings


# -- log-probabilities from before training


def test_log_probabilities_of_the_policy_itself(folder: Path, tmp_path: Path) -> None:
    """Without a reference model they are the coupled policy's."""
    model = loaded(folder)
    autorev.convert(model, method="leapfrog")
    trainer = trainer_of("DPO", model, folder, tmp_path, precompute_ref_log_probs=True)
    check_alike("DPO", first_log(trainer))


@pytest.mark.parametrize("attached", [True, False])
def test_log_probabilities_of_a_plain_reference(folder: Path, tmp_path: Path, attached: bool) -> None:
    """They are in the data set before anybody could look; training is refused."""
    model = loaded(folder)
    autorev.convert(model, method="leapfrog")
    trainer = trainer_of("DPO", model, folder, tmp_path, precompute_ref_log_probs=True, ref_model=loaded(folder))
    with pytest.raises(ConversionError, match=r"ref_chosen_logps was computed beforehand by another function.*cleanup"):
        ReversibleCallback().attach(trainer) if attached else trainer.train()


def test_log_probabilities_of_a_model_converted_too_late(folder: Path, tmp_path: Path) -> None:
    """Likewise."""
    trainer = trainer_of("DPO", loaded(folder), folder, tmp_path, precompute_ref_log_probs=True)
    autorev.convert(trainer.model, method="leapfrog")
    with pytest.raises(ConversionError, match="before the trainer is made"):
        trainer.train()


# -- what is left alone, and what is said of it


def test_a_reference_under_another_coupling(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """Is what somebody has asked for; it is said."""
    model, reference = loaded(folder), loaded(folder)
    autorev.convert(model, method="leapfrog")
    autorev.convert(reference, method="midpoint")
    ReversibleCallback().attach(trainer_of("DPO", model, folder, tmp_path, ref_model=reference))
    assert "DPOTrainer.ref_model is converted with another method than the policy" in caplog.text


def test_a_reference_with_other_blocks_converted(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """Is another function, whatever its coupling is called; one that is asked for in other words is the same."""
    model, other, same = (loaded(folder) for _ in range(3))
    autorev.convert(model, method="leapfrog", exclude="model.layers.0")
    autorev.convert(other, method="leapfrog")
    autorev.convert(same, method="momentum", gamma=1, c=1, blocks="model.layers.[123]")
    ReversibleCallback().attach(trainer_of("DPO", model, folder, tmp_path, ref_model=same))
    assert caplog.text == ""
    ReversibleCallback().attach(trainer_of("DPO", model, folder, tmp_path, ref_model=other))
    assert "DPOTrainer.ref_model is converted with another set of blocks than the policy" in caplog.text


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_coupling_that_is_drawn_for_each_call(folder: Path, tmp_path: Path, lora: bool, caplog: Any) -> None:
    """Makes policy and reference differ from the first step on, which is said; where nothing is compared, it is not."""
    model = loaded(folder)
    autorev.convert(model, method="bdia")
    ReversibleCallback().attach(trainer_of("GRPO", model, folder, tmp_path, beta=0.0))
    assert caplog.text == ""
    ReversibleCallback().attach(trainer_of("DPO", model, folder, tmp_path, lora=lora))
    assert "DPOTrainer compares the policy with a reference, and a coupling whose signs are drawn" in caplog.text


def test_a_reference_of_another_architecture(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """Is no starting point of the policy; it is said."""
    model = loaded(folder)
    other = AutoModelForCausalLM.from_pretrained(tiny_llm(tmp_path / "deep", blocks=6), dtype=torch.float32)
    autorev.convert(model)
    ReversibleCallback().attach(trainer_of("DPO", model, folder, tmp_path / "out", ref_model=other))
    assert "DPOTrainer.ref_model (LlamaForCausalLM) is another architecture" in caplog.text
    assert not chains_of(other)


def test_a_plain_policy_beside_a_plain_reference(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """Nothing is converted that nobody asked for."""
    trainer = trainer_of("DPO", loaded(folder), folder, tmp_path)
    ReversibleCallback().attach(trainer)
    assert not chains_of(trainer.ref_model) and caplog.text == ""


def test_a_plain_policy_beside_a_converted_reference(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """The policy is its user's to convert; it is said once that the two are different functions."""
    model, reference = loaded(folder), loaded(folder)
    autorev.convert(reference)
    trainer = trainer_of("DPO", model, folder, tmp_path, ref_model=reference)
    for _ in range(2):
        ReversibleCallback().attach(trainer)
    said = "DPOTrainer.ref_model is converted, and the policy beside it computes the plain function"
    assert caplog.text.count(said) == 1
    assert not chains_of(model)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_a_plain_policy_beside_a_converted_reference_is_noticed_without_our_callback(
    folder: Path, tmp_path: Path, kind: str, caplog: Any
) -> None:
    """The trainer runs its reference, without gradients: then it is looked at who does. Alone, a model says nothing."""
    model, reference = loaded(folder), loaded(folder)
    autorev.convert(reference)
    with torch.no_grad():
        reference(torch.arange(8)[None], use_cache=False)
    assert "plain function" not in caplog.text
    first_log(trainer_of(kind, model, folder, tmp_path, ref_model=reference, max_steps=2))
    said = f"{kind}Trainer.ref_model is converted, and the policy beside it computes the plain function"
    assert caplog.text.count(said) == 1
    assert not chains_of(model)


class Loop:
    """Somebody's own loop."""

    def __init__(self, model: Any, **others: Any) -> None:
        self.model = model
        vars(self).update(others)

    def run(self) -> None:
        """One step's beginning."""
        self.model.train()
        for name in ("ref_model", "teacher_model"):
            getattr(self, name).eval()


def test_a_loop_of_somebody_s_own(folder: Path, caplog: Any) -> None:
    """Nobody knows what it compares: it is told once, of the reference and of nothing else."""
    model, reference, teacher = (loaded(folder) for _ in range(3))
    autorev.convert(model)
    loop = Loop(model, ref_model=reference, teacher_model=teacher, reference_text="a")
    loop.run()
    loop.run()
    assert caplog.text.count("Loop.ref_model computes the plain function") == 1 and "teacher" not in caplog.text
    assert not chains_of(reference) and not chains_of(teacher)


def test_a_loop_with_a_plain_policy(folder: Path, caplog: Any) -> None:
    """The reference notices who holds it."""
    model, reference, teacher = (loaded(folder) for _ in range(3))
    autorev.convert(reference)
    loop = Loop(model, ref_model=reference, teacher_model=teacher)
    loop.run()
    loop.run()
    assert caplog.text.count("Loop.ref_model is converted, and the policy beside it computes the plain function") == 1


class Both(torch.nn.Module):
    """A policy and its value head, as PPO trains them."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy, self.value = policy, torch.nn.Linear(4, 1)


def test_a_policy_beside_a_value_head(folder: Path, tmp_path: Path) -> None:
    """The trainer's model holds the policy; whether that notices its trainer, or the callback does."""
    trainer = trainer_of("DPO", loaded(folder), folder, tmp_path)
    policy = loaded(folder)
    autorev.convert(policy, method="leapfrog")
    trainer.model = Both(policy)
    assert match_references(trainer) and chains_of(trainer.ref_model)


def test_a_server_that_generates(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """It has the weights, and not the coupling."""
    model = loaded(folder)
    autorev.convert(model)
    trainer = trainer_of("GRPO", model, folder, tmp_path)
    trainer.args.use_vllm = True
    ReversibleCallback().attach(trainer)
    assert "GRPOTrainer generates with vllm, which computes the plain function" in caplog.text


def test_reverted_models_notice_nobody(folder: Path) -> None:
    """`train` is the class's own again, with adapters around the model, too; and copies notice for themselves."""
    model = loaded(folder)
    autorev.convert(model)
    assert "train" in vars(model) and model.train() is model and model.eval() is model
    assert vars(copy.deepcopy(model))["train"].model is not model
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    autorev.revert(wrapped)
    assert "train" not in vars(model) and match_references(object()) is False


def test_checkpointing_is_explained_once(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """trl switches it off for the reference and on again in every step."""
    model = loaded(folder)
    autorev.convert(model)
    trainer_of("DPO", model, folder, tmp_path, max_steps=3, gradient_checkpointing=True).train()
    assert caplog.text.count("gradient checkpointing stays off") == 1
