"""Fine-tuning runs as one HTML file that needs nothing else: the report of one, or the comparison of several."""

from __future__ import annotations

from collections.abc import Sequence

from autorev.finetuning.record import EXPORT_LIMIT, FineTuning
from autorev.format import format_bytes, format_integer, format_rate, format_seconds
from autorev.report.finetuning import comparison_tables, numbers, rows, tables
from autorev.report.finetuning.comparison import comparison_figures
from autorev.report.finetuning.figures import SMALLEST_CHANGE, run_figures
from autorev.report.finetuning.numbers import (
    change_text,
    divergence_text,
    loss_text,
    perplexity_text,
    share_text,
)
from autorev.report.finetuning.rows import latest, original_words, plain_of, side_bits_ends, side_bits_words
from autorev.report.finetuning.verdict import (
    drift_words,
    export_gap,
    memory_words,
    verdict,
)
from autorev.report.pages import render_page
from autorev.report.profile.comparison_tables import environment_facts
from autorev.report.tables import Tile


def render_finetune_html(runs: Sequence[FineTuning], command: str) -> str:
    """The report of one run, or the comparison of several; the same bytes every time.

    `command` is what made the report, shown at its end beside the command of every record.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("there is no fine-tuning to report")
    modules = {"fr": rows, "tables": tables, "across": comparison_tables, "numbers": numbers}
    if len(runs) == 1:
        run = runs[0]
        return render_page(
            "finetune.html.jinja",
            run_figures(run),
            run=run,
            command=command,
            tiles=tiles(run),
            verdict=verdict(run),
            drift=drift_words(run),
            looked=memory_words(run),
            environment_facts=environment_facts(run.environment),
            **modules,
        )
    groups = rows.groups(runs)
    return render_page(
        "finetune_many.html.jinja",
        comparison_figures(groups),
        runs=list(runs),
        groups=groups,
        command=command,
        verdict=verdict,
        has_plain={i for i, group in enumerate(groups) if any(plain_of(run, group.runs) for run in group.runs)},
        limit=EXPORT_LIMIT,
        smallest=SMALLEST_CHANGE,
        **modules,
    )


def tiles(run: FineTuning) -> list[Tile]:
    """What the run reached, and what it needed; only what is known of it."""
    return [*_quality_tiles(run), *_export_tile(run), *_cost_tiles(run)]


def _quality_tiles(run: FineTuning) -> list[Tile]:
    found = []
    now, zero, original = latest(run), run.zero_shot, run.original
    if now is not None:
        title = "Validation loss" if run.complete else f"Validation loss at step {format_integer(now.step)}"
        others = [f"{original_words(run)} {loss_text(original.loss)}"] if original else []
        others += [f"before training {loss_text(zero.loss)}"] if zero and zero is not now else []
        found.append(Tile(title, loss_text(now.loss), ", ".join(others)))
        others = [f"{original_words(run)} {perplexity_text(original.perplexity)}"] if original else []
        others += [f"before training {perplexity_text(zero.perplexity)}"] if zero and zero is not now else []
        found.append(Tile("Perplexity", perplexity_text(now.perplexity), ", ".join(others)))
    final = run.final
    if final is not None and final.agreement is not None:
        kl = "" if final.divergence is None else f"KL {divergence_text(final.divergence)} nats"
        found.append(Tile("Agreement with the original", share_text(final.agreement), kl))
    return found


def _export_tile(run: FineTuning) -> list[Tile]:
    gap = export_gap(run)
    if gap is None or run.vanilla is None:
        return []
    warning = "" if gap <= EXPORT_LIMIT else "autorev export would refuse it"
    against = f"{change_text(gap)} against the coupling"
    return [Tile("As the plain architecture", loss_text(run.vanilla.loss), against, warning)]


def _cost_tiles(run: FineTuning) -> list[Tile]:
    found = []
    if run.peak_bytes is not None:
        found.append(Tile("Peak memory", format_bytes(run.peak_bytes)))
    if run.teacher_bytes:
        of_it = "a frozen copy of the original" + ("; part of the peak" if run.peak_bytes is not None else "")
        found.append(Tile("Teacher", format_bytes(run.teacher_bytes), of_it))
    if run.tokens_per_second is not None:
        step = f"{format_seconds(run.step_seconds)} a step" if run.step_seconds else ""
        found.append(Tile("Tokens a second", format_rate(run.tokens_per_second), step))
    if side_bits_ends(run):
        found.append(Tile("Side bits", side_bits_words(run), "of an element and step, mean"))
    return found
