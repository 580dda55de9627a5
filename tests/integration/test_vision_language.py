"""Vision-language models are called with a picture: the tower is found, converted and predicted, or a note says not."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import autorev
from autorev.integrations.example_call import example_call_for
from autorev.integrations.model_class import model_class
from autorev.models.from_config import config_workload
from autorev.pipeline import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
PATCHES: dict[str, Any] = {
    "depth": 2,
    "num_heads": 4,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
PINS = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
IDS = {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}


def text(kind: str, **more: Any) -> dict[str, Any]:
    """The config of a language model."""
    return {"model_type": kind, **TEXT, **more}


def rotary(kind: str) -> dict[str, Any]:
    """Likewise, with positions of time, height and width."""
    return text(kind, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]})


def vision(kind: str, **more: Any) -> dict[str, Any]:
    """The config of a vision tower."""
    return {"model_type": kind, **VISION, **more}


SIGLIP = vision("siglip_vision_model", vision_use_head=False)
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {"text_config": text("llama"), "vision_config": vision("clip_vision_model")},
    "vipllava": {
        "text_config": text("llama"),
        "vision_config": vision("clip_vision_model"),
        "vision_feature_layers": [-2, -1],
    },
    "paligemma": {"text_config": text("gemma"), "vision_config": SIGLIP, "projection_dim": 32, "hidden_size": 32},
    "gemma3": {"text_config": text("gemma3_text"), "vision_config": SIGLIP, "mm_tokens_per_image": 4},
    "internvl": {
        "text_config": text("qwen2"),
        "vision_config": vision("internvl_vision", image_size=[32, 32], patch_size=[8, 8]),
    },
    "got_ocr2": {
        "text_config": text("qwen2"),
        "vision_config": {**VISION, "output_channels": 16, "image_size": 64, "mlp_dim": 48, "window_size": 4}
        | {"global_attn_indexes": [1]},
    },
    "aya_vision": {"text_config": text("cohere2"), "vision_config": SIGLIP, "downsample_factor": 2},
    "cohere2_vision": {"text_config": text("cohere2"), "vision_config": SIGLIP, "alignment_intermediate_size": 64},
    "deepseek_vl": {"text_config": text("llama"), "vision_config": SIGLIP},
    "mistral3": {"text_config": text("mistral"), "vision_config": vision("pixtral", head_dim=8)},
    "llava_next": {"text_config": text("llama"), "vision_config": vision("clip_vision_model"), **PINS},
    "llava_onevision": {"text_config": text("qwen2"), "vision_config": SIGLIP, **PINS},
    "idefics2": {
        "text_config": text("mistral"),
        "vision_config": vision("idefics2_vision"),
        "perceiver_config": {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1}
        | {"resampler_n_heads": 4, "num_key_value_heads": 2, "resampler_head_dim": 8},
    },
    "idefics3": {"text_config": text("llama"), "vision_config": vision("idefics3_vision"), "scale_factor": 2},
    "smolvlm": {"text_config": text("llama"), "vision_config": vision("smolvlm_vision"), "scale_factor": 2},
    "qwen2_vl": {
        "text_config": rotary("qwen2_vl_text"),
        "vision_config": {**PATCHES, "embed_dim": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": rotary("qwen2_5_vl_text"),
        "vision_config": {**PATCHES, "fullatt_block_indexes": [1], "window_size": 16},
    },
    "qwen3_vl": {
        "text_config": rotary("qwen3_vl_text"),
        "vision_config": {**PATCHES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "glm4v": {"text_config": rotary("glm4v_text"), "vision_config": PATCHES},
}
LOOK_AT_VALUES = {"idefics2", "idefics3", "smolvlm"}
"""Of their pictures: a prediction has none."""
COUNTED_ALONE = {"qwen3_vl"}
"""Its language model adds what its tower saw to the stream between blocks."""


def config_of(family: str) -> Any:
    """A tiny config."""
    return AutoConfig.for_model(family, **(IDS | {"image_token_index": 100} | FAMILIES[family]))


def made(family: str) -> Any:
    """A tiny model."""
    config = config_of(family)
    torch.manual_seed(0)
    model = model_class(config)._from_config(config).train()
    for parameter in model.parameters():
        if not parameter.any():  # Gemma's projector: nothing would pass through it
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def gradients(model: Any, call: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the loss of a call."""
    model.zero_grad()
    model(**call).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_chains_are_found_and_reverse(family: str) -> None:
    """A call made from the model alone trains its vision tower, and the gradients of both chains are right."""
    model = made(family)
    _, call = example_call_for(model, 2, 12)
    assert call["input_ids"].shape == call["labels"].shape and call["input_ids"].shape[1] > 12
    trained = gradients(model, call)
    tower = [name for name in trained if "vision" in name or "visual" in name]
    assert tower and any(trained[name].abs().max() > 0 for name in tower)
    chains = [chain.name for chain in autorev.analyze(model).chains]
    assert any("visi" in name or "visual" in name for name in chains)
    assert family in COUNTED_ALONE or any("language_model" in name or "text_model" in name for name in chains)
    autorev.convert(model)
    report = autorev.verify(model, call)
    assert report.passed, report


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - LOOK_AT_VALUES))
def test_it_is_predicted_with_its_picture(family: str) -> None:
    """From the config alone; the note says how large the picture is and what it takes."""
    workload = config_workload(json.loads(config_of(family).to_json_string()), family, "a test")
    analysis, _ = prepare(workload, batch=2, sequence=16, dtype="fp32")
    assert any("visi" in chain.name or "visual" in chain.name for chain in analysis.chains)
    assert any("each sample has a picture of" in note for note in analysis.notes)


@pytest.mark.parametrize("family", sorted(LOOK_AT_VALUES))
def test_a_tower_that_is_not_predicted_is_named(family: str) -> None:
    """Where there are no values to look at, the prediction is for text alone, and says so."""
    workload = config_workload(json.loads(config_of(family).to_json_string()), family, "a test")
    analysis, _ = prepare(workload, batch=2, sequence=16, dtype="fp32")
    assert any(re.match(r"model\.vis\S* .* was not run .*\(.*pixel_values", note) for note in analysis.notes)


def test_the_picture_counts_in_what_is_predicted() -> None:
    """The simulated step keeps more than that of the language model alone."""
    whole = config_workload(json.loads(config_of("llava").to_json_string()), "llava", "a test")
    alone = config_workload(text("llama"), "llama", "a test")
    peaks = []
    for workload in (whole, alone):
        _, forecaster = prepare(workload, batch=2, sequence=16, dtype="fp32")
        method = forecaster.methods()[0]
        peaks.append(forecaster.peak(forecaster.trace(method, 2, 16), method))
    assert peaks[0] > 1.3 * peaks[1]


def test_other_towers_are_named() -> None:
    """Sound whose tokens stand in a text cannot be made up: an analysis, a conversion and a prediction say so."""
    config = AutoConfig.for_model(
        "qwen2_audio",
        text_config=text("qwen2"),
        audio_config={"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
        | {"num_mel_bins": 16, "max_source_positions": 16},
        audio_token_index=100,
    )
    model = model_class(config)._from_config(config)
    said = re.compile(r"model\.audio_tower \(Qwen2AudioEncoder, .* was not run .*\(.*input_features")
    predicted, _ = prepare(config_workload(json.loads(config.to_json_string()), "x", "a test"), sequence=16)
    for found in (autorev.analyze(model), predicted, autorev.convert(model)):
        assert any(map(said.match, found.notes))
