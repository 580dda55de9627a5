"""Example calls: every family of `transformers` builds at tiny size and answers the call made for it."""

import warnings
from typing import Any

import pytest
import torch

from autorev.errors import ModelBuildError
from autorev.integrations.example_call import (
    example_call,
    example_call_for,
    has_images,
    has_sequence,
    sequence_limit,
)
from autorev.integrations.model_class import model_class

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = TEXT | {"head_dim": 8}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
EXPERTS = HEADS | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 24}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2]}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "qwen2": TEXT,
    "qwen3": HEADS,
    "mistral": HEADS,
    "gemma": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "phi": TEXT,
    "phi3": TEXT,
    "gpt2": GPT2,
    "gpt_neo": TEXT | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": GPT2 | {"rotary_dim": 4},
    "gpt_neox": TEXT,
    "opt": TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": TEXT | {"alibi": True},
    "granite": HEADS,
    "olmo2": TEXT,
    "starcoder2": TEXT,
    "cohere": TEXT,
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "deepseek_v3": TEXT
    | {"num_key_value_heads": 4}
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "mamba": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "bert": TEXT,
    "roberta": TEXT | {"pad_token_id": 1, "bos_token_id": 0},
    "t5": {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "bart": {
        "vocab_size": 99,
        "d_model": 32,
        "max_position_embeddings": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
    "vit": VISION,
    "dinov2": VISION,
    "swin": {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
    | {"window_size": 4},
    "convnext": STAGES | {"num_stages": 2, "image_size": 32},
    "resnet": STAGES | {"embedding_size": 16},
    "clip": {
        "text_config": TEXT | {"max_position_embeddings": 24, "eos_token_id": 98},
        "vision_config": VISION,
        "projection_dim": 16,
    },
}
IMAGES = {"vit", "dinov2", "swin", "convnext", "resnet"}
UNLIMITED = IMAGES | {"bloom", "falcon", "mamba", "t5"}


def tiny_config(family: str, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoConfig.for_model(family, **(FAMILIES[family] | changes))


def run(config: Any, model_cls: Any, sequence: int | None = 16) -> Any:
    torch.manual_seed(0)
    model = model_cls._from_config(config).train()
    args, kwargs = example_call(config, model_cls, 2, sequence)
    return model(*args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_its_example_call_with_a_loss(family: str) -> None:
    """One real training forward and backward runs, and its loss is a finite number."""
    config = tiny_config(family)
    loss = run(config, model_class(config)).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_headless_class_is_called_without_labels(family: str) -> None:
    """A config that names its base model is believed: that class runs, and is given no labels."""
    headless = transformers.MODEL_MAPPING[type(tiny_config(family))]
    config = tiny_config(family, architectures=[headless.__name__])
    assert model_class(config) is headless
    _, kwargs = example_call(config, headless, 2, 16)
    assert "labels" not in kwargs
    assert run(config, headless) is not None


@pytest.mark.parametrize(
    "architecture",
    [
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForPreTraining",
        "BartForSequenceClassification",
        "LlamaForSequenceClassification",
        "CLIPForImageClassification",
    ],
)
def test_other_heads_get_the_labels_their_loss_reads(architecture: str) -> None:
    """A class with a task of its own returns a loss too."""
    family = next(name for name in FAMILIES if architecture.lower().startswith(name))
    labels = 2 if architecture.endswith("QuestionAnswering") else 3  # start and end of the answer
    config = tiny_config(family, architectures=[architecture], num_labels=labels)
    model_cls = model_class(config)
    assert model_cls.__name__ == architecture
    assert torch.isfinite(run(config, model_cls).loss)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_labels_follow_the_kind_of_classification(problem: str) -> None:
    """Regression and several labels at once are trained on floating targets."""
    count = 1 if problem == "regression" else 3
    config = tiny_config("bert", num_labels=count, problem_type=problem)
    assert torch.isfinite(run(config, transformers.BertForSequenceClassification).loss)


def test_speech_models_hear_a_second_of_sound() -> None:
    """Whisper reads a spectrum and writes tokens; wav2vec2 reads samples and is trained with CTC."""
    layers = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "d_model": 32,
        "encoder_ffn_dim": 48,
        "vocab_size": 99,
    }
    layers |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    whisper = transformers.WhisperConfig(
        **layers, **special, max_source_positions=50, max_target_positions=32, begin_suppress_tokens=None
    )
    wav2vec2 = transformers.Wav2Vec2Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    assert sequence_limit(whisper, model_class(whisper)) == 32
    assert torch.isfinite(run(whisper, model_class(whisper)).loss)
    assert not has_sequence(wav2vec2, model_class(wav2vec2))
    assert torch.isfinite(run(wav2vec2, model_class(wav2vec2), None).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_models_that_read_tokens_have_a_sequence(family: str) -> None:
    """Images have no length to choose; a limit is named only where positions end."""
    config = tiny_config(family)
    model_cls = model_class(config)
    assert has_sequence(config, model_cls) == (family not in IMAGES)
    assert has_images(model_cls) == (family in IMAGES | {"clip"})
    assert (sequence_limit(config, model_class(config)) is None) == (family in UNLIMITED)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "roberta", "bart", "clip"])
def test_the_limit_is_the_longest_sequence_that_runs(family: str) -> None:
    """With learned positions the limit itself runs, and one token more does not."""
    config = tiny_config(family)
    limit = sequence_limit(config, model_class(config))
    assert limit is not None
    run(config, model_class(config), limit)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        run(config, model_class(config), limit + 1)


def test_a_stray_key_is_no_limit() -> None:
    """T5's published config.json still says n_positions 512, which its relative positions do not know."""
    config = tiny_config("t5", n_positions=512)
    assert sequence_limit(config, model_class(config)) is None


def test_sequence_none_stands_for_as_many_tokens_as_the_model_takes() -> None:
    """A short model gets its limit, a long one 128 tokens."""
    for limit, length in ((24, 24), (4096, 128)):
        config = tiny_config("llama", max_position_embeddings=limit)
        _, kwargs = example_call(config, model_class(config), 1, None)
        assert kwargs["input_ids"].shape == (1, length)


def test_the_user_draws_the_same_random_numbers_afterwards() -> None:
    """Making an example leaves torch's generator where it stood."""
    config = tiny_config("clip")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    example_call(config, model_class(config), 2, 16)
    assert torch.equal(torch.rand(3), expected)


def test_ids_are_ordinary_tokens_that_end_with_the_end_of_text() -> None:
    """No padding stands in the text, and every id is below the vocabulary's size."""
    config = tiny_config("roberta")
    _, kwargs = example_call(config, model_class(config), 4, 32)
    ids = kwargs["input_ids"]
    assert ids[:, -1].tolist() == [config.eos_token_id] * 4
    assert not set(ids[:, :-1].flatten().tolist()) & {0, 1, 2}
    assert int(ids.max()) < config.vocab_size


def test_floating_inputs_have_the_default_dtype() -> None:
    """Whoever builds a model in bf16 sets the default dtype, and the images follow."""
    config = tiny_config("vit")
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, kwargs = example_call(config, model_class(config), 2, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert kwargs["pixel_values"].dtype == torch.bfloat16


def test_a_live_model_gets_inputs_of_its_own_dtype() -> None:
    """The call made for a bf16 ResNet runs as it is."""
    config = tiny_config("resnet")
    model = model_class(config)._from_config(config, dtype=torch.bfloat16)
    args, kwargs = example_call_for(model, 2, None)
    assert kwargs["pixel_values"].dtype == torch.bfloat16
    assert model(*args, **kwargs).logits.shape[0] == 2


def test_an_unknown_type_of_model_is_refused_with_the_way_out() -> None:
    """A config that no class builds names its type and the factory as the remedy."""
    config = transformers.PreTrainedConfig()
    config.model_type = "hyena"
    with pytest.raises(ModelBuildError, match=r"'hyena'.*package\.module:function"):
        model_class(config)


def test_inputs_that_cannot_be_made_up_are_named() -> None:
    """Pix2Struct reads patches with their places in one row, and the message says so."""
    with pytest.raises(ModelBuildError, match=r"flattened_patches.*package\.module:function"):
        example_call(transformers.Pix2StructConfig(), transformers.Pix2StructVisionModel, 2, None)
