"""A reference model beside a converted policy: DPO, KTO, GRPO and their kin measure how far the one has left the other.

At the first step the two are the same weights, and have to be the same function; a trainer loads the reference by
itself, as the plain architecture. Here it gets the policy's coupling. Adapters that are switched off for the reference
need nothing: that is the policy itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from autorev.conversion import config_entry
from autorev.conversion.convert import chains_of, convert
from autorev.engine.eval_mode import eval_mode
from autorev.errors import AutorevError, ConversionError, one_line
from autorev.integrations.peft import name_in_base
from autorev.integrations.trainers import (
    compares,
    is_reference,
    is_trainer,
    precomputed_columns,
    reference_log_probs,
    reference_of,
    servers_of,
    unwrapped,
)
from autorev.rewrite.block_forward import ReversibleForward
from autorev.rewrite.replacement import HANDLE

_SAME = 1e-3
"""Relative difference of two sums of log-probabilities of the same function."""
_MOST_ROWS = 8
_beside: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""By reference: the policies beside which it was looked at."""
_following: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""By reference: the policies whose function it was then."""
_checked: WeakSet[Any] = WeakSet()
"""Trainers whose data and servers were looked at."""


def match_references(owner: Any, policy: nn.Module | None = None) -> bool:
    """Give the reference models that `owner` holds beside its converted policy the policy's coupling.

    A `transformers.Trainer`'s are converted. Of any other object that holds both, only a warning is logged: nobody
    knows what it compares.

    Returns: whether `owner` is what trains `policy`, so that no one else has to be looked at.

    Raises:
        ConversionError: a reference cannot be converted like the policy, or log-probabilities that were computed
            beforehand are not those of the coupled reference.
    """
    held = _modules_of(owner)
    references = {name: module for name, module in held.items() if is_reference(name)}
    if policy is None or policy in references.values():
        policy = held.get("model")
    trainer = is_trainer(owner)
    if policy is None or not (trainer or references) or not _holds(held, policy):
        return trainer
    if not _is_converted(policy):
        tell_of_plain_policy(owner)
        return trainer
    for name, module in references.items():
        if policy not in (seen := _beside.setdefault(module, WeakSet())):
            if _match(f"{type(owner).__name__}.{name}", module, unwrapped(policy), convert_it=trainer):
                _following.setdefault(module, WeakSet()).add(policy)
            seen.add(policy)
        elif policy in _following.get(module, ()):
            _follow(module, policy)
    if trainer and owner not in _checked:
        _tell_of_chance(owner, policy)
        _check_precomputed(owner)
        _tell_of_servers(owner)
        _checked.add(owner)
    return True


def tell_of_plain_policy(owner: Any) -> None:
    """Log a warning, once, where `owner` holds a converted reference beside a policy that is not.

    The other way round than `match_references`: the policy would have to be converted, and that is up to who trains it.
    """
    held = _modules_of(owner)
    references = {name: module for name, module in held.items() if is_reference(name)}
    policy = held.get("model")
    if policy is None or not references or not _holds(held, policy):
        return
    for name, module in references.items():
        seen = _beside.setdefault(module, WeakSet())
        if policy in seen or not _is_converted(module) or _is_converted(policy):
            continue
        seen.add(policy)
        logging.getLogger("autorev").warning(
            "%s.%s is converted, and the policy beside it computes the plain function: from the first step on they "
            "differ by more than what was trained. Convert the policy with the same settings, before the trainer "
            "is made, or autorev.revert the reference",
            type(owner).__name__,
            name,
        )


def _match(what: str, module: nn.Module, trained: nn.Module, convert_it: bool) -> bool:
    """Give the reference the policy's coupling, or say why not. Returns: whether it has that coupling now."""
    reference = unwrapped(module)
    # Some trainers put the policy beside a value head, into one module.
    policy = next((part for part in trained.modules() if _related(type(part), type(reference))), trained)
    if reference is policy:
        return False
    settings, theirs = config_entry.read(policy), config_entry.read(reference)
    log = logging.getLogger("autorev")
    if _is_converted(reference):
        if _function_of(reference) == _function_of(policy):
            return True
        ours, other = settings or {}, theirs or {}
        different = [name for name in ours if name not in _NO_FUNCTION and other.get(name) != ours[name]]
        log.warning(
            "%s is converted with another %s than the policy: from the first step on they differ by more than "
            "what was trained",
            what,
            ", ".join(different or ["set of blocks"]),
        )
        return False
    if not _alike(reference, policy):
        log.warning(
            "%s (%s) is another architecture than the converted policy, and stays as it is",
            what,
            type(reference).__name__,
        )
        return False
    if not convert_it:
        log.warning(
            "%s computes the plain function, and the policy beside it the coupled one; if it is the reference of a "
            "loss, convert it with the same settings",
            what,
        )
        return False
    if settings is None:
        raise ConversionError(f"{what} {_UNKNOWN}: the policy's config does not say how it was converted. {_BY_HAND}")
    try:
        convert(reference, **config_entry.for_base_model(settings))
    except AutorevError as error:
        raise ConversionError(f"{what} {_UNKNOWN}: {error}. {_BY_HAND}") from error
    log.warning("%s is converted like the policy, which it is compared with", what)
    return True


def _is_converted(model: nn.Module) -> bool:
    return any(HANDLE in module.__dict__ for module in model.modules())


def _function_of(model: nn.Module) -> dict[str, Any]:
    """By converted block, the couplings of its chain and which of them is its own: what the model computes of it."""
    return {
        name_in_base(name): (found.numbers, found.chain.couplings, found.chain.averages)
        for name, module in model.named_modules()
        for found in module.__dict__.get(HANDLE, ())
        if isinstance(found, ReversibleForward)
    }


def _follow(reference: nn.Module, policy: nn.Module) -> None:
    """A schedule moves the policy's gamma: its reference goes along, as the policy without adapters would."""
    for own, moved in zip(chains_of(reference), chains_of(policy), strict=False):
        if own.couplings != moved.couplings:
            own.couple_by(moved.couplings)


_NO_FUNCTION = ("keep_last", "blocks", "exclude", "fraction_bits", "arithmetic")
"""Settings that may differ: they say what is stored and how finely it is rounded, or are patterns of names."""
_UNKNOWN = "computes the plain function beside a policy that is coupled, and cannot be converted like it"
_BY_HAND = (
    "Load the reference yourself, autorev.convert it as the policy, and hand it to the trainer (ref_model=...); or "
    "train adapters (LoRA), whose reference is the policy itself with its adapters off"
)


def _alike(reference: nn.Module, policy: nn.Module) -> bool:
    """The same class, with its blocks where the policy's are, and no weight that the policy lacks."""
    blocks = {name: type(module) for name, module in policy.named_modules() if HANDLE in module.__dict__}
    found = {name: type(module) for name, module in reference.named_modules()}
    known = {name_in_base(name) for name, _ in policy.named_parameters()}
    return (
        _related(type(reference), type(policy))
        and all(name in found and _related(found[name], kind) for name, kind in blocks.items())
        and all(name_in_base(name) in known for name, _ in reference.named_parameters())
    )


def _related(one: type, other: type) -> bool:
    """FSDP makes a class of its own of each class."""
    return (issubclass(one, other) or issubclass(other, one)) and nn.Module not in (one, other)


def _modules_of(owner: Any) -> dict[str, nn.Module]:
    own = getattr(owner, "__dict__", {})
    held = {**own.get("_modules", {}), **own} if isinstance(owner, nn.Module) else own
    return {name: value for name, value in held.items() if isinstance(value, nn.Module)}


def _holds(held: Mapping[str, nn.Module], policy: nn.Module) -> bool:
    inside = unwrapped(policy)
    own = (module for name, module in held.items() if not is_reference(name))
    return any(inside is part for module in own for part in module.modules())


# -- what a trainer computes elsewhere


def _check_precomputed(trainer: Any) -> None:
    """Log-probabilities that were computed before training, or by an earlier run whose cache was found.

    Raises:
        ConversionError: they are not the coupled reference's.
    """
    columns = precomputed_columns(trainer)
    if not columns:
        return
    try:
        with eval_mode(reference_of(trainer)):
            found = reference_log_probs(trainer, _MOST_ROWS)
    except Exception as error:  # TRL's versions differ
        logging.getLogger("autorev").warning(
            "whether %s hold the coupled reference's log-probabilities could not be looked at (%s); they do if the "
            "model was converted before the trainer was made, and nothing of an earlier run was cached",
            ", ".join(columns),
            one_line(error),
        )
        return
    for name, values in zip(columns, found, strict=False):
        for row, value in zip(trainer.train_dataset, values, strict=False):
            if not abs(row[name] - value) <= _SAME * abs(value):
                raise ConversionError(
                    f"{name} was computed beforehand by another function than the policy's: {row[name]:.4f} in a row "
                    f"where the coupled reference has {value:.4f}. Convert the model, and a ref_model, before the "
                    "trainer is made; if an earlier run left its log-probabilities in the data set's cache, call "
                    "dataset.cleanup_cache_files(), or leave precompute_ref_log_probs out"
                )


def _tell_of_chance(trainer: Any, policy: nn.Module) -> None:
    """Couplings that are drawn for each call, where two calls are compared: the policy's and the reference's."""
    drawn = any(coupling.random for chain in chains_of(policy) for coupling in chain.couplings)
    if drawn and compares(trainer):
        logging.getLogger("autorev").warning(
            "%s compares the policy with a reference, and a coupling whose signs are drawn for each call (bdia) makes "
            "the two differ before anything was trained; convert with one that draws nothing, such as momentum",
            type(trainer).__name__,
        )


def _tell_of_servers(trainer: Any) -> None:
    """Samples that another program makes of the same weights."""
    servers = servers_of(trainer)
    if servers:
        logging.getLogger("autorev").warning(
            "%s generates with %s, which computes the plain function of the weights, while the policy is trained as "
            "the coupled one: the samples are off-policy by the difference of the two. Keep the correction for that "
            "(importance sampling) on and the coupling near the plain function (momentum with a small gamma), or "
            "generate with the model itself",
            type(trainer).__name__,
            ", ".join(servers),
        )
