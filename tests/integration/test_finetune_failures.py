"""What cannot be trained on, or not like that, and runs whose numbers break: one clear message, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import autorev
from autorev.errors import AutorevError, DataError, ModelNotFoundError, SettingError, TrainingError
from autorev.finetuning.record import FineTuning
from tests.helpers.tiny_llm import LENGTH, tiny_llm, tokenizer_of_bytes
from tests.helpers.tiny_run import At, figures, loss_of, tune, workplace

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collections")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    return workplace(tmp_path_factory.mktemp("failing"))


def check_refused(place: Path, error: type[AutorevError], said: str, **how: Any) -> None:
    """With that message, and without a trace in the file system."""
    with pytest.raises(error, match=said):
        tune(place, out="refused", **how)
    assert not (place / "refused").exists()


def lines(*rows: Any) -> str:
    """JSONL."""
    return "\n".join(json.dumps(row) for row in rows)


# -- data


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", "", "empty.txt is empty"),
        ("blank.txt", " \n\t\n ", "blank.txt is empty"),
        ("zeros.txt", "a\0b", "is binary, not text"),
        ("image.txt", b"\x89PNG\r\n\xff\xfe", "is not UTF-8 text"),
        ("utf16.txt", "hello".encode("utf-16"), "is not UTF-8 text"),
        ("letter.txt", "a", "too short to hold any of it out"),
        ("broken.jsonl", '{"text": "a"}\n{oops\n', "line 2 is not JSON"),
        ("list.jsonl", "[1]", "line 1 is a list"),
        ("keys.jsonl", lines({"text": "a"}, {"body": "b"}), "line 2 has the keys 'body'"),
        ("number.jsonl", lines({"text": 3}), "line 1 has the keys 'text'"),
        ("none.jsonl", lines({"text": None}), "line 1 has the keys 'text'"),
        ("deep.jsonl", "[" * 100_000 + "]" * 100_000, "line 1 is nested too deep"),
        ("questions.jsonl", lines({"messages": [{"role": "user", "content": "?"}]}), "nothing to learn"),
        ("no-role.jsonl", lines({"messages": [{"content": "?"}]}), "objects with 'role' and 'content'"),
        ("strings.jsonl", lines({"messages": ["?"]}), "objects with 'role' and 'content'"),
        ("one.jsonl", lines({"prompt": "a", "completion": "b"}), "there is one example"),
        ("long.jsonl", lines(*[{"prompt": "x" * 99, "completion": "y"}] * 20), "nothing left to learn.*`sequence`"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and len(value) < 20 else "",
)
def test_data_that_teaches_nothing(place: Path, name: str, content: str | bytes, said: str) -> None:
    """The message names the file, the line, and what is wrong with it."""
    (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    check_refused(place, DataError, said, text=name)


def test_data_that_is_not_there(place: Path) -> None:
    """A missing file, a folder, and likewise of the validation."""
    check_refused(place, DataError, r"nowhere\.txt cannot be read: No such file", text="nowhere.txt")
    check_refused(place, DataError, r"llm cannot be read: Is a directory", text="llm")
    check_refused(place, DataError, r"nowhere\.txt cannot be read", validation=place / "nowhere.txt")


def test_conversations_need_a_template(place: Path) -> None:
    """A tokenizer without one cannot write them; says what to give instead."""
    tiny_llm(place / "no-chat", chat=False)
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (place / "chats.jsonl").write_text(lines(*[{"messages": said}] * 12))
    check_refused(
        place, DataError, "no chat template.*give 'prompt' and 'completion'", text="chats.jsonl", model="no-chat"
    )
    assert tune(place, out="chats", text="chats.jsonl", steps=1).complete  # with a template


# -- models


def test_a_sequence_beyond_the_model(place: Path) -> None:
    """Refused by its number of positions."""
    check_refused(place, SettingError, f"llm reads {LENGTH} tokens at most.*is {LENGTH + 1}", sequence=LENGTH + 1)


MAKE: dict[str, Callable[[], Any]] = {
    "BertModel": lambda: BertModel(BertConfig(vocab_size=259, **SMALL)),
    "BertForMaskedLM": lambda: BertForMaskedLM(BertConfig(vocab_size=259, **SMALL)),
    "T5ForConditionalGeneration": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=259)
    ),
    "ViTForImageClassification": lambda: ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **SMALL)),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_model_that_predicts_no_next_token(place: Path, name: str) -> None:
    """Encoders (with and without a head for tokens), encoder-decoders, images: no causal language models."""
    MAKE[name]().save_pretrained(place / name)
    tokenizer_of_bytes().save_pretrained(place / name)
    check_refused(place, SettingError, rf"no causal language model \({name}\)", model=name)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_a_tokenizer(place: Path, family: str) -> None:
    """Also of a family for which transformers would make an empty one."""
    tiny_llm(place / f"mute-{family}", family)
    for path in (place / f"mute-{family}").glob("token*"):
        path.unlink()
    check_refused(place, SettingError, "no tokenizer beside its config", model=f"mute-{family}")


def test_a_tokenizer_of_another_model(place: Path) -> None:
    """One that writes tokens which the model does not have."""
    config = LlamaConfig(vocab_size=64, max_position_embeddings=LENGTH, num_key_value_heads=2, **SMALL)
    config.bos_token_id = config.eos_token_id = None
    LlamaForCausalLM(config).save_pretrained(place / "few")
    tokenizer_of_bytes().save_pretrained(place / "few")
    check_refused(place, SettingError, "writes token 256.* embeddings of 64 tokens", model="few")


def test_a_model_that_is_broken_or_not_there(place: Path) -> None:
    """Weights that were cut short, and a folder that does not exist."""
    shutil.copytree(place / "llm", place / "cut")
    (place / "cut" / "model.safetensors").write_bytes(b"cut")
    check_refused(place, AutorevError, "transformers cannot load .*cut", model="cut")
    check_refused(place, ModelNotFoundError, "neither a file nor a profile", model="nowhere")


def test_weights_that_are_no_numbers(place: Path) -> None:
    """Found before anything is trained, and not taken for another kind of model."""
    model = LlamaForCausalLM.from_pretrained(place / "llm")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(place / "nan")
    tokenizer_of_bytes().save_pretrained(place / "nan")
    with pytest.raises(AutorevError, match=r"no number|not finite"):
        tune(place, out="nan-run", model="nan")


# -- options


@pytest.mark.parametrize(
    ("how", "said"),
    [
        *(
            ({name: value}, f"{name} is a whole number, {least} or more, not {value}")
            for name, value, least in (
                ("steps", 0, 1), ("batch", 0, 1), ("accumulate", 0, 1), ("lora_rank", 0, 1), ("sequence", 0, 2),
                ("sequence", 1, 2), ("evaluate_every", 0, 1), ("save_every", -1, 1), ("validation_rows", 0, 1),
                ("warmup", -1, 0), ("seed", -1, 0), ("steps", 2.5, 1),
            )
        ),
        ({"seed": 2**32}, r"seed is below 2\^32"),
        *(({"learning_rate": rate}, "learning rate is a number above 0") for rate in (0, -1.0, float("nan"))),
        *(({"clip": clip}, "largest norm of the gradients") for clip in (-1.0, float("nan"))),
        ({"decay": "exponential"}, "decay of the learning rate is linear, .*, not 'exponential'"),
        ({"decay": "warmup_stable_decay"}, "decay of the learning rate is linear"),
        *(({"distill": True, "distill_weight": w}, "above 0 and at most 1") for w in (2.0, 0.0, float("nan"))),
        ({"distill": True, "method": "plain:loss=chunked"}, "leave loss=chunked out"),
        ({"schedule": "elsewhere"}, "leads to leapfrog or midpoint, not to 'elsewhere'"),
        *(({"schedule": "leapfrog", "method": c}, "has no gamma that can be moved") for c in ("plain", "leapfrog")),
        ({"schedule": "leapfrog", "method": "momentum:k=3,arithmetic=float"}, "no gamma that can be moved"),
        ({"schedule": "leapfrog", "method": "momentum:gamma=1.5"}, "starts at a gamma between 0 and 1, not at 3/2"),
        ({"schedule": "leapfrog", "max_loss_increase": 1.0}, "give one of the two"),
        ({"schedule_steps": 3}, "`schedule_steps` are those of a `schedule`"),
        *(({"max_loss_increase": b}, "rise by 0 or more") for b in (-1.0, float("nan"))),
        *(({"max_loss_increase": 1.0, "method": c}, "no gamma that can be moved") for c in ("bdia", "checkpoint")),
        ({"method": "perpetuum"}, "there is no method 'perpetuum'"),
        ({"method": "momentum:gamma=0.3"}, "cannot be trained as momentum gamma=0.3.*near it are"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense(place: Path, how: dict[str, Any], said: str) -> None:
    """Refused before anything is loaded for long, naming the option."""
    check_refused(place, SettingError, said, **how)


@pytest.mark.parametrize("how", [{"lora_rank": 2}, {"distill": True}, {"max_loss_increase": 1.0}], ids=str)
def test_random_weights_have_nothing_to_preserve(place: Path, how: dict[str, Any]) -> None:
    """From scratch, there is no original to adapt, distil or compare with."""
    tiny_llm(place / "scratch", weights=False)
    check_refused(place, SettingError, "has no weights, so there is nothing to adapt", model="scratch", **how)


# -- numbers that break


def scale(factor: float, part: str = "") -> Callable[[Any], None]:
    """Multiply weights."""

    def act(model: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if part in name:
                    parameter.mul_(factor)

    return act


NAN = scale(float("nan"))


def check_stopped(place: Path, out: str, said: str, checkpoint: int | None, **how: Any) -> None:
    """With that message, which names the last good checkpoint; that one is whole, and the run goes on from it."""
    good = (
        rf"The last good checkpoint is .*checkpoint-{checkpoint}\."
        if checkpoint
        else r"No checkpoint was written yet\."
    )
    with pytest.raises(TrainingError, match=f"{said}.*{good} Lower the learning rate, or clip gradients$"):
        tune(place, out=out, **how)
    left = [path.name for path in (place / out).glob("checkpoint-*")]
    assert max(left, default=None) == (f"checkpoint-{checkpoint}" if checkpoint else None)
    if checkpoint:
        model = autorev.load(place / out / f"checkpoint-{checkpoint}") if "method" not in how else None
        assert model is None or loss_of(model, place / out) < 6
    assert not FineTuning.read(place / out / "run.json").complete


def test_a_loss_that_is_no_number(place: Path) -> None:
    """In a step: nothing of it reaches the weights. The run goes on from the checkpoint as if nothing had been."""
    how = {"method": "plain"}
    check_stopped(place, "nan-step", "^the loss of step 4 is nan", 2, callbacks=(At(3, NAN, "on_step_begin"),), **how)
    assert figures(tune(place, out="nan-step", resume=True, **how)) == figures(tune(place, out="never-nan", **how))


@pytest.mark.parametrize("coupling", ["plain", "momentum:k=3,arithmetic=float,keep_last=1"])
def test_a_learning_rate_beyond_all(place: Path, coupling: str) -> None:
    """The weights break while the loss is a number still."""
    out = f"rate {coupling}"
    said = "^step 2 broke the weights: the loss on the held-out text is no number"
    check_stopped(place, out, said, None, learning_rate=1e30, clip=0.0, method=coupling)


@pytest.mark.parametrize("step", [4, 7])
def test_broken_weights_are_not_saved(place: Path, step: int) -> None:
    """A checkpoint that nobody can go on from would push out a good one; nor is the model at the end broken."""
    said = f"^step {step} broke the weights: the input of model.layers holds values that are not numbers"
    check_stopped(place, f"broken {step}", said, step - 2 + step % 2, callbacks=(At(step, NAN),), evaluate_every=99)


def test_activations_beyond_all_bounds(place: Path) -> None:
    """The message names the block."""
    act = At(3, scale(1e4, "layers.2."), "on_step_begin")
    said = r"^step 4: model\.layers\.2: the stream grew to [0-9.e+]+ in one step"
    check_stopped(place, "beyond", said, 2, callbacks=(act,))
    assert tune(place, out="beyond", resume=True).complete


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")],
    ids=repr,
)
def test_no_memory(place: Path, error: Exception) -> None:
    """Says what needs less, and which checkpoint there is."""

    def act(model: Any) -> None:
        raise error

    said = r"^step 3 found no memory\. The last good checkpoint is .*checkpoint-2\. .*`batch`"
    with pytest.raises(TrainingError, match=said):
        tune(place, out=f"memory {type(error).__name__}", callbacks=(At(2, act, "on_step_begin"),))


def test_errors_of_user_code_are_the_user_s(place: Path) -> None:
    """A callback that fails is not blamed on anything else."""

    def act(model: Any) -> None:
        raise RuntimeError("of my own")

    with pytest.raises(RuntimeError, match=r"^of my own$"):
        tune(place, out="callback", callbacks=(At(1, act),))
