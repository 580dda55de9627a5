"""What methods, categories and settings are called where a person reads them."""

from __future__ import annotations

from autorev.analysis import Category, DeviceInfo, ModelInfo
from autorev.format import clean, format_bytes, format_count, format_integer, plural
from autorev.known_methods import BASELINES, METHODS
from autorev.methods import TILES
from autorev.optimizers import Optimizer
from autorev.setting import Setting

CATEGORY_TITLES = {
    Category.PARAMETERS: "parameters",
    Category.GRADIENTS: "gradients",
    Category.OPTIMIZER_STATE: "optimizer state",
    Category.STORED_ACTIVATIONS: "stored activations",
    Category.WORKING_SET: "working set",
    Category.STREAMS: "streams",
    Category.SIDE_BITS: "side bits",
    Category.LOGITS_AND_LOSS: "logits and loss",
    Category.OTHER: "other",
}

CATEGORY_MEANINGS = {
    Category.PARAMETERS: "Parameters and buffers.",
    Category.GRADIENTS: "One per trained parameter.",
    Category.OPTIMIZER_STATE: "What the optimizer keeps from step to step, such as Adam's two moments.",
    Category.STORED_ACTIVATIONS: "What the blocks keep between forward and backward.",
    Category.WORKING_SET: (
        "Temporaries of the block being computed, and what a recomputed block holds for its backward."
    ),
    Category.STREAMS: "The running state of a reversible chain (h and v, or q and p) and its gradients.",
    Category.SIDE_BITS: (
        "The few bits per element that exact arithmetic keeps, so that a coupling is undone without error."
    ),
    Category.LOGITS_AND_LOSS: "Everything computed after the last block.",
    Category.OTHER: "Inputs, embeddings, masks, and the optimizer's temporaries.",
}

AGAINST = {"oracle": "the same coupling under ordinary autograd", "plain": "the model as it was"}
"""What a method's gradient is compared with."""

GOALS = {"memory": "the least memory", "throughput": "the highest throughput", "context": "the longest sequence"}

AXIS_TITLES = {
    "batch": "batch, samples",
    "sequence": "sequence, tokens per sample",
    "depth": "depth, blocks",
}

_losses = {"full": "full logits", "chunked": "chunked loss"}


def method_title(method: str) -> str:
    """`activation checkpointing` for `checkpoint`; a coupling goes by its own name."""
    name, _, tiles = method.partition(TILES) if method.endswith(TILES) else (method, "", None)
    return clean(METHODS[name].title if name in METHODS else name) + ("" if tiles is None else " with tiles")


def method_label(method: str) -> str:
    """`checkpoint+tiles`, as a table of an analysis has it."""
    return clean(f"{method.removesuffix(TILES)}+tiles" if method.endswith(TILES) else method)


def headline(method: str | None) -> str:
    """A recommendation as an imperative; `None` where nothing is recommended."""
    if method is None:
        return "None"
    name = method.removesuffix(TILES)
    if name in METHODS and name not in BASELINES:
        return f"Use the {clean(name)} coupling{' with tiles' if name != method else ''}"
    return f"Use {method_title(method)}"


def model_facts(model: ModelInfo) -> tuple[str, str, str]:
    """Class, size and origin."""
    return clean(model.class_name), f"{format_count(model.parameters)} parameters", clean(model.source)


def device_facts(device: DeviceInfo) -> str:
    """`NVIDIA H100 (79.6 GiB, of which 78.6 GiB to use)`."""
    memory, usable = format_bytes(device.memory_bytes), format_bytes(device.usable_bytes)
    return f"{clean(device.title)} ({memory}, of which {usable} to use)"


def setting_facts(setting: Setting) -> dict[str, str]:
    """The predicted step, one entry per choice."""
    facts = {"Batch": plural(setting.batch, "sample")}
    if setting.sequence is not None:
        facts["Sequence"] = f"{format_integer(setting.sequence)} tokens"
    if setting.accumulate > 1:
        facts["Batch"] += f", gradients of {setting.accumulate} passes accumulated"
    weights = clean(setting.dtype)
    facts["Precision"] = f"{clean(setting.autocast)} autocast over {weights} weights" if setting.autocast else weights
    facts["Precision"] += f", linear layers quantised to {clean(setting.weights)}" if setting.weights else ""
    facts["Optimizer"] = Optimizer.parse(setting.optimizer).title
    facts["Trains"] = _trained(setting)
    if setting.gpus > 1:
        facts["GPUs"] = f"per GPU, {setting.gpus} GPUs, {clean(setting.shard) if setting.shard != 'none' else 'DDP'}"
        if setting.sequence_parallel > 1:
            facts["GPUs"] += f", {setting.sequence_parallel} to a sample"
    facts["Loss"] = _losses.get(setting.loss, clean(setting.loss))
    return facts


def _trained(setting: Setting) -> str:
    if setting.trains == "lora":
        dropout = f", dropout {setting.lora_dropout:g}" if setting.lora_dropout else ""
        adapters = f", {clean(setting.adapter_dtype)} adapters" if setting.adapter_dtype else ""
        return f"LoRA of rank {setting.lora_rank}{dropout}{adapters}"
    return {"full": "all weights", "head": "the head only"}.get(setting.trains, clean(setting.trains))
