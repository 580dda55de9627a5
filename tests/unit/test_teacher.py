"""The original model while another is made of it: its logits, the distance from it, evaluations on held-out rows."""

from __future__ import annotations

from statistics import stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

import autorev
from autorev.engine.mode import REVERSIBLE, mode
from autorev.finetuning.data import IGNORED, Example
from autorev.finetuning.evaluate import evaluate, logits_of
from autorev.finetuning.packing import Collator, Rows
from autorev.finetuning.teacher import Teacher, divergence, shifted
from tests.helpers.one_step import gradients_of
from tests.helpers.tiny_llm import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(5))
INPUTS = {"input_ids": IDS}
COLLATOR = Collator(packed=True, length=48, pad=257)


def stirred(model: nn.Module, by: float = 0.1) -> Any:
    """With every trained weight moved, so that it computes something else."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=by)
    return model


def adapted(first: str) -> Any:
    """Converted and with trained LoRA adapters, in either order."""
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    model: Any = tiny_model(dropout=0.0)
    if first == "convert":
        autorev.convert(model, gamma=1 / 2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    if first == "adapt":
        autorev.convert(model, gamma=1 / 2)
    return stirred(model)


def logits(model: Any) -> torch.Tensor:
    """In the mode that it is in."""
    with torch.no_grad():
        found: torch.Tensor = model(**INPUTS, use_cache=False).logits
    return found


def rows() -> Rows:
    """Three rows, the first of two documents, with prompts that are not learned."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, prompt in ((20, 3), (25, 9), (40, 1), (10, 4)):
        ids = tuple(torch.randint(256, (length,), generator=generator).tolist())
        made.append(Example(ids, (IGNORED,) * prompt + ids[prompt:], False))
    return Rows((tuple(made[:2]), (made[2],), (made[3],)), 48, packed=True)


# -- the teacher


@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_below_adapters_is_the_original(first: str) -> None:
    """Bit for bit, although adapters are trained and the blocks converted; no second copy is held."""
    model = adapted(first).train()
    expected = logits(tiny_model().eval())
    before = [module.training for module in model.modules()]
    own = logits(model.eval())
    model.train()
    teacher = Teacher.within(model)
    assert torch.equal(teacher.logits(INPUTS), expected)
    assert teacher.model is model
    assert teacher.own_bytes == 0
    assert [module.training for module in model.modules()] == before
    assert mode() == REVERSIBLE
    assert torch.equal(logits(model.eval()), own)
    assert not torch.allclose(own, expected, atol=1e-3)


def test_adapters_train_on_after_the_teacher_was_asked() -> None:
    """It switches them off and on again: their gradients are what they are without it."""
    found = []
    for asked in (True, False):
        model = adapted("convert").eval()
        if asked:
            Teacher.within(model).logits(INPUTS)
        model(**INPUTS, labels=IDS).loss.backward()
        found.append({name: grad for name, grad in gradients_of(model).items() if grad is not None})
    assert set(found[0]) == set(found[1])
    assert all("lora_" in name for name in found[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_a_copy_stays_while_the_student_moves() -> None:
    """Full fine-tuning: frozen, in eval mode, of the size of the model, and the student is not touched by it."""
    model = tiny_model("gpt2", dropout=0.1).train()
    expected = logits(tiny_model("gpt2").eval())
    teacher = Teacher.copied(model)
    autorev.convert(model, gamma=1 / 2)
    stirred(model)
    assert torch.equal(teacher.logits(INPUTS), expected)
    assert not torch.allclose(logits(model.eval()), expected, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not set(map(id, teacher.model.parameters())) & set(map(id, model.parameters()))
    assert not hasattr(teacher.model.config, "autorev")


def test_a_copys_bytes_count_tied_weights_once() -> None:
    """GPT-2's head is its embedding."""
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert Teacher.copied(model).own_bytes == expected


def test_modes_come_back_module_by_module() -> None:
    """A frozen part that was in eval mode stays in it; an error in the model changes nothing of that."""
    model = tiny_model("gpt2", dropout=0.1).train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    Teacher.within(model).logits(INPUTS)
    assert [module.training for module in model.modules()] == before
    for ask in (Teacher.within(model).logits, logits_of(model)):
        with pytest.raises(IndexError):
            ask({"input_ids": torch.tensor([[999]])})
        assert [module.training for module in model.modules()] == before
        assert mode() == REVERSIBLE


# -- the distance


def test_the_divergence_is_that_of_torch_distributions() -> None:
    """KL(original, model), in this direction, summed over positions; 0 from itself; in float32 whatever comes."""
    generator = torch.Generator().manual_seed(2)
    ours, theirs = torch.randn(2, 7, 11, generator=generator) * 3
    expected = kl_divergence(Categorical(logits=theirs), Categorical(logits=ours)).sum()
    assert float(divergence(theirs, ours)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(ours, ours)) == pytest.approx(0.0, abs=1e-5)
    rounded = divergence(theirs.bfloat16(), ours.bfloat16())
    assert rounded.dtype is torch.float32
    assert float(rounded) == pytest.approx(float(expected), rel=0.05)


def test_the_divergences_gradient_is_the_difference_of_the_probabilities() -> None:
    """Of the model's logits; the original's have none."""
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (t.requires_grad_() for t in torch.randn(2, 7, 11, generator=generator).unbind())
    divergence(theirs.detach(), ours).backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, ours.softmax(-1) - theirs.softmax(-1))


def test_shifted_by_hand() -> None:
    """Each position predicts the next label; what is not learned is left out, row by row."""
    numbers = torch.arange(2 * 4).view(2, 4, 1).float()
    labels = torch.tensor([[IGNORED, 5, IGNORED, 7], [IGNORED, IGNORED, 8, 9]])
    found, wanted = shifted(numbers, labels)
    assert found.flatten().tolist() == [0, 2, 5, 6]
    assert wanted.tolist() == [5, 7, 8, 9]


# -- evaluations


@pytest.mark.parametrize("converted", [False, True])
def test_the_loss_is_transformers_own(converted: bool) -> None:
    """On one row; over several, each learned token counts the same, and the error is of the rows' means."""
    model = tiny_model().train()
    if converted:
        autorev.convert(model)
    all_rows = rows()
    found = evaluate(logits_of(model), all_rows, COLLATOR, step=7)
    assert model.training
    model.eval()
    losses, counts = [], []
    for row in all_rows.rows:
        with torch.no_grad():
            losses.append(float(model(**COLLATOR([row]), use_cache=False).loss))
        counts.append(sum(example.learned for example in row))
        alone = evaluate(logits_of(model), Rows((row,), 48, packed=True), COLLATOR, step=0)
        assert alone.loss == pytest.approx(losses[-1], rel=1e-5)
        assert alone.standard_error is None
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert found.loss == pytest.approx(mean, rel=1e-5)
    assert found.loss != pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found.standard_error == pytest.approx(stdev(losses) / 3**0.5, rel=1e-3)
    assert (found.step, found.agreement, found.divergence) == (7, None, None)


def test_against_itself_it_agrees_everywhere() -> None:
    """Share 1, distance 0; both modes are as they were."""
    model = tiny_model().train()
    found = evaluate(logits_of(model), rows(), COLLATOR, 0, Teacher.within(model).logits)
    assert found.agreement == 1.0
    assert found.divergence == pytest.approx(0.0, abs=1e-6)
    assert all(module.training for module in model.modules())


def test_against_another_it_is_compared_token_by_token() -> None:
    """Agreement and KL over the learned positions alone, by hand."""
    teacher, model = Teacher.copied(tiny_model()), stirred(tiny_model(), by=0.01)
    found = evaluate(logits_of(model), rows(), COLLATOR, 0, teacher.logits)
    agreeing, distance, count = 0, 0.0, 0
    for row in rows().rows:
        batch = COLLATOR([row])
        labels = batch.pop("labels")[0]
        theirs, ours = (m(**batch, use_cache=False).logits[0].detach() for m in (teacher.model, model))
        for at in range(len(labels) - 1):
            if labels[at + 1] != IGNORED:
                agreeing += int(theirs[at].argmax() == ours[at].argmax())
                distance += float(kl_divergence(Categorical(logits=theirs[at]), Categorical(logits=ours[at])))
                count += 1
    assert found.agreement == pytest.approx(agreeing / count)
    assert found.divergence == pytest.approx(distance / count, rel=1e-4)
    assert found.agreement is not None
    assert 0 < found.agreement < 1
    assert found.divergence is not None
    assert found.divergence > 1e-3


class Elsewhere(nn.Module):
    """A model on another device than the CPU, as far as there is one everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, device="meta"))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        """Logits where both are."""
        return SimpleNamespace(logits=input_ids[..., None] * self.weight)


@pytest.mark.parametrize("logits", [Teacher.within(Elsewhere()).logits, logits_of(Elsewhere())])
def test_batches_are_taken_to_where_the_model_is(logits: Any) -> None:
    """Rows are collated on the CPU, and the model is on a GPU, teacher or not."""
    assert logits(INPUTS).device.type == "meta"
