"""The picture in an example call of a vision-language model: its pixels, and the tokens that stand for it in the text.

How many tokens a picture takes is written in no one place: families pool, shuffle and merge patches in their own ways.
So the model's own vision tower is asked, on tensors without values; where it looks at values, the numbers in its config
are followed. Models are told apart by what they are called with and what their configs have, not by their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autorev.integrations.asked import shallow
from autorev.integrations.inputs import text_config, two

if TYPE_CHECKING:
    import torch

Noise = Callable[[tuple[int, ...]], "torch.Tensor"]
"""Random numbers of a shape."""

_ENOUGH = 2**20
"""Positions, where a model has no limit."""
_USUAL_SIZE = 448
"""Pixels a side, where the model takes any."""
_MASK = "image_embeds_position_mask"
"""Which tokens of a text stand for a piece of its picture, where these have no id of their own."""


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


def reads_pictures(config: Any, model_cls: type[Any]) -> bool:
    """Is it a model that takes pictures in its text, where tokens stand for them?"""
    accepted = inspect.signature(model_cls.forward).parameters
    both = {"input_ids", "pixel_values"} <= accepted.keys() and "return_loss" not in accepted
    return both and bool(_places(config, accepted))


def mixes_in_tokens(config: Any) -> bool:
    """Do tokens of the text stand for what is not text? Their number has to fit what the towers make of that."""
    return bool(_first(config, "image_token_id", "image_token_index", "audio_token_id", "audio_token_index"))


def picture(config: Any, model_cls: type[Any], batch: int, noise: Noise, live: bool = True) -> Picture | None:
    """A picture of the size that the model was made for; None where autorev cannot make one by itself.

    A model that is not `live` has no values, and some look at those of their pictures.
    """
    if not reads_pictures(config, model_cls):
        return None
    accepted = inspect.signature(model_cls.forward).parameters
    grid = "image_grid_thw" in accepted
    if "pixel_attention_mask" in accepted and not live:
        return None
    (token,) = _places(config, accepted)
    try:
        inputs, count, size = (_in_patches if grid else _in_pixels)(config, model_cls, batch, noise)
    except Exception:  # a config unlike what is known of such models
        return None
    before, after = (_first(config, f"vision_{end}_token_id", f"image_{end}_token_id") for end in ("start", "end"))
    return Picture(inputs, (*before, *[token] * count, *after), token, size) if count > 0 else None


def kinds_of_tokens(accepted: Any, shown: Picture, batch: int, length: int) -> dict[str, Any]:
    """What a model wants to know of each token: whether it is a piece of a picture. `length`: of the text."""
    row = [int(token == shown.token) for token in shown.ids] + [0] * length
    names = ("mm_token_type_ids", "token_type_ids", _MASK)
    return {name: numbers(row, batch) for name in names if name in accepted}


def _places(config: Any, accepted: Any) -> tuple[int, ...]:
    """The token that stands for a piece of a picture; any, where a mask says which ones do."""
    return _first(config, "image_token_id", "image_token_index") or ((0,) if _MASK in accepted else ())


def _first(config: Any, *names: str) -> tuple[int, ...]:
    found = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    return tuple(found[:1])


def _in_patches(config: Any, model_cls: type[Any], batch: int, noise: Noise) -> tuple[dict[str, Any], int, int]:
    vision = config.vision_config
    merged = vision.spatial_merge_size
    size = getattr(vision, "image_size", None) or _USUAL_SIZE
    limit = getattr(text_config(config), "max_position_embeddings", None) or _ENOUGH
    most = max(int((limit / 2) ** 0.5), 1)  # a side of a picture that leaves half of the positions to the text
    side = max(min(size // vision.patch_size // merged, most), 1) * merged
    channels = next(
        getattr(vision, name) for name in ("in_channels", "in_chans", "num_channels") if hasattr(vision, name)
    )
    length = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    inputs = {
        "pixel_values": noise((batch * side * side, length)),
        "image_grid_thw": numbers([1, side, side], batch),
    }
    return inputs, (side // merged) ** 2, side * vision.patch_size


def numbers(row: list[Any], batch: int) -> torch.Tensor:
    """Real ones, also under fake tensors: models loop over them."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        one = torch.tensor([row])
        return one.repeat(batch, *[1] * (one.dim() - 1))


def _in_pixels(config: Any, model_cls: type[Any], batch: int, noise: Noise) -> tuple[dict[str, Any], int, int]:
    """One picture; tiles of it beside it; or a list of pictures, of which those that are all zeros are left out."""
    vision, accepted = config.vision_config, inspect.signature(model_cls.forward).parameters
    size = two(getattr(vision, "image_size", None) or _USUAL_SIZE)[0]
    patch = two(vision.patch_size)[0]
    shape: tuple[int, ...] = (getattr(vision, "num_channels", 3), size, size)
    inputs: dict[str, Any] = {}
    if "pixel_attention_mask" in accepted:
        shape = (1, *shape)
    if pins := getattr(config, "image_grid_pinpoints", None):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        shape = (image_size_to_num_patches((size, size), pins, size), *shape)
    sized = bool(pins) or ("image_sizes" in accepted and hasattr(config, "spatial_merge_size"))
    if sized:
        inputs["image_sizes"] = numbers([size, size], batch)
    inputs["pixel_values"] = noise((batch, *shape))
    if queries := getattr(config, "num_query_tokens", None) or getattr(config, "latent_query_num", None):
        count = queries
    elif hasattr(config, "perceiver_config"):
        count = config.perceiver_config.resampler_n_latents
    elif "pixel_attention_mask" in accepted:
        count = (size // patch) ** 2 // config.scale_factor**2
    elif sized and not pins:
        count = (size // patch // config.spatial_merge_size) ** 2
    else:
        count = _asked(config, model_cls, shape, inputs.get("image_sizes"))
    return inputs, count, size


def _asked(config: Any, model_cls: type[Any], shape: tuple[int, ...], sizes: Any) -> int:
    """The tokens that the vision tower makes of one picture."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from autorev.integrations.quirks import quiet

    with unset_fake_temporarily(), torch.device("meta"), torch.no_grad(), quiet():
        model = shallow(config, model_cls)
        how = {} if sizes is None else {"image_sizes": torch.tensor([list(shape[-2:])], device="cpu")}
        pixels = torch.empty(1, *shape, dtype=torch.get_default_dtype())
        found = model.model.get_image_features(pixel_values=pixels, **how)
    found = getattr(found, "pooler_output", found)
    pieces = found if isinstance(found, (list, tuple)) else [found]
    return int(sum(piece.numel() for piece in pieces) // text_config(config).hidden_size)
