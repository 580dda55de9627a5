"""Models of pictures, films, sounds and series: the derived call has every input that their processors would give.

python -m pytest tests/integration/test_towers.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig

import autorev
from autorev.cli.group import main
from autorev.integrations.model_class import model_class
from autorev.models.from_config import config_workload
from autorev.pipeline import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 64}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
OPT = {**SIZES, "model_type": "opt", "ffn_dim": 64, "vocab_size": 99, "word_embed_proj_dim": 32}
QUERIES = {
    "vision_config": IMAGE,
    "qformer_config": {**TEXT, "encoder_hidden_size": 32},
    "text_config": {**OPT, "max_position_embeddings": 128},
    "num_query_tokens": 4,
    "image_token_index": 98,
}
CODEC = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 16, "codebook_dim": 16}
SOUND = {"conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [4, 4]}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS |= {"encoder_layers": 2, "decoder_layers": 2}

# name -> (config, the call's inputs and their shapes, in a batch of two with eight tokens)
MODELS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "videomae": (
        {**IMAGE, "num_frames": 4, "decoder_num_hidden_layers": 1},
        {"pixel_values": (2, 4, 3, 32, 32)},
    ),
    "vivit": (
        {**SIZES, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        {"pixel_values": (2, 4, 3, 32, 32)},
    ),
    "encodec": ({**CODEC, "upsampling_ratios": [4, 2]}, {"input_values": (2, 1, 16000)}),
    "dac": (
        {"encoder_hidden_size": 8, "decoder_hidden_size": 32, "downsampling_ratios": [2, 4], "n_codebooks": 2}
        | {"upsampling_ratios": [4, 2], "codebook_size": 16, "codebook_dim": 4, "hidden_size": 32},
        {"input_values": (2, 1, 16000)},
    ),
    "mimi": (
        {**SIZES, **CODEC, "hidden_size": 32, "num_filters": 8, "num_key_value_heads": 4, "head_dim": 8}
        | {"upsample_groups": 32, "vector_quantization_hidden_dimension": 16, "num_quantizers": 3}
        | {"num_semantic_quantizers": 1, "upsampling_ratios": [4, 2]},
        {"input_values": (2, 1, 16000)},
    ),
    "siglip2": (
        {"text_config": TEXT, "vision_config": {**SIZES, "patch_size": 8, "num_patches": 16}},
        {"input_ids": (2, 8), "pixel_values": (2, 16, 192), "spatial_shapes": (2, 2), "pixel_attention_mask": (2, 16)},
    ),
    "clip": (
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
        {"input_ids": (2, 8), "pixel_values": (2, 3, 32, 32)},
    ),
    "xclip": (
        {"text_config": TEXT, "projection_dim": 32, "prompt_num_attention_heads": 4}
        | {"vision_config": {**IMAGE, "num_frames": 2, "mit_hidden_size": 32, "mit_intermediate_size": 64}},
        {"input_ids": (2, 8), "pixel_values": (2, 2, 3, 32, 32)},
    ),
    "blip-2": (QUERIES, {"input_ids": (2, 12), "pixel_values": (2, 3, 32, 32), "labels": (2, 12)}),
    "instructblip": (
        QUERIES,
        {"input_ids": (2, 12), "qformer_input_ids": (2, 8), "pixel_values": (2, 3, 32, 32), "labels": (2, 12)},
    ),
    "layoutlmv3": (
        {**TEXT, "input_size": 32, "patch_size": 8, "coordinate_size": 4, "shape_size": 8},
        {"input_ids": (2, 8), "pixel_values": (2, 3, 32, 32), "bbox": (2, 8, 4)},
    ),
    "speecht5": (
        {**SOUND, **HEADS, "hidden_size": 32, "vocab_size": 99, "num_conv_pos_embedding_groups": 2, "num_mel_bins": 8},
        {"input_values": (2, 16000), "decoder_input_ids": (2, 8), "labels": (2, 8)},
    ),
    "musicgen": (
        {
            "text_encoder": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
            | {"vocab_size": 99},
            "audio_encoder": {"model_type": "encodec", **CODEC, "upsampling_ratios": [4, 2]},
            "decoder": {**SIZES, "model_type": "musicgen_decoder", "vocab_size": 16, "num_codebooks": 2, "ffn_dim": 64},
        },
        {"input_ids": (2, 8), "decoder_input_ids": (4, 8), "labels": (2, 8, 2)},
    ),
    "decision_transformer": (
        {"hidden_size": 32, "n_layer": 2, "n_head": 2, "state_dim": 5, "act_dim": 3, "max_ep_len": 64},
        {"states": (2, 16, 5), "actions": (2, 16, 3), "returns_to_go": (2, 16, 1), "timesteps": (2, 16)},
    ),
    "time_series_transformer": (
        {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2, "d_model": 16},
        {"past_values": (2, 10), "past_time_features": (2, 10, 2), "future_values": (2, 4)},
    ),
}
NOT_RUN = {"musicgen": ["audio_encoder"]}
"""It is given the codes that its codec would make."""


@pytest.mark.parametrize("name", MODELS)
def test_a_config_alone_says_what_the_model_is_called_with(name: str) -> None:
    """The model takes it, every tower runs, and its blocks are found."""
    config, expected = MODELS[name]
    workload = config_workload({"model_type": name, **config}, name, "a test")
    sequence = 8 if workload.default_sequence else None
    analysis, _ = prepare(workload, batch=2, sequence=sequence, dtype="fp32")
    assert analysis.chains or analysis.refused
    _, call = workload.example(2, sequence)
    assert {n: tuple(call[n].shape) for n in expected} == expected
    towers = [note.partition(" ")[0] for note in analysis.notes if "was not run" in note]
    assert towers == NOT_RUN.get(name, [])


ALONE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "tvp": (
        {**TEXT, "num_frames": 2, "max_img_size": 64, "visual_prompt_size": 8}
        | {
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
            }
        },
        ("input_ids", "pixel_values"),
    ),
    "vilt": ({**TEXT, **IMAGE}, ("input_ids", "pixel_values", "pixel_mask")),
    "wav2vec2": (
        {**SIZES, **SOUND, "vocab_size": 32, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True},
        ("input_values", "labels"),
    ),
    "kosmos-2": (
        {"text_config": {**TEXT, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4}}
        | {"vision_config": IMAGE, "latent_query_num": 4},
        ("input_ids", "pixel_values", "image_embeds_position_mask", "labels"),
    ),
    "glmasr_encoder": ({**SIZES, "num_mel_bins": 8}, ("input_features",)),
    "depth_anything": (
        {
            "backbone_config": {
                **IMAGE,
                "model_type": "dinov2",
                "reshape_hidden_states": False,
                "out_features": ["stage1", "stage2"],
            }
        }
        | {"patch_size": 8, "reassemble_hidden_size": 32, "reassemble_factors": [2, 1], "neck_hidden_sizes": [8, 8]}
        | {"fusion_hidden_size": 8},
        ("pixel_values",),
    ),
    "timesformer": ({**IMAGE, "num_frames": 2}, ("pixel_values",)),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_model_that_asks_for_numbers_is_predicted_too(name: str) -> None:
    """Models that look for a picture in a text, a mask or a transcript find it without values; no tower stands idle."""
    config, expected = ALONE[name]
    workload = config_workload({"model_type": name, **config}, name, "a test")
    sequence = 8 if workload.default_sequence else None
    analysis, _ = prepare(workload, batch=1, sequence=sequence, dtype="fp32")
    assert analysis.chains or analysis.refused
    assert set(expected) <= workload.example(1, sequence)[1].keys()
    assert not any("was not run" in note for note in analysis.notes)


@pytest.mark.parametrize("name", ["videomae", "siglip2", "blip-2"])
def test_a_live_model_needs_no_batch(name: str) -> None:
    """Every chain is converted, and has the right gradients in the call that is made for it."""
    config = AutoConfig.for_model(name, **MODELS[name][0])
    torch.manual_seed(0)
    model = model_class(config)._from_config(config)
    conversion = autorev.convert(model)
    assert conversion.chains and not any("was not run" in note for note in conversion.notes)
    assert autorev.verify(model).passed
    assert autorev.revert(model)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "efficientloftr"}, "the forward of EfficientLoFTRModel failed at .* the model takes (pixel_va"),
        ({"model_type": "pix2struct"}, "reads flattened_patches, which autorev cannot make up; write a function"),
    ],
    ids=["efficientloftr", "pix2struct"],
)
def test_inputs_that_cannot_be_derived_are_named(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    """In one sentence, with what to give; and no traceback."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    result = CliRunner().invoke(main, ["analyze", str(file), "--html", str(tmp_path / "report.html")])
    assert result.exit_code == 1
    words = " ".join(result.output.split())
    assert all(part in words for part in said.split(" .* ")), words
    assert "Traceback" not in words
