"""What a config says of quantised weights (`quantization_config`): which layers are packed, into how many bytes.

No library is imported and no weights are read. The formats say how many bits a weight has and how many weights share a
scale; what a layer keeps for backward is what real ones of the library, asked (`capture/quantised.py`), keep.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autorev.errors import SettingError
from autorev.format import format_bytes
from autorev.packages import require

if TYPE_CHECKING:
    from torch import nn


KINDS = ("nf4", "int8")
"""What weights can be quantised to when they are loaded: by bitsandbytes, 4 bits as QLoRA has them, or 8."""

WEIGHTS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "torchao-int8": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
}
"""What weights can be predicted as, by `Setting.weights`: the `quantization_config` of a model that has them so."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the linear layers of a model are quantised."""

    title: str
    """`bitsandbytes nf4`."""
    bits: float = 0
    """Of a weight; 0: what this library packs, and how, is not known here."""
    group: int | None = None
    """Weights of a row that share a scale; None: all of them."""
    shared_bytes: float = 2
    """Of what a group shares: its scale, and its zero point if it has one."""
    layer_bytes: int = 0
    """Of the tables that a layer has besides."""
    keeps_input: bool = True
    """Does a layer keep its input for backward?"""
    hides_input: bool = False
    """And not tell autograd of it, so that checkpointing keeps it, too?"""
    keeps_unpacked: bool = False
    """Does it keep the unpacked weight?"""
    adapters_in_fp32: bool = False
    """Does PEFT keep adapters beside it in fp32, whatever it is asked, as the layer has no floating weight?"""
    skipped: tuple[str, ...] | None = None
    """Names of modules that are not quantised; None: those that `transformers` leaves out."""

    def bytes(self, inputs: int, outputs: int) -> int:
        """Of one layer's weight."""
        groups = outputs * -(-inputs // (self.group or inputs))
        return round(inputs * outputs * self.bits / 8 + groups * self.shared_bytes) + self.layer_bytes


def scheme_of(config: Any) -> Scheme | None:
    """How a model is quantised by its `transformers` config, a dictionary; None where it is not."""
    said = config.get("quantization_config") if isinstance(config, Mapping) else None
    if not isinstance(said, Mapping) or not said:
        return None
    method = said.get("quant_method") or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & {*said} else "")
    method = str(getattr(method, "value", method))  # an enum, while the model is alive
    try:
        found = _READERS[method](said)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):  # another library, or another version
        return Scheme(method or "a library that its config does not name")
    names = [said.get(key) for key in ("llm_int8_skip_modules", "modules_to_not_convert", "ignore") if said.get(key)]
    listed = tuple(str(name).removeprefix("re:") for name in names[0]) if names and isinstance(names[0], list) else None
    return replace(found, skipped=listed)


def chosen_scheme(name: str, own: Scheme | None, weights: str | None) -> Scheme | None:
    """How the model `name` is quantised, by its config (`own`) or as `weights`, one of `WEIGHTS`, asks.

    Raises:
        SettingError: its config has another scheme.
    """
    if weights is None:
        return own
    asked = scheme_of({"quantization_config": WEIGHTS[weights]})
    if own is not None and replace(own, skipped=None) != asked:
        raise SettingError(f"the weights of {name} are quantised already ({own.title}); leave `weights` out")
    return own or asked


def quantise(twin: nn.Module, scheme: Scheme) -> int:
    """Put a stand-in for every quantised layer into a `transformers` model without weights (of fake tensors, under
    their mode, or of the meta device); returns how many bytes the packed weights take."""
    from autorev.capture.quantised import Kept, StandIn, linear_sizes, on_packed_memory

    left_out = _left_out(twin, scheme)
    kept, total = Kept(scheme.keeps_input, scheme.keeps_unpacked, scheme.hides_input), 0
    for path, module in list(twin.named_modules()):
        sizes = linear_sizes(module)
        if sizes is None or left_out(path):
            continue
        size = scheme.bytes(*sizes)
        layer: Any = module
        weight = on_packed_memory((sizes[1], sizes[0]), layer.weight.dtype, size)
        twin.set_submodule(path, StandIn(*sizes, weight, layer.bias, kept).train(module.training))
        total += size
    return total


def _left_out(model: Any, scheme: Scheme) -> Callable[[str], bool]:
    """Is the module of a path not quantised? As `transformers` reads the names that a config lists; where it lists
    none, the head is left out, and the last module."""
    if scheme.skipped is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        last = [name for name, _ in model.named_parameters()][-1].rpartition(".")[0]
        names = {last, *(path for path, module in model.named_modules() if module is head)}
        return lambda path: path in names
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    patterns = [re.compile(f"(?:{name}){boundary}") for name in scheme.skipped]
    return lambda path: any(p.match(path) for p in patterns) or path.endswith(scheme.skipped or ())


def predicted_quantised(twin: nn.Module, scheme: Scheme, trains: str, dtype: str, asked: bool = False) -> str:
    """Quantise `twin`, if it is to train as `trains` and it is known how; what the reader is told of it.

    `asked`: its config does not say so.

    Raises:
        SettingError: it was asked for, and there is nothing to quantise.
    """
    from autorev.capture.quantised import StandIn

    if asked and any(isinstance(module, StandIn) for module in twin.modules()):
        raise SettingError("this model's layers are quantised already; leave `weights` out")
    if trains == "full":
        return (
            f"its weights are quantised ({scheme.title}), and quantised weights do not train: what is predicted is to "
            f"train all of them, unpacked to {dtype}; `lora_rank` predicts adapters on the quantised ones"
        )
    before = sum(p.numel() * p.element_size() for p in twin.parameters())
    if not scheme.bits:
        return (
            f"its weights are quantised by {scheme.title}, of which it is not known here how many bytes they take: "
            f"they are predicted as {dtype}, {format_bytes(before)}, which is too much"
        )
    packed = quantise(twin, scheme)
    if asked and not packed:
        raise SettingError("no linear layer of this model is one to quantise; leave `weights` out")
    inside = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in twin.parameters()}
    by = "asked" if asked else "its config says"
    return (
        f"weights quantised as {by} ({scheme.title}): {format_bytes(packed)} in linear layers, and "
        f"{format_bytes(sum(inside.values()) - packed)} in {dtype}; unquantised they would be {format_bytes(before)}"
    )


def bitsandbytes_config(kind: str | None, bf16: bool) -> Any:
    """The config by which `transformers` quantises weights to `kind`, one of `KINDS`, while it loads them; None for
    None. `bf16`: products are computed in it.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    if kind is None:
        return None
    require(f"`quantize={kind}`", "bitsandbytes")
    import torch
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def quantised_by(model: nn.Module) -> str:
    """How the weights of a live model are quantised, in words; empty where they are not."""
    from autorev.capture.quantised import is_quantised

    if not any(map(is_quantised, model.modules())):
        return ""
    said: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    scheme = scheme_of({"quantization_config": said if said is None or isinstance(said, dict) else said.to_dict()})
    return "by a library of its own" if scheme is None else scheme.title


def cannot_train(name: str, title: str, remedy: str) -> SettingError:
    """What is said where all weights of a quantised model are to train."""
    return SettingError(
        f"the weights of {name} are quantised ({title}), and quantised weights do not train: train adapters beside "
        f"them with {remedy}, or take the model's unquantised weights"
    )


# -- what each library's entry says


def _bitsandbytes(said: Mapping[str, Any]) -> Scheme:
    if said.get("load_in_8bit") or said.get("_load_in_8bit"):
        return Scheme("bitsandbytes int8", 8, shared_bytes=4, hides_input=True, adapters_in_fp32=True)
    kind, twice = str(said.get("bnb_4bit_quant_type", "fp4")), bool(said.get("bnb_4bit_use_double_quant"))
    title = f"bitsandbytes {kind}" + (", scales quantised, too" if twice else "")
    # A scale for 64 weights in 4 bytes, or in one and a share of those that scale it; a table of 16 or 256 values.
    shared, tables = (1 + 4 / 256, 64 + 1024 + 4) if twice else (4, 64)
    return Scheme(title, 4, 64, shared, tables, keeps_input=False)


def _torchao(said: Mapping[str, Any]) -> Scheme:
    kind = said["quant_type"]
    default = kind.get("default", kind) if isinstance(kind, Mapping) else {"_type": kind}
    name, data = str(default["_type"]), default.get("_data") or said.get("quant_type_kwargs") or {}
    words = name.lower().replace("_", "")
    group = data.get("group_size")
    if "int4weightonly" in words:
        return Scheme(f"torchao {name}", 4, int(group or 128), 4, keeps_input=False, keeps_unpacked=True)
    if "int8weightonly" in words:  # a scale and a zero point
        return Scheme(f"torchao {name}", 8, group, 5, keeps_input=False, keeps_unpacked=True)
    if "int8dynamicactivationint8" in words or words.startswith("float8"):
        return Scheme(f"torchao {name}", 8, group, 4, keeps_input=False, keeps_unpacked=True)
    raise KeyError(name)


def _quanto(said: Mapping[str, Any]) -> Scheme:
    name = str(said["weights"])
    bits = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}[name]
    return Scheme(f"quanto {name}", bits, None if bits == 8 else 128, 4 if bits == 8 else 8)


def _gptq(said: Mapping[str, Any]) -> Scheme:
    bits, group = int(said["bits"]), int(said["group_size"])
    return Scheme(f"gptq, {bits} bits", bits, group if group > 0 else None, 2 + bits / 8)


def _awq(said: Mapping[str, Any]) -> Scheme:
    bits = int(said.get("bits") or said["w_bit"])
    group = int(said.get("group_size") or said["q_group_size"])
    return Scheme(f"awq, {bits} bits", bits, group if group > 0 else None, 2 + bits / 8)


def _hqq(said: Mapping[str, Any]) -> Scheme:
    weights = said["quant_config"]["weight_quant_params"]
    return Scheme(f"hqq, {weights['nbits']} bits", int(weights["nbits"]), int(weights["group_size"]), 4)


def _compressed(said: Mapping[str, Any]) -> Scheme:
    weights = next(iter(said["config_groups"].values()))["weights"]
    bits, group = int(weights["num_bits"]), weights.get("group_size")
    return Scheme(f"compressed-tensors, {bits} bits", bits, int(group) if group and int(group) > 0 else None)


def _fp8(said: Mapping[str, Any]) -> Scheme:
    rows, columns = said.get("weight_block_size") or (1, 0)
    return Scheme("fp8", 8, int(columns) or None, 4 / int(rows))


_READERS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "quanto": _quanto,
    "gptq": _gptq,
    "awq": _awq,
    "hqq": _hqq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "eetq": lambda said: Scheme("eetq int8", 8),
}
