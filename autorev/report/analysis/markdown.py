"""An analysis as Markdown with GitHub's tables, for an issue, a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from autorev.analysis import Analysis, Block
from autorev.format import (
    NOTHING,
    clean,
    format_bytes,
    format_flops,
    format_integer,
    format_seconds,
    format_share,
    plural,
    sentence,
)
from autorev.report.analysis.rows import MethodRow, all_blocks, fits, identical_runs, method_rows, reversible_count
from autorev.words import device_facts, headline, model_facts, setting_facts


def render_markdown(analysis: Analysis) -> str:
    """The recommendation, the methods, the chains, and the refusals with their reasons."""
    parts = [part for section in _sections(analysis) for part in section]
    return "\n\n".join(parts) + "\n"


def _sections(analysis: Analysis) -> Iterator[Iterator[str]]:
    yield _heading(analysis)
    if analysis.recommendation:
        yield _recommendation(analysis)
    if analysis.predictions:
        yield _methods(analysis)
    yield _blocks(analysis)
    if analysis.notes:
        yield iter(["## Notes", "\n".join(f"- {literal(sentence(note))}" for note in analysis.notes)])
    yield _origin(analysis)


def _heading(analysis: Analysis) -> Iterator[str]:
    yield f"# {literal(analysis.model.name)}"
    yield literal(", ".join(model_facts(analysis.model)) + ".")
    if analysis.setting:
        facts = [f"{name.lower()} {value}" for name, value in setting_facts(analysis.setting).items()]
        if device := analysis.device:
            facts.append(device_facts(device))
        yield "One training step: " + literal(", ".join(facts)) + "."


def _recommendation(analysis: Analysis) -> Iterator[str]:
    assert analysis.recommendation
    yield f"## Recommendation: {literal(headline(analysis.recommendation.method))}"
    yield literal(sentence(analysis.recommendation.why))
    if analysis.recommendation.advice:
        yield "\n".join(f"{i}. {literal(sentence(step))}" for i, step in enumerate(analysis.recommendation.advice, 1))


def _methods(analysis: Analysis) -> Iterator[str]:
    yield "## Memory by method"
    heads = (
        "method,peak,phase,of plain,of checkpoint,kept after forward,work,roofline time,"
        "largest batch,longest sequence,keeps the pretrained function"
    )
    rows = [_method_cells(row, analysis) for row in method_rows(analysis)]
    yield table(heads.split(","), rows, right=(1, *range(3, 10)))
    yield "Kept after forward: between forward and backward. Roofline time: a lower bound."


def _method_cells(row: MethodRow, analysis: Analysis) -> list[str]:
    prediction, reach = row.prediction, row.reach
    peak = format_bytes(prediction.peak_bytes)
    rivals = (analysis.prediction("plain"), analysis.prediction("checkpoint"))
    batch = reach.largest_batch if reach else None
    sequence = reach.longest_sequence if reach else None
    return [
        literal(row.label),
        peak if fits(row, analysis) else f"**{peak}, does not fit**",
        literal(prediction.phase),
        *(format_share(prediction.peak_bytes, rival.peak_bytes if rival else None) for rival in rivals),
        format_bytes(prediction.kept_bytes),
        format_flops(prediction.step_flops),
        format_seconds(prediction.step_seconds),
        NOTHING if batch is None else format_integer(batch),
        NOTHING if sequence is None else format_integer(sequence),
        "yes" if prediction.preserves_function else "no",
    ]


def _blocks(analysis: Analysis) -> Iterator[str]:
    yield "## Blocks"
    count = plural(len(all_blocks(analysis)), "block")
    yield f"{reversible_count(analysis)} of {count} can be made reversible."
    rows = [
        _block_cells(chain.name, run.label, run.blocks)
        for chain in analysis.chains
        for run in identical_runs(chain.blocks)
    ]
    rows += [_block_cells("", run.label, run.blocks) for run in identical_runs(analysis.refused)]
    yield table(["chain", "blocks", "count", "class", "steps", "verdict", "reasons"], rows, right=[2])


def _block_cells(chain: str, label: str, blocks: tuple[Block, ...]) -> list[str]:
    first = blocks[0]
    return [
        code(chain) if chain else NOTHING,
        code(label),
        str(len(blocks)),
        code(first.class_name),
        literal("; ".join(f"{step.kind} ({step.source})" for step in first.steps)) or NOTHING,
        first.verdict.value,
        "<br>".join(literal(reason) for reason in first.reasons) or NOTHING,
    ]


def _origin(analysis: Analysis) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in analysis.versions.items())
    source = "couplings after [arXiv 2512.02056](https://arxiv.org/abs/2512.02056)"
    yield f"Made with {literal(versions)}; {source}." if versions else f"Reversible {source}."


def table(heads: list[str], rows: list[list[str]], right: Iterable[int]) -> str:
    """A table of cells that are Markdown already; the columns `right` are aligned to the right."""
    marks = ["---:" if column in right else "---" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, marks, *rows])


def literal(text: str) -> str:
    """`text` with what Markdown or HTML would read in it made literal."""
    escaped = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", escaped)


def code(text: str) -> str:
    """`text` as code in a cell: only a backtick and a bar could end it early."""
    return "`" + clean(text).replace("`", "'").replace("|", "\\|") + "`"
