"""An analysis as Markdown with GitHub's tables, for an issue, a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from autorev.analysis import Analysis, Block
from autorev.report.format import (
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
from autorev.report.rows import StrategyRow, all_blocks, fits, identical_runs, reversible_count, strategy_rows
from autorev.report.words import headline, model_facts, setting_facts


def render_markdown(analysis: Analysis) -> str:
    """The recommendation, the strategies, the chains, and the refusals with their reasons."""
    parts = [part for section in _sections(analysis) for part in section]
    return "\n\n".join(parts) + "\n"


def _sections(analysis: Analysis) -> Iterator[Iterator[str]]:
    yield _heading(analysis)
    if analysis.recommendation:
        yield _recommendation(analysis)
    if analysis.predictions:
        yield _strategies(analysis)
    yield _blocks(analysis)
    if analysis.notes:
        yield iter(["## Notes", "\n".join(f"- {_text(sentence(note))}" for note in analysis.notes)])
    yield _origin(analysis)


def _heading(analysis: Analysis) -> Iterator[str]:
    yield f"# {_text(analysis.model.name)}"
    yield _text(", ".join(model_facts(analysis.model)) + ".")
    if analysis.setting:
        facts = [f"{name.lower()} {value}" for name, value in setting_facts(analysis.setting).items()]
        if device := analysis.device:
            facts.append(f"{device.title} ({format_bytes(device.memory_bytes)})")
        yield "One training step: " + _text(", ".join(facts)) + "."


def _recommendation(analysis: Analysis) -> Iterator[str]:
    assert analysis.recommendation
    yield f"## Recommendation: {_text(headline(analysis.recommendation.strategy))}"
    yield _text(sentence(analysis.recommendation.why))
    if analysis.recommendation.advice:
        yield "\n".join(f"{i}. {_text(sentence(step))}" for i, step in enumerate(analysis.recommendation.advice, 1))


def _strategies(analysis: Analysis) -> Iterator[str]:
    yield "## Memory by strategy"
    heads = (
        "strategy,peak,phase,of plain,of checkpoint,kept after forward,work,roofline time,"
        "largest batch,longest sequence,keeps the pretrained function"
    )
    rows = [_strategy_cells(row, analysis) for row in strategy_rows(analysis)]
    yield _table(heads.split(","), rows, right=(1, *range(3, 10)))
    yield "Kept after forward: between forward and backward. Roofline time: a lower bound."


def _strategy_cells(row: StrategyRow, analysis: Analysis) -> list[str]:
    prediction, reach = row.prediction, row.reach
    peak = format_bytes(prediction.peak_bytes)
    rivals = (analysis.prediction("plain"), analysis.prediction("checkpoint"))
    batch = reach.largest_batch if reach else None
    sequence = reach.longest_sequence if reach else None
    return [
        _text(row.label),
        peak if fits(row, analysis) else f"**{peak}, does not fit**",
        _text(prediction.phase),
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
    yield _table(["chain", "blocks", "count", "class", "steps", "verdict", "reasons"], rows, right=[2])


def _block_cells(chain: str, label: str, blocks: tuple[Block, ...]) -> list[str]:
    first = blocks[0]
    return [
        _code(chain) if chain else NOTHING,
        _code(label),
        str(len(blocks)),
        _code(first.class_name),
        _text("; ".join(f"{step.kind} ({step.source})" for step in first.steps)) or NOTHING,
        first.verdict.value,
        "<br>".join(_text(reason) for reason in first.reasons) or NOTHING,
    ]


def _origin(analysis: Analysis) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in analysis.versions.items())
    source = "couplings after [arXiv 2512.02056](https://arxiv.org/abs/2512.02056)"
    yield f"Made with {_text(versions)}; {source}." if versions else f"Reversible {source}."


def _table(heads: list[str], rows: list[list[str]], right: Iterable[int]) -> str:
    marks = ["---:" if column in right else "---" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, marks, *rows])


def _text(text: str) -> str:
    """`text` with what Markdown or HTML would read in it made literal."""
    literal = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", literal)


def _code(text: str) -> str:
    """`text` as code in a cell: only a backtick and a bar could end it early."""
    return "`" + clean(text).replace("`", "'").replace("|", "\\|") + "`"
