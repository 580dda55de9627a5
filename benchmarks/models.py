"""Which models autorev converts, and whether it does so rightly: python -m benchmarks.models [PREFIX ...]

    python -m benchmarks.models --record benchmarks/models.jsonl > benchmarks/models_MACHINE_DATE.md
    python -m benchmarks.models timm/ torchvision/vit_b_16

Every model of `benchmarks.model_catalog` whose package is installed (`pip install -e ".[models]"`) runs in a process of
its own, within a time and a memory limit. With `--record FILE` a line of JSON is added for each model, and models that
have one are not run again. A Markdown table is printed at the end; progress is told on stderr.

What autorev finds is set beside `residual_chains`, which knows nothing of autorev: it looks at the autograd graph of the
plain model's own forward. Verified is what `autorev.verify` passes and what, with gamma = 0 and c = 1, has the plain
model's own gradients.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autorev
from autorev.conversion.convert import chains_of
from autorev.detection import detect_in
from autorev.losses import floating_outputs
from autorev.verification import compare, verify_call
from benchmarks.model_catalog import Built, absent, catalog, preloaded
from tests.helpers.blocks import Storages, no_collection

Record = dict[str, Any]
Edge = tuple[Any, int]
"""A node of the autograd graph and which of its forward's results is meant."""

SECONDS, BYTES = 60, 2 * 2**30
"""What a model may take, beside what Python and torch take themselves."""
SAME = 1e-3
"""Relative difference of float32 gradients that only rounding explains."""

ONTO_THE_FIRST = {f"{name}Backward0" for name in ("Sub", "Addcmul", "Addmm", "Baddbmm", "IndexAdd", "ScatterAdd")}
VIEWS = {
    f"{name}Backward{version}"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Alias", "Clone", "ToCopy")
    + ("Squeeze", "Unsqueeze")
    for version in "012"
}


# -- the independent finder


def residual_chains(outputs: Iterable[torch.Tensor]) -> list[int]:
    """How many adds x + f(x) follow each other on every stream of two or more, longest first.

    An add is one where a tensor x of the sum's shape is added to what was computed from x. It follows another where its
    x is, up to views, the other's sum. Further terms (x + f(x) + g(x)) belong to the same add.
    """
    order = list(_inputs_first([tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]))
    bits: dict[Edge, int] = {}
    for node in order:
        for skip, _ in _sums(node):
            bits.setdefault(skip, 1 << len(bits))
    reach: dict[Any, int] = {}  # of each node, the possible streams that it was computed from
    for node in order:
        reach[node] = 0
        for edge in _edges(node):
            reach[node] |= reach[edge[0]] | bits.get(edge, 0)

    added_to: dict[Any, Edge] = {}
    depth: dict[Any, int] = {}
    first: dict[Any, Any] = {}
    for node in order:
        for skip, branches in _sums(node):
            before = skip[0]
            seen = 0
            for branch in branches:
                seen |= reach[branch[0]] | bits.get(branch, 0)
            if seen & bits[skip]:
                added_to[node], depth[node] = skip, depth.get(before, 0) + 1
            elif before in added_to and seen & bits[added_to[before]]:
                added_to[node], depth[node] = added_to[before], depth[before]
            else:
                continue
            first[node] = first.get(before, node)
            break
    longest: Counter[Any] = Counter()
    for node, length in depth.items():
        longest[first[node]] = max(longest[first[node]], length)
    return sorted((length for length in longest.values() if length > 1), reverse=True)


def _edges(node: Any) -> list[Edge]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def _inputs_first(roots: list[Any]) -> Iterator[Any]:
    seen: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(before, False) for before, _ in _edges(node) if before not in seen]


def _sums(node: Any) -> Iterator[tuple[Edge, list[Edge]]]:
    """(what may be the stream, the other terms) of a node that adds."""
    operands = node.next_functions
    if node.name() == "AddBackward0":
        choices = (0, 1) if node._saved_alpha == 1 else (0,)
    elif node.name() in ONTO_THE_FIRST:
        choices = (0,)
    else:
        return
    for choice in choices:
        others = [edge for place, edge in enumerate(operands) if place != choice and edge[0] is not None]
        skip = operands[choice]
        if skip[0] is not None and others and _kind(skip) == _kind((node, 0)) and _kind(skip)[0]:
            yield _before_views(skip), others


def _kind(edge: Edge) -> tuple[tuple[int, ...], Any]:
    meta = edge[0]._input_metadata[edge[1]]
    return tuple(meta.shape), meta.dtype


def _before_views(edge: Edge) -> Edge:
    while True:
        node = edge[0]
        one = node.name() in ("MulBackward0", "DivBackward0") and node.next_functions[1][0] is None
        times_one = one and node._saved_other is not None and node._saved_other.numel() == 1 and node._saved_other == 1
        if not (node.name() in VIEWS or times_one) or node.next_functions[0][0] is None:
            return edge
        edge = node.next_functions[0]


# -- one model, in a process of its own


def judged(built: Built) -> Record:
    """What becomes of one model; ends early where there is nothing more to try."""
    model, args, kwargs = _built(built)
    outputs = floating_outputs(model(*args, **kwargs))
    record: Record = {"adds": residual_chains(outputs)}
    del outputs
    model, args, kwargs = _built(built)
    plain = _gradients(model, args, kwargs)
    kept = _kept(model, args, kwargs)
    try:
        model, args, kwargs = _built(built)
        detected, _ = detect_in(model, args, kwargs)
        steps = {finding.path: len(finding.steps) for chain in detected.chains for finding in chain}
        record["found"] = sum(len(finding.steps) for chain in detected.chains for finding in chain)
        record["reasons"] = [
            *dict.fromkeys(str(obstacle) for finding in detected.refused for obstacle in finding.obstacles),
            *([detected.nearest] if detected.nearest else []),
        ][:3]
        conversion = autorev.convert(model, (args, kwargs), keep_last=0)
        paths = [path for chain in chains_of(model) for path in chain.paths]
        record["converted"] = sum(steps.get(path, 1) for path in paths)
        record["reasons"] += [f"{path}: {reason}" for path, reason in conversion.not_converted][:3]
        found = verify_call(model, args, kwargs)
        record |= {"verified": found.passed, "error": found.gradient_error, "idle": not all(found.rebuilt.values())}
        record["kept"] = _kept(model, args, kwargs) / kept
        record["without velocity"] = _without_velocity(built, plain)
        if record["without velocity"] >= SAME:
            record["plain again"] = compare(_gradients(*_built(built)), plain).error
    except autorev.AutorevError as error:
        record["refused"] = str(error)[:600]
    return record


def _built(built: Built) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """In train mode, from the same random numbers each time; weights that begin at nearly zero would hide the branch."""
    torch.manual_seed(0)
    random.seed(0)
    model, args, kwargs = built()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.abs().max() < SAME:
                nn.init.normal_(parameter, std=0.02)
    return model.train(), args, kwargs


def _loss(returned: Any) -> torch.Tensor:
    return torch.stack([leaf.square().mean() for leaf in floating_outputs(returned) if leaf.requires_grad]).sum()


def _gradients(model: nn.Module, args: Any, kwargs: Any) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(1)
    random.seed(1)
    parameters = dict(model.named_parameters())
    loss = _loss(model(*args, **kwargs))
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()], allow_unused=True), strict=True))


def _kept(model: nn.Module, args: Any, kwargs: Any) -> int:
    """Bytes alive between forward and backward, the output's included; parameters are not."""
    model(*args, **kwargs)
    with no_collection(), Storages() as storages:
        out = model(*args, **kwargs)
        kept = sum(storages.alive())
        del out
    return kept


def _without_velocity(built: Built, plain: dict[str, torch.Tensor | None]) -> float:
    """Relative difference of the gradients from the plain model's, where a step is the residual sum itself."""
    model, args, kwargs = _built(built)
    own = [g for module in model.modules() for g in vars(module).values() if isinstance(g, torch.Generator)]
    states = [generator.get_state() for generator in own]
    autorev.convert(model, (args, kwargs), gamma=0, c=1, arithmetic="float")
    for generator, state in zip(own, states, strict=True):
        generator.set_state(state)
    difference = compare(_gradients(model, args, kwargs), plain)
    return float("inf") if difference.missing else difference.error


def _child(name: str, bytes_: int, sender: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    own = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (own + bytes_, own + bytes_))
    try:
        record = judged(catalog()[name])
    except Exception as error:  # a line of the record, not the end of the sweep
        record = {"crashed": _told(error)}
    sender.send(record)


def _told(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"limit: more than {BYTES / 2**30:.0f} GiB"
    called = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return f"{'not built' if '_built' in called or 'convert' not in called else 'raw exception'}: {text}"


# -- the sweep


def sweep(names: Iterable[str], path: Path | None, seconds: float = SECONDS, bytes_: int = BYTES) -> list[Record]:
    """The records of `names`, those included that the file at `path` had."""
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
    done = {record["name"]: record for record in map(json.loads, lines)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.model_catalog", "tests.helpers.blocks", *preloaded()])
    for name in [name for name in names if name not in done]:
        began = time.monotonic()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, bytes_, sender))
        process.start()
        sender.close()
        record: Record = {"crashed": f"limit: more than {seconds:.0f} s"}
        try:
            if receiver.poll(seconds):
                record = receiver.recv()
        except EOFError:
            record = {"crashed": "limit: the process was killed"}
        process.kill()
        process.join()
        done[name] = {"name": name, **record, "seconds": round(time.monotonic() - began, 1)}
        print(f"{name}: {verdict(done[name])} ({done[name]['seconds']} s)", file=sys.stderr, flush=True)
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[name]) + "\n")
    return [done[name] for name in names]


def verdict(record: Record) -> str:
    """What became of a model, in one word or with its reason."""
    if "crashed" in record:
        return str(record["crashed"])
    if record.get("converted") and "verified" in record:
        repeatable = record.get("plain again", 0) < SAME
        if not record["verified"] and not record["idle"] or repeatable and record.get("without velocity", 0) >= SAME:
            return "WRONG"
        return "nothing rebuilt" if record["idle"] else "verified"
    return f"not converted: {record.get('refused', '')}"


def main() -> None:
    """Run what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="of the names of models; default: all")
    parser.add_argument("--record", type=Path, help="a file of JSON lines that is read and added to")
    given = parser.parse_args()
    for reason in absent():
        print(reason, file=sys.stderr)
    names = [name for name in catalog() if name.startswith(tuple(given.prefixes or ("",)))]
    print("\n".join(markdown(sweep(names, given.record))))


def markdown(records: list[Record]) -> Iterator[str]:
    """A table by group, then every miss by name."""
    groups = dict.fromkeys(record["name"].partition("/")[0] for record in records)
    yield "| models | tried | built | two or more usable adds | found | converted | verified | wrong | kept / plain |"
    yield "|---|" + "---:|" * 8
    for group in [*groups, "all"]:
        own = [record for record in records if group in (record["name"].partition("/")[0], "all")]
        usable = [record for record in own if record.get("adds")]
        converted = [record for record in usable if record.get("converted")]
        states = Counter(map(verdict, own))
        kept = [record["kept"] for record in converted if "kept" in record]
        cells = [len(own), sum("adds" in record for record in own), len(usable)]
        cells += [sum(bool(record.get("found")) for record in usable), len(converted)]
        cells += [sum(verdict(record) == "verified" for record in converted), states["WRONG"]]
        yield f"| {group} | {' | '.join(map(str, cells))} | {f'{statistics.median(kept):.2f}' if kept else '-'} |"
    missed = [record for record in records if record.get("adds") and verdict(record) != "verified"]
    yield from _listed(f"Missed, with two or more usable adds ({len(missed)})", missed, _reason)
    partly = [r for r in records if verdict(r) == "verified" and r["converted"] < sum(r["adds"])]
    yield from _listed(
        f"Converted in part ({len(partly)})", partly, lambda r: f"{r['converted']} converted; {_reason(r)}"
    )
    failed = [record for record in records if "crashed" in record]
    yield from _listed(f"Not judged ({len(failed)})", failed, lambda record: record["crashed"])


def _reason(record: Record) -> str:
    if verdict(record) == "WRONG":
        return f"{verdict(record)}: {record['error']:.2g}, without velocity {record.get('without velocity', 0):.2g}"
    return "; ".join(record.get("reasons", [])[:2]) or str(record.get("refused", ""))


def _listed(title: str, records: list[Record], reason: Any) -> Iterator[str]:
    yield f"\n## {title}\n"
    if records:
        yield "| model | adds by the finder | reason |\n|---|---|---|"
    for record in records:
        adds = " + ".join(map(str, record.get("adds", []))) or "-"
        yield f"| {record['name']} | {adds} | {' '.join(reason(record).split()).replace('|', '/')} |"


if __name__ == "__main__":
    main()
