"""The chunked loss: the model's own loss and gradients without its logits, or a refusal; and nothing else changes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autorev
from autorev.chunked_loss import ChunkedForward, chunk_loss, unchunk_loss
from autorev.errors import ConversionError
from autorev.integrations.example_call import example_call_for
from tests.helpers.one_step import gap, gradients_of, one_step
from tests.helpers.zoo import FAMILIES, GPT2, HEADS, build

SHIFTED = ("llama", "gpt2")
UNSHIFTED = ("t5", "bert")
each_family = pytest.mark.parametrize("family", [*SHIFTED, *UNSHIFTED])


pytestmark = pytest.mark.usefixtures("one_thread")


def call_of(model: Any) -> dict[str, Any]:
    """A call with labels, a third of them -100, in ragged places."""
    _, call = example_call_for(model, 3, 24)
    places = torch.rand(call["labels"].shape, generator=torch.Generator().manual_seed(2)) < 1 / 3
    return {**call, "labels": call["labels"].masked_fill(places, -100)}


def loss_and_gradients(model: nn.Module, call: dict[str, Any]) -> Any:
    """One step; dropout as the model has it."""
    return one_step(model, loss=lambda out: out.loss, **call)


def loss_of(model: nn.Module, call: dict[str, Any]) -> float:
    """The loss of one call."""
    with torch.no_grad():
        return float(model(**call).loss)


@each_family
def test_loss_and_gradients_are_the_models_own(family: str) -> None:
    """For every parameter, with ignored labels, shifted or not; the logits are None."""
    model = build(family)
    call = call_of(model)
    own, expected = loss_and_gradients(model, call)
    chunk_loss(model)
    loss, found = loss_and_gradients(model, call)
    assert model(**call).logits is None
    assert float(loss) == pytest.approx(float(own), rel=1e-5)
    assert gap(found, expected) < 1e-5
    assert model.__dict__["forward"].shifts is (family in SHIFTED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "roberta", "llama", "bert"])
def test_shifting_is_found_out_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    """In bf16 the losses of shifted and unshifted labels of a random model are nearer than its rounding."""
    model = build(family, dtype)
    chunk_loss(model)
    assert model.__dict__["forward"].shifts is (family in ("qwen2", "llama"))


@each_family
def test_the_items_of_a_large_batch_count_as_they_did(family: str) -> None:
    """`num_items_in_batch`, as `Trainer` gives it, divides the sum where the model's own loss does that."""
    model = build(family).eval()
    call = call_of(model)
    for items in (50, torch.tensor(50)):
        own, expected = loss_and_gradients(model, {**call, "num_items_in_batch": items})
        chunk_loss(model)
        loss, found = loss_and_gradients(model, {**call, "num_items_in_batch": items})
        unchunk_loss(model)
        assert float(loss) == pytest.approx(float(own), rel=1e-5)
        assert gap(found, expected) < 1e-5


def test_a_forward_that_takes_no_items_is_chunked() -> None:
    """Older models name all their arguments."""

    class Older(hf.LlamaForCausalLM):  # type: ignore[misc]  # transformers is untyped here
        def forward(self, input_ids: Any = None, labels: Any = None, use_cache: bool = False) -> Any:
            return super().forward(input_ids=input_ids, labels=labels, use_cache=use_cache)

    model = Older(hf.LlamaConfig(**HEADS))
    chunk_loss(model)
    assert model.__dict__["forward"].counts is False
    assert torch.isfinite(model(**call_of(model)).loss)


@each_family
def test_without_labels_nothing_changes(family: str) -> None:
    """The same logits, bit for bit, and no loss."""
    model = build(family).eval()
    call = call_of(model)
    if family == "t5":
        call["decoder_input_ids"] = call["input_ids"]
    call.pop("labels")
    before = model(**call).logits
    chunk_loss(model)
    after = model(**call)
    assert torch.equal(after.logits, before)
    assert after.loss is None


def test_generation_is_untouched() -> None:
    """`generate` calls the same forward without labels."""
    for family in ("llama", "t5"):
        model = build(family).eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        before = model.generate(ids, max_new_tokens=6, do_sample=False)
        chunk_loss(model)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)


def test_other_outputs_are_still_there() -> None:
    """Hidden states and the encoder's output are returned as before; only the logits are not."""
    model = build("t5").eval()
    call = {**call_of(model), "output_hidden_states": True}
    own = model(**call)
    chunk_loss(model)
    out = model(**call)
    assert type(out) is type(own)
    assert set(own) - set(out) == {"logits"}
    assert torch.equal(out.encoder_last_hidden_state, own.encoder_last_hidden_state)
    assert len(out.decoder_hidden_states) == len(own.decoder_hidden_states)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoder_reads_what_its_labels_say(family: str) -> None:
    """Decoder inputs that the model derives from the labels are derived all the same, and given ones are kept."""
    model = build(family).eval()
    call = call_of(model)
    for change in ({"decoder_input_ids": None}, {}, {"decoder_input_ids": call["input_ids"].flip(1)}):
        asked = {**call, **change}
        own = loss_of(model, asked)
        chunk_loss(model)
        assert loss_of(model, asked) == pytest.approx(own, rel=1e-5)
        unchunk_loss(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "mixtral"])
def test_a_loss_of_more_than_cross_entropy_is_refused(family: str, dtype: torch.dtype) -> None:
    """Soft caps, scaled logits, a router's loss: refused, however small they are, and the model is as it was."""
    model = build(family, dtype)
    model(**call_of(model))  # transformers sets attributes in a first call
    before = whole(model)
    with pytest.raises(ConversionError, match=r"does something .*or adds something .*train it with the full loss"):
        chunk_loss(model)
    assert whole(model) == before
    assert model(**call_of(model)).logits is not None


def test_a_soft_cap_that_only_large_logits_feel_is_refused() -> None:
    """A trained model's logits are larger than an example's of a random one."""
    model_cls, config_cls, sizes = FAMILIES["gemma2"]
    with pytest.raises(ConversionError, match="does something between"):
        chunk_loss(model_cls(config_cls(**sizes, final_logit_softcapping=1000.0)))


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_a_model_without_a_vocabulary_is_refused(family: str) -> None:
    """There is nothing to chunk."""
    with pytest.raises(ConversionError, match="has no plain linear vocabulary head"):
        chunk_loss(build(family))


def test_an_adapter_on_the_head_is_refused() -> None:
    """What it adds to the logits would be lost."""
    with pytest.raises(ConversionError, match="has no plain linear vocabulary head"):
        chunk_loss(adapted("lm_head"))


def whole(model: nn.Module) -> Any:
    """What may not change: names, modes, instance attributes, random numbers."""
    return (
        list(model.state_dict()),
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        torch.get_rng_state().tolist(),
    )


@each_family
def test_only_one_forward_is_replaced_and_comes_back(family: str) -> None:
    """Class, names of the weights, modes and random numbers stay; `unchunk_loss` leaves nothing."""
    model = build(family)
    before = whole(model)
    signature = inspect.signature(model.forward)
    chunk_loss(model)
    assert inspect.signature(model.forward) == signature  # Trainer asks it which columns to keep
    during = whole(model)
    assert during[0] == before[0]
    assert during[1] == before[1]
    assert during[3] == before[3]
    unchunk_loss(model)
    assert whole(model) == before
    unchunk_loss(model)  # nothing to undo is no error
    assert whole(model) == before


def test_a_forward_that_stood_there_comes_back() -> None:
    """Others replace forwards on the instance, too; theirs still runs below ours."""
    model = build("llama")
    seen: list[Any] = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return type(model).forward(model, *args, **kwargs)

    model.forward = theirs
    chunk_loss(model)
    seen.clear()
    model(**call_of(model))
    assert len(seen) == 1
    unchunk_loss(model)
    assert model.forward is theirs


def test_chunking_twice_is_refused() -> None:
    """With what to call first; the first one stays."""
    model = build("gpt2")
    chunk_loss(model)
    first = model.forward
    with pytest.raises(ConversionError, match=r"chunked already; call autorev.unchunk_loss\(model\) first"):
        chunk_loss(model)
    assert model.forward is first


def test_tuples_are_refused() -> None:
    """`return_dict=False` is not answered with a tuple of another meaning."""
    model = build("llama")
    chunk_loss(model)
    with pytest.raises(ConversionError, match="needs return_dict=True"):
        model(**call_of(model), return_dict=False)


def test_a_copy_is_a_model_of_its_own() -> None:
    """The copy's forward is bound to the copy."""
    model = build("llama").eval()
    chunk_loss(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    forward = twin.__dict__["forward"]
    assert isinstance(forward, ChunkedForward)
    assert forward.model is twin
    assert forward.head is twin.lm_head
    assert loss_of(twin, call_of(twin)) != pytest.approx(loss_of(model, call_of(model)), rel=1e-4)


def adapted(*more: str) -> Any:
    """A Llama with LoRA on its attention, as PEFT wraps it, the adapters away from zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", *more]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_adapters_train_with_a_chunked_loss() -> None:
    """A PEFT model is chunked through its wrapper, with its own gradients, and put back through it."""
    model = adapted()
    call = call_of(model)
    names = list(model.state_dict())
    own, expected = loss_and_gradients(model, call)
    chunk_loss(model)
    loss, found = loss_and_gradients(model, call)
    assert float(loss) == pytest.approx(float(own), rel=1e-5)
    assert gap(found, expected) < 1e-5
    assert list(model.state_dict()) == names
    unchunk_loss(model)
    assert model(**call).logits is not None


@pytest.mark.parametrize("first", ["chunk", "convert"])
def test_a_converted_model_can_be_chunked(first: str) -> None:
    """In either order: the gradients are the oracle's, and both can be undone in either order."""
    model = build("llama")
    call = call_of(model)
    plain = loss_and_gradients(model, call)
    for change in (chunk_loss, autorev.convert) if first == "chunk" else (autorev.convert, chunk_loss):
        change(model)
    expected = one_step(model, mode="oracle", loss=lambda out: out.loss, **call)
    loss, found = loss_and_gradients(model, call)
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-6)
    assert gap(found, expected[1]) < 1e-6
    for undo in (unchunk_loss, autorev.revert) if first == "chunk" else (autorev.revert, unchunk_loss):
        undo(model)
    assert gap(loss_and_gradients(model, call)[1], plain[1]) == 0


class LargestMade(TorchDispatchMode):
    """The largest storage that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_the_logits_are_never_there_at_once() -> None:
    """With a wide vocabulary and many tokens nothing as large as the logits is made, in forward or in backward."""
    vocabulary, batch, sequence = 4000, 4, 128
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2 | {"vocab_size": vocabulary, "n_layer": 1}))
    _, call = example_call_for(model, batch, sequence)
    logits = 4 * batch * sequence * vocabulary
    largest = {}
    for name in ("full", "chunked"):
        if name == "chunked":
            chunk_loss(model)
        with LargestMade() as made:
            model(**call).loss.backward()
        largest[name] = made.bytes
        model.zero_grad()
    assert largest["full"] >= logits
    assert largest["chunked"] <= logits / 4
    assert largest["chunked"] >= 4 * vocabulary * GPT2["n_embd"]  # the head's own gradient


def test_evaluation_without_gradients_is_chunked_too() -> None:
    """Under `no_grad` the loss is the same, and no gradient is computed on the side."""
    model = build("llama").eval()
    call = call_of(model)
    own = loss_of(model, call)
    chunk_loss(model)
    with torch.no_grad():
        out = model(**call)
    assert float(out.loss) == pytest.approx(own, rel=1e-5)
    assert not out.loss.requires_grad
    assert all(g is None for g in gradients_of(model).values())
