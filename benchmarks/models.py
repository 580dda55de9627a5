"""Which models autorev converts, and whether it does so rightly: python -m benchmarks.models [PREFIX ...]

    python -m benchmarks.models --record benchmarks/models.jsonl > benchmarks/models_MACHINE_DATE.md
    python -m benchmarks.models timm/ torchvision/vit_b_16

Every model of `benchmarks.model_catalog` whose package is installed (`pip install -e ".[models]"`) runs in a process of
its own, within a time and a memory limit (Linux). With `--record FILE` a line of JSON is added for each model, and
models that have one are not run again. A Markdown table is printed at the end; progress is told on stderr.

What autorev finds is set beside `benchmarks.residual_adds`, which knows nothing of autorev: it looks at the autograd
graph of the plain model's own forward. Verified is what `autorev.verify` passes and what, with gamma = 0 and c = 1, has
the plain model's own gradients.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

import autorev
from autorev.conversion.convert import chains_of
from autorev.detection import detect_in
from autorev.losses import floating_outputs
from autorev.verification import compare, verify_call
from benchmarks.model_catalog import Built, absent, catalog, preloaded
from benchmarks.residual_adds import residual_chains
from tests.helpers.blocks import Storages, no_collection

Record = dict[str, Any]

SECONDS, BYTES = 60, 2 * 2**30
"""What a model may take: processor time, and memory beside what Python and torch take themselves."""
PATIENCE = 5
"""How much longer than its processor time a process may be there, on a busy machine."""
SAME = 1e-3
"""Relative difference of float32 gradients that only rounding explains."""


# -- one model, in a process of its own


def judged(built: Built) -> Record:
    """What becomes of one model; ends early where there is nothing more to try."""
    model, args, kwargs = _built(built)
    record: Record = {"adds": residual_chains(floating_outputs(_seen_by_autograd(model, args, kwargs)))}
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
    except Exception as error:  # what must not happen
        record["crashed"] = _told("raw exception", error)
    return record


def _built(built: Built) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """In train mode, from the same random numbers; weights that begin at nearly zero would hide the branch."""
    torch.manual_seed(0)
    random.seed(0)
    model, args, kwargs = built()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.abs().max() < SAME:
                nn.init.normal_(parameter, std=0.02)
    return model.train(), args, kwargs


def _seen_by_autograd(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """What the model returns, with its inputs in the graph."""

    def seen(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.detach().requires_grad_().clone() if floating else leaf

    args, kwargs = tree_map(seen, (args, kwargs))
    return model(*args, **kwargs)


def _loss(returned: Any) -> torch.Tensor:
    return torch.stack([leaf.square().mean() for leaf in floating_outputs(returned) if leaf.requires_grad]).sum()


def _gradients(model: nn.Module, args: Any, kwargs: Any) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(1)
    random.seed(1)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
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


def _child(name: str, sender: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    own = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (own + BYTES, own + BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    try:
        record = judged(catalog()[name])
    except Exception as error:  # a line of the record, not the end of the sweep
        record = {"crashed": _told("not built", error)}
    sender.send(record)


def _told(where: str, error: Exception) -> str:
    text = f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
    full = isinstance(error, MemoryError) or "allocate memory" in text
    return f"limit: more than {BYTES / 2**30:.0f} GiB" if full else text


# -- the sweep


def sweep(names: Iterable[str], path: Path | None = None) -> list[Record]:
    """The records of `names`, those included that the file at `path` had."""
    done = _recorded(path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.model_catalog", "tests.helpers.blocks", *preloaded()])
    for name in [name for name in names if name not in done]:
        began = time.monotonic()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, sender))
        process.start()
        sender.close()
        record: Record = {"crashed": f"limit: more than {SECONDS} s"}
        try:
            if receiver.poll(PATIENCE * SECONDS):
                record = receiver.recv()
        except EOFError:
            process.join()
            if process.exitcode != -signal.SIGXCPU:
                record = {"crashed": f"the process ended with {process.exitcode}"}
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
        if record["idle"]:
            return "nothing rebuilt"
        repeatable = record.get("plain again", 0) < SAME
        other = repeatable and record.get("without velocity", 0) >= SAME
        return "WRONG" if other or not record["verified"] else "verified"
    return f"not converted: {record.get('refused', '')}"


def main() -> None:
    """Run what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="of the names of models; default: all")
    parser.add_argument("--record", type=Path, help="a file of JSON lines that is read and added to")
    parser.add_argument("--table", action="store_true", help="print what the record holds, and run nothing")
    given = parser.parse_args()
    for reason in absent():
        print(reason, file=sys.stderr)
    names = [name for name in catalog() if name.startswith(tuple(given.prefixes or ("",)))]
    recorded = _recorded(given.record)
    records = [recorded[name] for name in names if name in recorded] if given.table else sweep(names, given.record)
    print("\n".join([*markdown(records), *_not_run(names, records)]))


def _recorded(path: Path | None) -> dict[str, Record]:
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def _not_run(names: list[str], records: list[Record]) -> Iterator[str]:
    left = Counter(name.partition("/")[0] for name in set(names) - {record["name"] for record in records})
    yield f"\n## Not run ({left.total()})\n"
    yield from (f"- {group}: {count}" for group, count in sorted(left.items()))
    yield from (f"- {reason}" for reason in absent())


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
    missed = [r for r in records if (r.get("adds") and verdict(r) != "verified") or verdict(r) == "WRONG"]
    yield from _listed(f"Missed, with two or more usable adds ({len(missed)})", missed, _reason)
    partly = [r for r in records if verdict(r) == "verified" and r["converted"] < sum(r["adds"])]
    title = f"Fewer steps than adds ({len(partly)}; a step of several streams is one)"
    yield from _listed(title, partly, lambda r: f"{r['converted']} converted; {_reason(r)}")
    failed = [record for record in records if "crashed" in record]
    yield from _listed(f"Not judged ({len(failed)})", failed, lambda record: record["crashed"])


def _reason(record: Record) -> str:
    if verdict(record) == "WRONG":
        return f"{verdict(record)}: {record['error']:.2g}, without velocity {record.get('without velocity', 0):.2g}"
    if "crashed" in record or record.get("idle"):
        return verdict(record)
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
