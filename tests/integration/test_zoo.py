"""Detection and cutting on every family of `transformers` that autorev promises to know, in float32 and bfloat16.

python -m pytest tests/integration/test_zoo.py
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")


import autorev
from tests.helpers import zoo

DTYPES = [torch.float32, torch.bfloat16]
ROTARY = "position_embeddings position_ids"

# family -> its chains: (name, class, kinds of the steps of each block, further inputs that some block reads)
CHAINS: dict[str, list[tuple[str, str, list[str], str]]] = {
    "llama": [("model.layers", "LlamaDecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "qwen2": [("model.layers", "Qwen2DecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "qwen3": [("model.layers", "Qwen3DecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "mistral": [("model.layers", "MistralDecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "gemma": [("model.layers", "GemmaDecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "gemma2": [("model.layers", "Gemma2DecoderLayer", ["attention + mlp"] * 3, "attention_mask " + ROTARY)],
    "gemma3_text": [("model.layers", "Gemma3DecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "phi": [("model.layers", "PhiDecoderLayer", ["parallel"] * 3, ROTARY)],
    "phi3": [("model.layers", "Phi3DecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "gpt2": [("transformer.h", "GPT2Block", ["attention + mlp"] * 3, "position_ids")],
    "gpt_neo": [("transformer.h", "GPTNeoBlock", ["attention + mlp"] * 4, "attention_mask")],
    "gptj": [("transformer.h", "GPTJBlock", ["parallel"] * 3, "attention_mask position_ids")],
    "gpt_neox-parallel": [("gpt_neox.layers", "GPTNeoXLayer", ["parallel"] * 3, ROTARY)],
    "gpt_neox-sequential": [("gpt_neox.layers", "GPTNeoXLayer", ["attention + mlp"] * 3, ROTARY)],
    "opt-pre": [("model.decoder.layers", "OPTDecoderLayer", ["attention + mlp"] * 3, "position_ids")],
    "bloom": [("transformer.h", "BloomBlock", ["attention + mlp"] * 3, "alibi attention_mask")],
    "falcon-parallel": [
        ("transformer.h", "FalconDecoderLayer", ["parallel"] * 3, "attention_mask " + ROTARY),
    ],
    "falcon-sequential": [
        ("transformer.h", "FalconDecoderLayer", ["attention + mlp"] * 3, "alibi attention_mask " + ROTARY),
    ],
    "falcon-new": [("transformer.h", "FalconDecoderLayer", ["parallel"] * 3, "attention_mask " + ROTARY)],
    "granite": [("model.layers", "GraniteDecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "olmo2": [("model.layers", "Olmo2DecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "starcoder2": [("model.layers", "Starcoder2DecoderLayer", ["attention + mlp"] * 3, ROTARY)],
    "cohere": [("model.layers", "CohereDecoderLayer", ["parallel"] * 3, ROTARY)],
    "mixtral": [("model.layers", "MixtralDecoderLayer", ["attention + moe"] * 3, ROTARY)],
    "qwen3_moe": [("model.layers", "Qwen3MoeDecoderLayer", ["attention + moe"] * 3, ROTARY)],
    "deepseek_v3": [
        ("model.layers", "DeepseekV3DecoderLayer", ["attention + mlp", *["attention + moe"] * 2], ROTARY),
    ],
    "mamba": [("backbone.layers", "MambaBlock", ["state-space"] * 3, "")],
    "t5": [
        ("encoder.block", "T5Block", ["attention + mlp"] * 3, "position_bias"),
        (
            "decoder.block",
            "T5Block",
            ["attention + attention + mlp"] * 2,
            "encoder_decoder_position_bias encoder_hidden_states position_bias",
        ),
    ],
    "vit": [("vit.layers", "ViTLayer", ["attention + mlp"] * 3, "")],
    "dinov2": [("dinov2.encoder.layer", "Dinov2Layer", ["attention + mlp"] * 3, "")],
    "swin": [
        ("swin.encoder.layers.0.blocks", "SwinLayer", ["attention + mlp"] * 2, ""),
        ("swin.encoder.layers.1.blocks", "SwinLayer", ["attention + mlp"] * 2, ""),
    ],
    "convnext": [
        ("convnext.encoder.stages.0.layers", "ConvNextLayer", ["convolution"] * 2, ""),
        ("convnext.encoder.stages.1.layers", "ConvNextLayer", ["convolution"] * 3, ""),
    ],
    "clip": [
        ("vision_model.encoder.layers", "CLIPEncoderLayer", ["attention + mlp"] * 2, ""),
        ("text_model.encoder.layers", "CLIPEncoderLayer", ["attention + mlp"] * 3, ""),
    ],
}

# family -> its refused blocks: (path, class, code of the first reason)
REFUSED: dict[str, list[tuple[str, str, str]]] = {
    "opt-post": [(f"model.decoder.layers.{i}", "OPTDecoderLayer", "post-norm") for i in range(3)],
    "bert": [(f"bert.encoder.layer.{i}", "BertLayer", "post-norm") for i in range(3)],
    "roberta": [(f"roberta.encoder.layer.{i}", "RobertaLayer", "post-norm") for i in range(3)],
    "bart": [
        *((f"model.encoder.layers.{i}", "BartEncoderLayer", "post-norm") for i in range(3)),
        *((f"model.decoder.layers.{i}", "BartDecoderLayer", "post-norm") for i in range(2)),
    ],
    "resnet-basic": [
        (f"resnet.encoder.stages.{s}.layers.{i}", "ResNetBasicLayer", "post-activation")
        for s in range(2)
        for i in range(2)
    ],
    "resnet-bottleneck": [
        (f"resnet.encoder.stages.{s}.layers.{i}", "ResNetBottleNeckLayer", "post-activation")
        for s in range(2)
        for i in range(2)
    ],
}

# A recurrence in Python takes a second for 128 tokens; all others are analysed without arguments.
ARGUMENTS = {"mamba": {"input_ids": torch.arange(3, 19)[None]}}

# (family, dtype) -> codes of the caveats of its first block; no other block has one
CAVEATS = {
    ("opt-pre", torch.float32): ["layer-drop"],
    ("opt-pre", torch.bfloat16): ["layer-drop"],
    ("mamba", torch.bfloat16): ["stream-cast"],
}
CAVEATS_OF_ALL = {"layer-drop"}

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
every_family = pytest.mark.parametrize("name", zoo.FAMILIES)


def codes(block: Any) -> list[str]:
    """The codes of a block's reasons."""
    return [reason.partition(":")[0] for reason in block.reasons]


@both_dtypes
@every_family
def test_chains_and_refusals_are_those_of_the_family(name: str, dtype: torch.dtype) -> None:
    """Names, lengths, classes, steps, further inputs, verdicts and reasons are right, without example inputs."""
    analysis = autorev.analyze(zoo.build(name, dtype), ARGUMENTS.get(name))

    found = [
        (
            chain.name,
            chain.blocks[0].class_name,
            [" + ".join(step.kind for step in block.steps) for block in chain.blocks],
            " ".join(sorted({name for block in chain.blocks for name in block.extra_inputs})),
        )
        for chain in analysis.chains
    ]
    assert found == CHAINS.get(name, [])

    refused = [(block.path, block.class_name, codes(block)[0]) for block in analysis.refused]
    assert refused == REFUSED.get(name, [])
    assert all(block.verdict == "refused" for block in analysis.refused)

    caveats = CAVEATS.get((name, dtype), [])
    for chain in analysis.chains:
        for number, block in enumerate(chain.blocks):
            expected = [code for code in caveats if number == 0 or code in CAVEATS_OF_ALL]
            assert codes(block) == expected
            assert block.verdict == ("caveat" if expected else "eligible")
            widened = caveats == ["stream-cast"] and number > 0
            assert block.dtype == ("float32" if widened else str(dtype).removeprefix("torch."))


def test_every_family_has_an_expectation() -> None:
    """A family is in exactly one of the two tables above."""
    assert sorted([*CHAINS, *REFUSED]) == sorted(zoo.FAMILIES)


def test_a_projected_shortcut_is_told_beside_the_activation() -> None:
    """ResNet v1's first block of a stage has three obstacles, and all are named."""
    refused = {block.path: codes(block) for block in autorev.analyze(zoo.build("resnet-basic")).refused}
    assert refused["resnet.encoder.stages.1.layers.0"] == [
        "post-activation",
        "projected-shortcut",
        "shape-change",
    ]


def test_reasons_name_the_line() -> None:
    """BERT's post-norm is in `BertOutput.forward`, a child of the block."""
    (reason,) = autorev.analyze(zoo.build("bert")).refused[0].reasons
    where = reason.rpartition("(")[2].rstrip(")")
    assert where.startswith("transformers/models/bert/modeling_bert.py:")
    import inspect

    from transformers.models.bert.modeling_bert import BertOutput

    source, first = inspect.getsourcelines(BertOutput.forward)
    (line,) = (first + i for i, text in enumerate(source) if "LayerNorm" in text)
    assert where.endswith(f":{line}")


@pytest.mark.parametrize("name", ["gpt2", "opt-pre", "mixtral", "mamba", "swin", "resnet-basic", "t5"])
def test_the_users_model_stays_as_it_is(name: str) -> None:
    """Weights, buffers, attributes, training flags and random streams are the same after an analysis."""
    model = zoo.build(name)
    model.eval()
    next(model.children()).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    attributes = [(set(vars(module)), set(module._forward_hooks)) for module in model.modules()]
    modules = list(model.modules())
    requires = [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
    torch.manual_seed(1)
    random.seed(1)
    streams = torch.get_rng_state(), random.getstate()

    autorev.analyze(model, ARGUMENTS.get(name))

    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert [module.training for module in model.modules()] == flags
    assert [(set(vars(module)), set(module._forward_hooks)) for module in model.modules()] == attributes
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [(id(p), p.requires_grad, p.grad) for p in model.parameters()] == requires
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_a_model_in_eval_mode_is_looked_at_as_in_training() -> None:
    """Layer-drop and dropout show although the user's model is in eval mode."""
    (chain,) = autorev.analyze(zoo.build("opt-pre").eval()).chains
    assert codes(chain.blocks[0]) == ["layer-drop"]
    assert chain.blocks[0].draws_random
