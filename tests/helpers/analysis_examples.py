"""Analyses for the tests of the reports: plausible figures of real models, made without torch.

smollm2()     30 eligible blocks; everything fits the device
llama_lora()  32 eligible blocks at 32,768 tokens; most methods do not fit
bert()        12 refused blocks, no chain
clip()        two chains, one with a caveat
unpredicted() blocks only, as `autorev.analyze` returns them
hostile()     names and reasons that try to break out of a report
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autorev.analysis import (
    Analysis,
    Block,
    Category,
    Chain,
    DeviceInfo,
    ModelInfo,
    Prediction,
    Reach,
    Recommendation,
    Step,
    Sweep,
    Verdict,
)
from autorev.setting import Setting

GIB = 2**30
H100 = DeviceInfo(
    name="h100-80gb",
    title="NVIDIA H100 SXM 80 GB",
    memory_bytes=81_559 * 2**20,
    peak_flops=989e12,
    bandwidth=3.35e12,
    host_bandwidth=55e9,
)
POST_NORM = "post-norm: the residual sum passes through LayerNorm before it leaves the block (modeling_bert.py:310)"
LAYER_DROP = (
    "layer-drop: the block is left out at random in training; it is made reversible only where every block "
    "runs (modeling_clip.py:480)"
)
VERSIONS = {"autorev": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


@dataclass(frozen=True)
class Costs:
    """A small model of memory: fixed bytes by category, and bytes per token."""

    parameters: int
    trained: int
    layers: int
    stored: int
    """Per token and layer, what plain autograd keeps."""
    stream: int
    """Per token: one element of the stream in 16 bits, times its width."""
    logits: int
    """Per token."""
    flops: float
    """Per token, of a plain step."""

    def categories(self, method: str, tokens: int) -> dict[str, int]:
        """Bytes at the peak of a step of `tokens` tokens."""
        block = tokens * self.stored
        reversible = method not in ("plain", "checkpoint", "offload")
        stored = {"plain": self.layers * block, "checkpoint": self.layers * tokens * self.stream}
        bits = SIDE_BITS.get(method, 0)
        return {
            Category.PARAMETERS.value: 2 * self.parameters,
            Category.GRADIENTS.value: 2 * self.trained,
            Category.OPTIMIZER_STATE.value: 4 * self.trained,
            Category.STORED_ACTIVATIONS.value: stored.get(method, 0),
            Category.WORKING_SET.value: block // 4 if method == "plain" else block,
            Category.STREAMS.value: 6 * tokens * self.stream if reversible else 0,
            Category.SIDE_BITS.value: bits * self.layers * tokens * self.stream // 16,
            Category.LOGITS_AND_LOSS.value: tokens * self.logits,
            Category.OTHER.value: 2 * tokens * self.stream + self.trained // 4,
        }

    def peak(self, method: str, tokens: int) -> int:
        """Their sum."""
        return sum(self.categories(method, tokens).values())


SIDE_BITS = {"momentum": 3, "midpoint_a": 8, "bdia": 1}
METHODS = (
    *("plain", "checkpoint", "offload"),
    *("momentum", "leapfrog", "midpoint", "midpoint_a", "bdia", "hamiltonian", "revnet"),
)
SMOLLM2 = Costs(134_515_008, 134_515_008, 30, 28_800, 1_152, 590_000, 9.2e8)
LLAMA_8B = Costs(8_030_261_248, 41_943_040, 32, 250_000, 8_192, 1_026_000, 4.1e10)


def smollm2() -> Analysis:
    """SmolLM2 135M as it is fine-tuned by default: the logits weigh most."""
    setting = Setting(8, 2048, "bf16", "adamw", "full", None, "full", H100.name)
    return Analysis(
        model=ModelInfo("SmolLM2-135M-Instruct", "LlamaForCausalLM", 134_515_008, "profile smollm2-135m"),
        chains=(Chain("model.layers", tuple(llama_block(i, (8, 2048, 576)) for i in range(30))),),
        refused=(),
        setting=setting,
        device=H100,
        predictions=tuple(prediction(SMOLLM2, name, 8 * 2048) for name in METHODS),
        frontier=tuple(reach(SMOLLM2, name, 8, 2048) for name in METHODS),
        sweeps=sweeps(SMOLLM2, 8, 2048),
        recommendation=Recommendation(
            "checkpoint",
            "Checkpointing is enough: it halves the peak of plain autograd, and the best coupling that keeps "
            "the pretrained function saves only another 4 %. Most of what is left is logits and loss.",
            (
                "Use the chunked loss: it takes 9.0 GiB off every method.",
                "With the chunked loss, momentum reaches 1.6 times the batch of checkpointing.",
            ),
        ),
        notes=("LoRA rank has no effect when all weights are trained.",),
        versions=VERSIONS,
    )


def llama_lora() -> Analysis:
    """Llama 3.1 8B with LoRA at 32,768 tokens: plain autograd and checkpointing do not fit."""
    tokens = 2 * 32_768
    return Analysis(
        model=ModelInfo("llama-3.1-8b", "LlamaForCausalLM", 8_030_261_248, "profile llama-3.1-8b"),
        chains=(Chain("model.layers", tuple(llama_block(i, (2, 32_768, 4096)) for i in range(32))),),
        refused=(),
        setting=Setting(2, 32_768, "bf16", "adamw", "lora", 16, "full", H100.name),
        device=H100,
        predictions=tuple(prediction(LLAMA_8B, name, tokens) for name in METHODS),
        frontier=tuple(reach(LLAMA_8B, name, 2, 32_768) for name in METHODS),
        sweeps=sweeps(LLAMA_8B, 2, 32_768),
        recommendation=Recommendation(
            "momentum",
            "Nothing fits at this setting, and plain autograd is far out of reach. Of what keeps the "
            "pretrained function and needs no host traffic, momentum comes closest.",
            ("Use the chunked loss: it takes 63 GiB off every method, and then momentum fits.",),
        ),
        versions=VERSIONS,
    )


def bert() -> Analysis:
    """BERT: post-norm, so nothing can be made reversible."""
    costs = Costs(109_482_240, 109_482_240, 12, 34_000, 1_536, 244_000, 6.6e8)
    names = ("plain", "checkpoint")
    return Analysis(
        model=ModelInfo("bert-base-uncased", "BertForMaskedLM", 109_482_240, "config.json"),
        chains=(),
        refused=tuple(bert_block(i) for i in range(12)),
        setting=Setting(16, 512, "bf16", "adamw", "full", None, "full", H100.name),
        device=H100,
        predictions=tuple(prediction(costs, name, 16 * 512) for name in names),
        frontier=tuple(reach(costs, name, 16, 512) for name in names),
        sweeps=sweeps(costs, 16, 512, names),
        recommendation=Recommendation("plain", "Plain autograd fits with room to spare, and no block can be reversed."),
        versions=VERSIONS,
    )


def clip() -> Analysis:
    """CLIP: a text and a vision chain; no sequence axis to choose."""
    costs = Costs(151_277_313, 151_277_313, 24, 20_000, 1_536, 0, 9.1e8)
    text = tuple(clip_block("text_model", i, (64, 77, 512), ()) for i in range(12))
    vision = tuple(clip_block("vision_model", i, (64, 50, 768), (LAYER_DROP,)) for i in range(12))
    return Analysis(
        model=ModelInfo("clip-vit-base-patch32", "CLIPModel", 151_277_313, "factory shop:clip"),
        chains=(Chain("text_model.encoder.layers", text), Chain("vision_model.encoder.layers", vision)),
        refused=(),
        setting=Setting(64, None, "fp32", "sgd-momentum", "full", None, "full", H100.name),
        device=H100,
        predictions=tuple(prediction(costs, name, 64 * 127) for name in METHODS[:6]),
        frontier=tuple(replace(reach(costs, name, 64, 127), longest_sequence=None) for name in METHODS[:6]),
        sweeps=tuple(sweep for sweep in sweeps(costs, 64, 127, METHODS[:6]) if sweep.axis == "batch"),
        recommendation=Recommendation("plain", "Plain autograd fits: the peak is 6 % of the memory."),
        versions=VERSIONS,
    )


def unpredicted() -> Analysis:
    """Blocks without a setting."""
    return Analysis(model=smollm2().model, chains=smollm2().chains, refused=(), versions=VERSIONS)


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>[red]|`\x1b[31m"


def hostile() -> Analysis:
    """Every text that a user's code can choose holds markup of every kind that is rendered."""
    base = clip()
    block = replace(
        base.chains[1].blocks[0],
        path=HOSTILE,
        class_name=HOSTILE,
        reasons=(HOSTILE,),
        extra_inputs=(HOSTILE,),
    )
    return replace(
        base,
        model=ModelInfo(HOSTILE, HOSTILE, 1, HOSTILE),
        chains=(Chain(HOSTILE, (block,)),),
        device=replace(H100, title=HOSTILE),
        predictions=tuple(replace(p, note=HOSTILE) for p in base.predictions),
        recommendation=Recommendation("plain", HOSTILE, (HOSTILE,)),
        notes=(HOSTILE,),
        versions={"autorev": HOSTILE},
    )


def llama_block(index: int, shape: tuple[int, ...]) -> Block:
    """One eligible decoder layer."""
    return Block(
        path=f"model.layers.{index}",
        class_name="LlamaDecoderLayer",
        verdict=Verdict.ELIGIBLE,
        reasons=(),
        steps=(
            Step("attention", ("input_layernorm", "self_attn"), "modeling_llama.py:312"),
            Step("mlp", ("post_attention_layernorm", "mlp"), "modeling_llama.py:318"),
        ),
        stream="hidden_states",
        shape=shape,
        dtype="bf16",
        extra_inputs=("position_embeddings[0]", "position_embeddings[1]"),
        buffers_written=(),
        draws_random=False,
        parameters=3_540_096,
        source="modeling_llama.py:289",
    )


def bert_block(index: int) -> Block:
    """One refused encoder layer."""
    return Block(
        path=f"bert.encoder.layer.{index}",
        class_name="BertLayer",
        verdict=Verdict.REFUSED,
        reasons=(POST_NORM,),
        steps=(),
        stream="hidden_states",
        shape=(16, 512, 768),
        dtype="bf16",
        extra_inputs=("attention_mask",),
        buffers_written=(),
        draws_random=True,
        parameters=7_087_872,
        source="modeling_bert.py:402",
    )


def clip_block(tower: str, index: int, shape: tuple[int, ...], reasons: tuple[str, ...]) -> Block:
    """One encoder layer of a tower, with a caveat if there are `reasons`."""
    return Block(
        path=f"{tower}.encoder.layers.{index}",
        class_name="CLIPEncoderLayer",
        verdict=Verdict.CAVEAT if reasons else Verdict.ELIGIBLE,
        reasons=reasons,
        steps=(
            Step("attention", ("layer_norm1", "self_attn"), "modeling_clip.py:371"),
            Step("mlp", ("layer_norm2", "mlp"), "modeling_clip.py:376"),
        ),
        stream="hidden_states",
        shape=shape,
        dtype="fp32",
        extra_inputs=("attention_mask",) if tower == "text_model" else (),
        buffers_written=(),
        draws_random=False,
        parameters=7_087_872,
        source="modeling_clip.py:355",
    )


def prediction(costs: Costs, method: str, tokens: int) -> Prediction:
    """One method at one size."""
    categories = costs.categories(method, tokens)
    peak = sum(categories.values())
    fixed = 2 * costs.parameters + 6 * costs.trained
    kept = categories[Category.STORED_ACTIVATIONS.value] + categories[Category.SIDE_BITS.value]
    flops = costs.flops * tokens * (1 if method == "plain" else 4 / 3)
    return Prediction(
        method=method,
        peak_bytes=peak,
        phase="backward",
        categories=categories,
        phase_peaks={"forward": peak * 9 // 10, "backward": peak, "optimizer": fixed + 2 * costs.trained},
        kept_bytes=kept + categories[Category.LOGITS_AND_LOSS.value] // 3 + 2 * tokens * costs.stream,
        step_flops=int(flops),
        step_seconds=flops / H100.peak_flops * 1.6,
        side_bits=SIDE_BITS.get(method, 0),
        preserves_function=method in ("plain", "checkpoint", "offload", "momentum"),
        note="Host traffic of 0.53 GiB each way is hidden behind the blocks." if method == "offload" else "",
    )


def reach(costs: Costs, method: str, batch: int, sequence: int) -> Reach:
    """How many samples and tokens fit the H100."""
    fixed = costs.peak(method, 0)
    per_token = (costs.peak(method, 1 << 20) - fixed) / (1 << 20)
    tokens = int((H100.memory_bytes - fixed) / per_token)
    return Reach(method, max(0, tokens // sequence), max(0, tokens // batch))


def sweeps(costs: Costs, batch: int, sequence: int, names: Sequence[str] = METHODS) -> tuple[Sweep, ...]:
    """Peaks over powers of two around the setting."""
    batches = tuple(2**i for i in range(9))
    lengths = tuple(sequence * 2**i // 16 for i in range(9))
    found = []
    for name in names:
        found.append(Sweep("batch", name, batches, tuple(costs.peak(name, b * sequence) for b in batches)))
        found.append(Sweep("sequence", name, lengths, tuple(costs.peak(name, s * batch) for s in lengths)))
    return tuple(found)
