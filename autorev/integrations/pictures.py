"""The picture in an example call of a vision-language model: its pixels, and the tokens that stand for it in the text.

How many tokens a picture takes is written in no one place: families pool, shuffle and merge patches in their own ways.
So the model's own vision tower is asked, on tensors without values; where it looks at values, its family's rule is
followed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Noise = Callable[[tuple[int, ...]], "torch.Tensor"]
"""Random numbers of a shape."""

_GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
"""A picture of any size is cut into patches, all pictures' in one long row, with a table of their numbers."""
_TILES = ("llava_next", "llava_onevision")
"""The picture as a whole, and tiles of it."""
_LISTS = ("idefics2", "idefics3", "smolvlm")
"""Each sample has a list of pictures, of which those that are all zeros are left out."""
_SIZED = ("mistral3",)
"""A picture of any size comes with its height and width."""
_PLAIN = (
    *("aya_vision", "cohere2_vision", "deepseek_vl", "gemma3", "got_ocr2", "internvl", "llava", "paligemma"),
    "vipllava",
)
"""One picture of one size."""
_FAMILIES = frozenset((*_GRIDS, *_TILES, *_LISTS, *_SIZED, *_PLAIN))
"""Those whose pictures are tried out by autorev's tests."""
_ENOUGH = 2**20
"""Positions, where a model has no limit."""
_USUAL_SIZE = 448
"""Pixels a side, where the model takes any."""
INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "mm_token_type_ids", "token_type_ids")
"""Keywords that a call with a picture has, and one of text alone has not."""
_TOWERS = {
    "vision": ("pixel_values", "image_pixel_values"),
    "audio": ("input_features", "input_values", "audio_input_features"),
}
"""What feeds the towers of a language model that takes more than text."""


@dataclass(frozen=True)
class Picture:
    """One picture for each sample."""

    inputs: dict[str, Any]
    """The pixels, and what the model wants to know of them."""
    ids: tuple[int, ...]
    """Tokens that stand for it in the text."""
    token: int
    """The one of them that stands for a piece of it; others may begin and end it."""
    size: int
    """Pixels a side."""

    @property
    def note(self) -> str:
        """What a prediction is for."""
        return (
            f"each sample has a picture of {self.size} x {self.size} pixels, which takes {len(self.ids)} tokens beside "
            "those of its text"
        )


def towers_left_out(model_cls: type[Any], call: dict[str, Any]) -> str:
    """A sentence on the towers of a language model that `call` does not run; empty where there are none."""
    accepted = inspect.signature(model_cls.forward).parameters
    if model_cls.main_input_name != "input_ids":
        return ""
    idle = [
        tower
        for tower, names in _TOWERS.items()
        if any(name in accepted for name in names) and not any(name in call for name in names)
    ]
    if not idle:
        return ""
    return (
        f"{model_cls.__name__} was called with text alone, as autorev cannot make up its other inputs here: its "
        f"{' and '.join(idle)} tower was not run, and is in no figure and no chain. Give the loaded model and a batch "
        "that has them (autorev.analyze(model, batch), autorev.convert(model, batch)); what "
        "they cost is measured by autorev.profile(model, batch)"
    )


def reads_pictures(model_cls: type[Any]) -> bool:
    """Is it a language model that takes pictures beside its text?"""
    accepted = inspect.signature(model_cls.forward).parameters
    return model_cls.main_input_name == "input_ids" and "pixel_values" in accepted and "return_loss" not in accepted


def picture(config: Any, model_cls: type[Any], batch: int, noise: Noise, live: bool = True) -> Picture | None:
    """A picture of the size that the model was made for; None where autorev cannot make one by itself.

    A model that is not `live` has no values, and some look at those of their pictures, or of the table.
    """
    if config.model_type in (*_LISTS, *_GRIDS) and not live:
        return None
    if config.model_type not in _FAMILIES or not reads_pictures(model_cls):
        return None
    found = _first(config, "image_token_id", "image_token_index")
    if not found:
        return None
    (token,) = found
    made = _in_patches if config.model_type in _GRIDS else _in_pixels
    try:
        inputs, count, size = made(config, model_cls, batch, noise)
    except Exception:  # a config unlike its family's
        return None
    before, after = (_first(config, f"vision_{end}_token_id", f"image_{end}_token_id") for end in ("start", "end"))
    return Picture(inputs, (*before, *[token] * count, *after), token, size) if count > 0 else None


def kinds_of_tokens(accepted: Any, shown: Picture, batch: int, length: int) -> dict[str, Any]:
    """What a model wants to know of each token: whether it is a piece of a picture. `length`: of the text."""
    row = [int(token == shown.token) for token in shown.ids] + [0] * length
    return {name: _numbers(row, batch) for name in ("mm_token_type_ids", "token_type_ids") if name in accepted}


def _first(config: Any, *names: str) -> tuple[int, ...]:
    found = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    return tuple(found[:1])


def _in_patches(config: Any, model_cls: type[Any], batch: int, noise: Noise) -> tuple[dict[str, Any], int, int]:
    vision = config.vision_config
    merged = vision.spatial_merge_size
    size = getattr(vision, "image_size", None) or _USUAL_SIZE
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or _ENOUGH
    most = max(int((limit / 2) ** 0.5), 1)  # a side of a picture that leaves half of the positions to the text
    side = max(min(size // vision.patch_size // merged, most), 1) * merged
    channels = next(
        getattr(vision, name) for name in ("in_channels", "in_chans", "num_channels") if hasattr(vision, name)
    )
    length = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    inputs = {
        "pixel_values": noise((batch * side * side, length)),
        "image_grid_thw": _numbers([1, side, side], batch),
    }
    return inputs, (side // merged) ** 2, side * vision.patch_size


def _numbers(row: list[int], batch: int) -> torch.Tensor:
    """Real ones, also under fake tensors: models loop over them."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return torch.tensor([row]).repeat(batch, 1)


def _in_pixels(config: Any, model_cls: type[Any], batch: int, noise: Noise) -> tuple[dict[str, Any], int, int]:
    vision, family = config.vision_config, config.model_type
    size = getattr(vision, "image_size", None) or _USUAL_SIZE
    size = size if isinstance(size, int) else size[0]
    shape: tuple[int, ...] = (getattr(vision, "num_channels", 3), size, size)
    inputs: dict[str, Any] = {}
    if family in _LISTS:
        shape = (1, *shape)
    if family in _TILES:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        shape = (image_size_to_num_patches((size, size), config.image_grid_pinpoints, size), *shape)
    if family in (*_TILES, *_SIZED):
        inputs["image_sizes"] = _numbers([size, size], batch)
    inputs["pixel_values"] = noise((batch, *shape))
    side = size // vision.patch_size if isinstance(vision.patch_size, int) else size // vision.patch_size[0]
    if family == "idefics2":
        count = config.perceiver_config.resampler_n_latents
    elif family in _LISTS:
        count = side**2 // config.scale_factor**2
    elif family in _SIZED:
        count = (side // config.spatial_merge_size) ** 2
    else:
        count = _asked(config, model_cls, shape, inputs.get("image_sizes"))
    return inputs, count, size


def _asked(config: Any, model_cls: type[Any], shape: tuple[int, ...], sizes: Any) -> int:
    """The tokens that the vision tower makes of one picture."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from autorev.integrations.quirks import quiet

    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = 1
    with unset_fake_temporarily(), torch.device("meta"), torch.no_grad(), quiet():
        dtype = torch.get_default_dtype()
        model = model_cls._from_config(small, dtype=dtype)
        how = {} if sizes is None else {"image_sizes": torch.tensor([list(shape[-2:])], device="cpu")}
        found = model.model.get_image_features(pixel_values=torch.empty(1, *shape, dtype=dtype), **how)
    found = getattr(found, "pooler_output", found)
    pieces = found if isinstance(found, (list, tuple)) else [found]
    return int(sum(piece.numel() for piece in pieces) // text.hidden_size)
