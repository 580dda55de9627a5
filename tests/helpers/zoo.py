"""Tiny models of every family that autorev promises to know, with random weights: `build("llama")`.

Each entry is a config of `transformers` with three layers or so; `hand.py` beside this file holds hand-written models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers as hf

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = SIZES | {"head_dim": 8}
FEW_EXPERTS = HEADS | {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99, "n_positions": 128}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
OPT = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}
FALCON = SIZES | {"num_kv_heads": 2}
BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
BART |= {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
STAGES = {"hidden_sizes": [16, 32], "depths": [2, 3], "num_stages": 2, "image_size": 32}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "image_size": 32}

# name -> (class of the model, class of its config, sizes)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, HEADS),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, SIZES),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, HEADS),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, HEADS),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, HEADS),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, HEADS),
    "gemma3_text": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, HEADS),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig, SIZES),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, SIZES),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT2),
    "gpt_neo": (
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig,
        {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}
        | {"window_size": 8, "vocab_size": 99, "max_position_embeddings": 128}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig, GPT2 | {"rotary_dim": 4}),
    "gpt_neox-parallel": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, SIZES),
    "gpt_neox-sequential": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig,
        SIZES | {"use_parallel_residual": False},
    ),
    "opt-pre": (hf.OPTForCausalLM, hf.OPTConfig, OPT | {"layerdrop": 0.1}),
    "opt-post": (hf.OPTForCausalLM, hf.OPTConfig, OPT | {"do_layer_norm_before": False}),
    "bloom": (
        hf.BloomForCausalLM,
        hf.BloomConfig,
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99},
    ),
    "falcon-parallel": (hf.FalconForCausalLM, hf.FalconConfig, FALCON),
    "falcon-sequential": (
        hf.FalconForCausalLM,
        hf.FalconConfig,
        FALCON | {"parallel_attn": False, "alibi": True, "bias": True},
    ),
    "falcon-new": (hf.FalconForCausalLM, hf.FalconConfig, FALCON | {"new_decoder_architecture": True}),
    "granite": (hf.GraniteForCausalLM, hf.GraniteConfig, HEADS | {"residual_multiplier": 0.22}),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config, HEADS),
    "starcoder2": (hf.Starcoder2ForCausalLM, hf.Starcoder2Config, SIZES),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig, HEADS),
    "mixtral": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        FEW_EXPERTS | {"num_local_experts": 4, "output_router_logits": True},
    ),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, FEW_EXPERTS | {"num_experts": 4}),
    "deepseek_v3": (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config,
        FEW_EXPERTS
        | {
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
        }
        | {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        | {"num_key_value_heads": 4},
    ),
    "mamba": (
        hf.MambaForCausalLM,
        hf.MambaConfig,
        {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 99, "state_size": 4},
    ),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, SIZES),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, SIZES),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
        | {"vocab_size": 99, "decoder_start_token_id": 0},
    ),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, BART),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, IMAGE | {"image_size": 32, "patch_size": 8}),
    "dinov2": (
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config,
        IMAGE | {"image_size": 28, "patch_size": 14, "drop_path_rate": 0.1},
    ),
    "swin": (
        hf.SwinForImageClassification,
        hf.SwinConfig,
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
        | {"window_size": 4},
    ),
    "convnext": (hf.ConvNextForImageClassification, hf.ConvNextConfig, STAGES | {"drop_path_rate": 0.1}),
    "resnet-basic": (hf.ResNetForImageClassification, hf.ResNetConfig, RESNET | {"layer_type": "basic"}),
    "resnet-bottleneck": (
        hf.ResNetForImageClassification,
        hf.ResNetConfig,
        RESNET | {"layer_type": "bottleneck"},
    ),
    "clip": (
        hf.CLIPModel,
        hf.CLIPConfig,
        {
            "text_config": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
            "vision_config": IMAGE | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        },
    ),
}

TYPICAL = ("llama", "gpt2", "gptj", "opt-pre", "mixtral", "t5", "swin", "convnext", "bert", "resnet-basic")
"""One of each kind of block."""


def others_slow(names: Iterable[str]) -> list[Any]:
    """Values for `parametrize`: what is checked on a typical family is checked on the others by the slow tests."""
    return [pytest.param(name, marks=() if name in TYPICAL else pytest.mark.slow) for name in names]


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The family's tiny model in train mode, with the same random weights every time."""
    model_class, config_class, sizes = FAMILIES[name]
    config = config_class(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).to(dtype).train()


def recorder(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    """A function that records one call of the family's model on real tensors."""
    from autorev.capture.record import record
    from autorev.integrations.example_call import example_call_for

    model = build(name, dtype)
    args, kwargs = example_call_for(model, 2, 16)
    return lambda: record(model, args, kwargs)
