"""`autorev.convert` and `autorev.revert`: the only place that touches the user's model.

Everything that can fail on the arguments or on the model fails before the first block is changed; the one thing that
has to run the converted model, the probe that chooses the grid, undoes the conversion when it fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from autorev.chunked_loss import chunk_loss
from autorev.conversion import config_entry
from autorev.conversion.asked import asked, check_patterns
from autorev.conversion.baseline import baseline
from autorev.conversion.checkpointing import (
    SWITCH_OFF,
    checkpoints_itself,
    intercept_checkpointing_enable,
    restore_checkpointing_enable,
)
from autorev.conversion.compiling import compile_branches, compile_whole, leave_uncompiled, why_no_graph
from autorev.conversion.estimate import Estimate
from autorev.conversion.notes import left_to_do, notes_on, stored_beside, without_kernel
from autorev.conversion.probe import choose_grids
from autorev.conversion.select import Chosen, choose, patterns
from autorev.conversion.summary import Conversion, ConvertedChain
from autorev.conversion.trained_by import Passes, notice_trainers, stop_noticing
from autorev.detection import call_of
from autorev.devices import check_devices
from autorev.engine.chain import ReversibleChain
from autorev.engine.host_store import HostStore
from autorev.errors import ConversionError
from autorev.methods import Method, Numbers
from autorev.plan import Plan, method_of
from autorev.rewrite.block_forward import ReversibleForward
from autorev.rewrite.built import BuiltChain
from autorev.rewrite.checkpointed_forward import CheckpointedForward
from autorev.rewrite.loop_forward import LoopForward, TracedLoop, install_loops
from autorev.rewrite.replacement import replacements_of
from autorev.rewrite.tiled_forward import Tiled, blocks_run_twice, tiled_forwards
from autorev.workload import Call


def convert(
    model: nn.Module,
    batch: Any = None,
    *,
    method: str | Method = "momentum",
    gamma: Numbers = None,
    c: Numbers = None,
    arithmetic: str | None = None,
    granularity: str | None = None,
    keep_last: int | Literal["auto"] | None = None,
    fraction_bits: int | Mapping[str, int] | None = None,
    tile: int | Literal["auto"] | None = None,
    keep: str | None = None,
    host: str | None = None,
    compile: str | None = None,
    blocks: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Conversion:
    """Make the residual chains of `model` reversible, in place.

    The class, the module tree, the `state_dict` keys, hooks and the optimiser's parameters stay; `revert` undoes it.
    A `transformers` model needs no batch.

    Args:
        batch: what the model is called with in the probe that chooses the grid: a dict of keyword arguments, a tuple of
            positional ones, or one tensor (`autorev.detection.call_of`). A plan of `autorev.fit` says how to train, and
            needs a `transformers` model; its loss in chunks is put in place, too, and a note names its optimiser.
        method: momentum, leapfrog, midpoint, midpoint_a, bdia, hamiltonian or revnet, or checkpoint, offload or sac
            around the blocks as they are, or plain with tiles; with options
            (`momentum:k=2,keep_last=4`) as `autorev.methods` spells them. The arguments that follow are these options,
            and take what no text says: numbers by block, grids by chain.
        gamma: for momentum: a number n / 2^k, or a dict from block patterns to numbers. Default 1/8.
        c: the factor of the branches, likewise. Default: the coupling's own (for momentum 1 - gamma / 2, and 1
            in the first and the last step).
        arithmetic: "exact" (int32 fixed point and side bits: reconstruction without any error; default) or "float".
        granularity: "block" (default), or "sublayer" for a step per residual add.
        keep_last: number of blocks at the end of each chain whose activations are stored instead of recomputed. "auto"
            (default): the last one, where that does not raise the peak of a training step of the batch (its
            proportions count, not its size).
        fraction_bits: the fixed-point grid is 2^-fraction_bits, for all chains or by chain name; default: chosen per
            chain by a probe of the batch.
        tile: positions at a time that the parts of a block run on which act on each position alone (an MLP, as a rule),
            forward and backward; "auto": as many as keep little beside the block's input. Default: all at once.
        keep: "attention": what its kernel returns is kept, a hidden state a block, and not computed again in backward;
            "attention:8": in the last 8 of the blocks of each chain that run twice.
        host: what waits for backward in the host's memory (pinned, where the system pins any): "side_bits" of
            couplings, "attention" that is kept, "inputs" of offload, or several joined by "+"; "side_bits:8": of the
            first 8 blocks of each chain.
        compile: "blocks": the branches are compiled (`torch.compile`), and the coupling runs around them; "graph":
            calls of the model that record gradients are compiled whole, loop and coupling included, and keep two
            streams and side bits alone. Where that cannot be, blocks are compiled, and `Conversion.why_not_graph` says
            why.
        blocks: patterns of the blocks to convert (`model.layers.*`); default: all that are eligible.
        exclude: patterns of blocks to leave out.

    Raises:
        ConversionError: nothing can be converted that way; says why, and the model is as it was.
        CaptureError: the model cannot be called on the batch.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"autorev.convert needs a torch.nn.Module, and got a {type(model).__name__}")
    blocks, exclude = patterns(blocks), patterns(exclude)
    planned = batch if isinstance(batch, Plan) else None
    if planned is not None:
        batch, method = None, method_of(planned, model)
    how = asked(
        method,
        gamma=gamma,
        c=c,
        arithmetic=arithmetic,
        granularity=granularity,
        keep_last=keep_last,
        fraction_bits=fraction_bits,
        tile=tile,
        keep=keep,
        host=host,
        compile=compile,
        planned=planned is not None,
    )
    if any(replacements_of(model)):
        raise ConversionError(
            f"{type(model).__name__} is converted already; call autorev.revert(model) before converting it anew"
        )
    if checkpoints_itself(model):
        raise ConversionError(
            f"{type(model).__name__} checkpoints its blocks, which reversible ones make superfluous; first {SWITCH_OFF}"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ConversionError(
            f"the weights of {type(model).__name__} were made under torch.inference_mode, and such tensors cannot be "
            "trained; build or load the model outside of it"
        )
    if how.reversible or how.tile is not None or how.keep is not None or how.name == "offload":
        check_devices(model.named_parameters())
    args, kwargs = call_of(model, batch, "convert")
    chosen = choose(model, args, kwargs, blocks, exclude)
    check_patterns(how, chosen)
    if not chosen.chains and (how.reversible or not chosen.others):
        raise ConversionError(_nothing(model, chosen))
    put_in_place = partial(_put_in_place, model, batch, chosen, how, planned, call=(args, kwargs))
    try:
        return put_in_place(patterns=(blocks, exclude))
    except ConversionError:
        if blocks is not None:
            raise
        unfit = _unfit(model, chosen, how, (args, kwargs))
        if not 0 < len(unfit) < len(chosen.chains):
            raise
        chosen.leave_out(unfit)
    return put_in_place(patterns=(blocks, exclude))


def _put_in_place(
    model: nn.Module,
    batch: Any,
    chosen: Chosen,
    how: Method,
    planned: Plan | None,
    *,
    call: Call,
    patterns: tuple[list[str] | None, list[str] | None],
    why_not_graph: str | None = None,
) -> Conversion:
    chunked, how = how.loss == "chunked", replace(how, loss="full")
    every = [finding for chain in chosen.chains for finding in chain] or chosen.others
    estimate = Estimate(chosen.twin, call, chosen.chains, chosen.others)
    stored = estimate.stored(how) if how.reversible else None
    once = [how.stored_of(number) for number in range(len(chosen.chains))] if stored is None else stored.blocks
    twice = blocks_run_twice(how, chosen.chains, once, chosen.others)
    as_long = batch is not None
    tiled = tiled_forwards(model, every, how.tile, how.in_pieces, as_long, twice) if how.tile is not None else Tiled()
    if stored is None:
        return _as_baseline(model, chosen, how, tiled, estimate, planned, chunked)
    built: list[BuiltChain] = []
    store = HostStore()
    for chain, kept in zip(chosen.chains, stored.blocks, strict=True):
        built.append(BuiltChain(model, chain, kept, how, {item.chain.name for item in built}, store))
    names = list(model.state_dict())
    for forward in tiled.forwards:
        forward.install()
    _install(model, built)
    try:
        notes = choose_grids(model, [item.chain for item in built], how.fraction_bits, *call)
        if chunked:
            chunk_loss(model)
        if how.compile == "graph":
            why_not_graph = why_no_graph(model, built, call)
        if how.compile == "graph" and why_not_graph is None:
            compile_whole(model)
        elif how.compile == "blocks":
            compile_branches(forwards_of(model))
        notes += without_kernel(every[0]) if how.keep is not None else []
        notes += stored_beside(chosen.chains, how.in_pieces)
        notes += notes_on(model, [item.chain for item in built], forwards_of(model))
        if list(model.state_dict()) != names:
            raise ConversionError("the conversion changed the state_dict's keys; please report the model")
        intercept_checkpointing_enable(model)
        notice_trainers(model)
        config_entry.write(model, how, *patterns, {item.chain.name: item.chain for item in built})
    except BaseException:
        revert(model)
        raise
    if how.compile == "graph" and why_not_graph is not None:
        revert(model)
        how = replace(how, compile="blocks", loss="chunked" if chunked else "full")
        again = partial(_put_in_place, model, batch, chosen, how, planned, call=call, patterns=patterns)
        return again(why_not_graph=why_not_graph)
    return Conversion(
        coupling=how.name,
        arithmetic=how.arithmetic,
        granularity=how.granularity,
        chains=tuple(ConvertedChain.of(item, why) for item, why in zip(built, stored.why, strict=True)),
        tile=how.tile,
        tiled=tiled.paths,
        not_tiled=tiled.untiled,
        compiled=how.compile,
        why_not_graph=why_not_graph,
        not_converted=tuple(chosen.left_out),
        notes=(*notes, *chosen.idle, *left_to_do(planned)),
        simulated=partial(estimate.memory, how, stored.blocks),
    )


def _install(model: nn.Module, built: list[BuiltChain]) -> None:
    for item in built:
        item.install()
    kind = TracedLoop if any(item.traced for item in built) else LoopForward
    install_loops(model, [(item.findings, item.chain) for item in built], Passes(), kind)


def _unfit(model: nn.Module, chosen: Chosen, how: Method, call: Call) -> dict[int, str]:
    """Chains that cannot be built or run, each by itself and with the coupling's usual numbers; and why."""
    usual = replace(Method(how.name), granularity=how.granularity)
    found: dict[int, str] = {}
    for number, chain in enumerate(chosen.chains if how.reversible else ()):
        try:
            item = BuiltChain(model, chain, 0, usual, set(), HostStore())
            _install(model, [item])
            choose_grids(model, [item.chain], None, *call)
        except ConversionError as error:
            found[number] = str(error)
        finally:
            revert(model)
    return found


def _as_baseline(
    model: nn.Module, chosen: Chosen, how: Method, tiled: Tiled, estimate: Estimate, planned: Plan | None, chunked: bool
) -> Conversion:
    found = baseline(model, chosen, how, planned=planned is not None)
    if chunked:
        chunk_loss(model)
    for forward in (*tiled.forwards, *found.forwards):
        forward.install()
    return Conversion(
        coupling=how.name,
        arithmetic="",
        granularity="block",
        chains=(),
        not_converted=tuple(chosen.left_out),
        checkpointed=found.paths,
        tile=how.tile,
        tiled=tiled.paths,
        not_tiled=tiled.untiled,
        notes=(*chosen.idle, *left_to_do(planned)),
        simulated=partial(estimate.memory, how, ()),
    )


def revert(model: nn.Module) -> int:
    """Restore every converted block of `model`; returns how many there were. The weights stay as they are.

    A block whose forward another library has wrapped since is restored within the wrapper.
    """
    found = list(replacements_of(model))
    for replacement in reversed(found):
        replacement.remove()
    leave_uncompiled(model)
    restore_checkpointing_enable(model)
    stop_noticing(model)
    config_entry.remove(model)
    return sum(isinstance(replacement, ReversibleForward | CheckpointedForward) for replacement in found)


def drift(model: nn.Module) -> dict[str, float]:
    """By chain, what the integrity check of the last backward pass found: 0.0 in exact arithmetic; in float arithmetic
    the largest leftover of the first partner stream, relative to the stream.

    Where a new chain started within the forward pass, each piece has an entry. Chains whose last backward pass did
    not reach their beginning are missing: of them nothing is known.
    """
    return {label: drift for chain in chains_of(model) for label, drift in chain.drifts.items()}


def chains_of(model: nn.Module) -> list[ReversibleChain]:
    """The converted chains of `model`, each once."""
    return list({id(forward.chain): forward.chain for forward in forwards_of(model)}.values())


def forwards_of(model: nn.Module) -> Iterable[ReversibleForward]:
    """The replaced forwards of `model`'s converted blocks."""
    return (found for found in replacements_of(model) if isinstance(found, ReversibleForward))


def _nothing(model: nn.Module, chosen: Chosen) -> str:
    text = f"no chain of blocks of {type(model).__name__} can be converted"
    if not chosen.left_out:
        return f"{text}: {chosen.nearest or 'it has no residual block'}"
    path, reason = chosen.left_out[0]
    more = f" (and {len(chosen.left_out) - 1} more; autorev.analyze lists them)" if len(chosen.left_out) > 1 else ""
    return f"{text}: {path}: {reason}{more}"
