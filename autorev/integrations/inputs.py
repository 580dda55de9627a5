"""What the inputs of a `transformers` model are like, each by its name: shapes of one sample, from the config alone.

A config says what a processor would make: how large images are, whether there are several of them in a row, how wide a
spectrum is. Nothing here knows a family of models; two that give one name to one thing are served by one entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Shape = tuple[int, ...]

SOUND_SAMPLES = 16_000
"""One second at the rate every speech model of `transformers` listens at."""
SOUND_FRAMES = 200
_IMAGE = 224
"""Pixels a side of ImageNet's, for convolutional networks, which take any."""
_STEPS = 16
"""Of a series whose length the config leaves open."""


def text_config(config: Any) -> Any:
    """The part of a config that is of text; of two, what the encoder reads."""
    try:
        return config.get_text_config()
    except ValueError:  # as `transformers` has it where there are two
        return config.get_text_config(encoder=True)


def field(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the config, or a part of it, has."""
    parts = [part for key in _PARTS if (part := getattr(config, key, None)) is not None and not isinstance(part, dict)]
    for part in (*parts, config):
        for name in names:
            if (found := getattr(part, name, None)) is not None:
                return found
    return default


_PARTS = ("vision_config", "audio_config", "encoder_config", "encoder")
"""Of a config, that other towers than the text's are described in."""


def pixels(config: Any) -> Shape:
    """An image; several of a video; or the patches that one was cut into."""
    channels = field(config, "num_channels", "in_channels", default=3)
    patches, side = field(config, "num_patches"), field(config, "image_size", "input_size", "crop_size", "max_img_size")
    if isinstance(patches, int) and side is None:
        return patches, channels * field(config, "patch_size") ** 2
    height, width = two(side or _IMAGE)
    frames = field(config, "num_frames", "frames_per_clip")
    return (frames, channels, height, width) if frames else (channels, height, width)


def two(size: Any) -> tuple[int, int]:
    """Height and width of what is given as one number or as two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sound(config: Any) -> Shape:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # a spectrum under the name of a sound
        return int(config.max_length), int(config.num_mel_bins)
    channels = field(config, "audio_channels") or (1 if field(config, "upsampling_ratios") else None)
    return (SOUND_SAMPLES,) if channels is None else (channels, SOUND_SAMPLES)


def _spectrum(config: Any) -> Shape:
    bins = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins", "num_mel_channels")
    width = field(config, *bins, default=80)
    if (longest := field(config, "max_source_positions")) and not hasattr(config, "input_feat_per_channel"):
        return width, 2 * longest
    if side := field(config, "spec_size"):  # a spectrum that is looked at as an image
        return 1, side * side // width, width
    return SOUND_FRAMES, width


def _past(config: Any) -> int:
    lags = getattr(config, "lags_sequence", None) or [0]
    return int(getattr(config, "context_length", None) or _STEPS) + int(max(lags))


def _series(length: int, config: Any) -> Shape:
    width = field(config, "num_input_channels") or getattr(config, "input_size", 1)
    return (length, width) if width > 1 or hasattr(config, "num_input_channels") else (length,)


FLOATING: dict[str, Callable[[Any], Shape]] = {
    "pixel_values": pixels,
    "pixel_values_videos": pixels,
    "input_values": _sound,
    "input_features": _spectrum,
    "decoder_input_values": lambda config: (SOUND_FRAMES, config.num_mel_bins),
    "speaker_embeddings": lambda config: (config.speaker_embedding_dim,),
    "past_values": lambda config: _series(_past(config), config),
    "past_observed_mask": lambda config: _series(_past(config), config),
    "past_time_features": lambda config: (_past(config), config.num_time_features),
    "future_values": lambda config: _series(config.prediction_length, config),
    "future_time_features": lambda config: (config.prediction_length, config.num_time_features),
    "states": lambda config: (_STEPS, config.state_dim),
    "actions": lambda config: (_STEPS, config.act_dim),
    "rewards": lambda config: (_STEPS, 1),
    "returns_to_go": lambda config: (_STEPS, 1),
    "visual_feats": lambda config: (_STEPS, config.visual_feat_dim),
    "visual_pos": lambda config: (_STEPS, config.visual_pos_dim),
}
"""Inputs with values, by name."""


def _side(config: Any) -> int:
    return int(field(config, "num_patches") ** 0.5)


def _all_of(height: int, width: int) -> list[list[int]]:
    return [[1] * width] * height


WHOLE: dict[str, Callable[[Any, int], list[Any]]] = {
    "spatial_shapes": lambda config, length: [_side(config), _side(config)],
    "pixel_attention_mask": lambda config, length: [1] * field(config, "num_patches"),
    "pixel_mask": lambda config, length: _all_of(*pixels(config)[-2:]),
    "input_features_mask": lambda config, length: [1] * max(_spectrum(config)),
    "is_longer": lambda config, length: [0],
    "bbox": lambda config, length: [[0, 0, 0, 0]] * length,
    "attention_mask": lambda config, length: [1] * length,
    "timesteps": lambda config, length: list(range(_STEPS)),
}
"""Inputs of whole numbers, by name, for a text of some length: the same for every sample."""

IDS: dict[str, Callable[[Any], Any]] = {
    "input_ids": text_config,
    "qformer_input_ids": lambda config: config.qformer_config,
    "decoder_input_ids": lambda config: _decoder(config),
}
"""Inputs of tokens, by name: the config that has their vocabulary."""


def _decoder(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)


def rows(name: str, config: Any) -> int:
    """How many rows of tokens a sample has: a codec's language has one for each codebook."""
    codebooks = getattr(_decoder(config), "num_codebooks", None)
    return codebooks if name == "decoder_input_ids" and isinstance(codebooks, int) else 1
