"""Every figure of one fine-tuning run as tables."""

from __future__ import annotations

from autorev.finetuning.record import ChainState, Evaluation, FineTuning
from autorev.format import (
    NOTHING,
    clean,
    format_bytes,
    format_count,
    format_error,
    format_integer,
    format_rate,
    format_seconds,
    plural,
)
from autorev.optimizers import Optimizer
from autorev.report.document import Cell, Row, Table
from autorev.report.finetuning import numbers, view
from autorev.report.profile.tables import optional_bytes, optional_seconds


def evaluations_table(run: FineTuning) -> Table:
    """The model on the validation text at every moment it was evaluated."""
    heads = ("Validation", "Loss", "Standard error", "Perplexity", "Against the original", "Agreement", "KL")
    rows = [_evaluation(run, view.original_words(run), run.original)] if run.original else []
    for each in run.evaluations:
        name = "before training" if each.step == 0 else f"step {format_integer(each.step)}"
        rows.append(_evaluation(run, name, each, last=each is run.final))
    if run.vanilla is not None and run.method.reversible:
        rows.append(_evaluation(run, "as the plain architecture", run.vanilla))
    return Table(heads, tuple(rows), "Every evaluation on the validation text")


def _evaluation(run: FineTuning, name: str, each: Evaluation, last: bool = False) -> Row:
    cells = (
        Cell(numbers.loss_text(each.loss), strong=True),
        numbers.loss_text(each.standard_error),
        numbers.perplexity_text(each.perplexity),
        NOTHING if each is run.original else numbers.change_text(view.difference(each, run.original)),
        numbers.share_text(each.agreement),
        numbers.divergence_text(each.divergence),
    )
    return Row(name, cells, chosen=last)


def steps_table(run: FineTuning) -> Table:
    """Every optimiser step as it was logged; columns without a figure are left out."""
    columns = {
        "Loss": [numbers.loss_text(row.loss) for row in run.logged],
        "Cross entropy": [numbers.loss_text(row.cross_entropy) for row in run.logged],
        "KL": [numbers.divergence_text(row.divergence) for row in run.logged],
        "Learning rate": [f"{row.learning_rate:.2g}" for row in run.logged],
        "Gradient norm": [numbers.loss_text(row.gradient_norm) for row in run.logged],
        "Time": [optional_seconds(row.seconds) for row in run.logged],
        "Tokens": [NOTHING if row.tokens is None else format_integer(row.tokens) for row in run.logged],
        "Gamma": [NOTHING if row.gamma is None else numbers.gamma_text(row.gamma) for row in run.logged],
        "Side bits": [numbers.bits_text(row.side_bits) for row in run.logged],
        "Drift": [NOTHING if row.drift is None else format_error(row.drift) for row in run.logged],
        "Peak": [optional_bytes(row.peak_bytes) for row in run.logged],
    }
    kept = {head: cells for head, cells in columns.items() if set(cells) != {NOTHING}}
    rows = [
        Row(format_integer(row.step), tuple(cells[i] for cells in kept.values())) for i, row in enumerate(run.logged)
    ]
    return Table(("Step", *kept), tuple(rows), "Every optimiser step", fold="Show every step as a table")


def chains_table(run: FineTuning) -> Table:
    """The numbers of every chain at the end, equal neighbours together."""
    heads = ("Chain", "Steps", "Gamma", "c", "Side bits", "Grid")
    return Table(heads, tuple(map(_chain, run.chains)), "The numbers of every chain", words=(2, 3, 4))


def _chain(chain: ChainState) -> Row:
    cells = (
        format_integer(len(chain.side_bits)),
        numbers.along_chain(chain.gamma, numbers.gamma_text),
        numbers.along_chain(chain.c, "{:.4g}".format),
        numbers.along_chain(chain.side_bits, "{:g}".format),
        NOTHING if chain.fraction_bits is None else f"2^{-chain.fraction_bits}",
    )
    return Row(clean(chain.name), cells)


def chain_steps_table(chain: ChainState) -> Table:
    """One chain at the end, one row per step; a coupling of two streams has neither gamma nor c."""
    gammas = [numbers.gamma_text(gamma) for gamma in chain.gamma] or [NOTHING] * len(chain.side_bits)
    factors = [f"{c:.4g}" for c in chain.c] or [NOTHING] * len(chain.side_bits)
    rows = [
        Row(str(i), (gamma, factor, str(bits)))
        for i, (gamma, factor, bits) in enumerate(zip(gammas, factors, chain.side_bits, strict=False))
    ]
    heads, name = ("Step of the chain", "Gamma", "c", "Side bits"), clean(chain.name)
    return Table(heads, tuple(rows), f"The steps of {name}", fold=f"Show every step of {name}")


def sensitivity_table(run: FineTuning) -> Table:
    """By how much the loss rises with one block at fewer side bits."""
    found = run.calibration.sensitivities if run.calibration else ()
    bits = sorted({each.side_bits for each in found}, reverse=True)
    increases = {(each.block, each.side_bits): each.increase for each in found}
    blocks = dict.fromkeys(each.block for each in found)
    rows = [
        Row(f"{i}: {clean(block)}", tuple(numbers.change_text(increases.get((block, k))) for k in bits))
        for i, block in enumerate(blocks)
    ]
    heads = ("Block", *(plural(k, "side bit") for k in bits))
    return Table(heads, tuple(rows), "Loss increase by block and side bits", fold="Show as a table")


def assignments_table(run: FineTuning) -> Table:
    """Every choice for all blocks that was measured as a whole."""
    found = run.calibration.assignments if run.calibration else ()
    rows = [
        Row(
            numbers.bits_text(each.side_bits),
            (numbers.change_text(each.increase), "chosen" if each.chosen else ""),
            chosen=each.chosen,
        )
        for each in found
    ]
    heads = ("Side bits, mean", "Loss increase", "")
    return Table(heads, tuple(rows), "Side bits against the loss increase", fold="Show as a table")


def recipe_facts(run: FineTuning) -> dict[str, str]:
    """How it was trained, by what it is called."""
    r = run.recipe
    facts = {
        "Trains": f"{view.trains_words(run)}, {format_count(r.trained_parameters)} parameters",
        "Coupling": clean(run.method.title),
        "Side bits": view.side_bits_words(run),
        "Steps": format_integer(r.steps),
        "Batch": f"{format_integer(r.batch)} x {format_integer(r.sequence)} tokens"
        + (f", {format_integer(r.accumulate)} times a step" if r.accumulate > 1 else "")
        + (f", in each of {format_integer(r.processes)} processes" if r.processes > 1 else ""),
        **({"Shares": "weights, gradients and states, by FSDP2"} if r.shard == "fsdp" else {}),
        "Learning rate": f"{r.learning_rate:g}",
        "Optimizer": Optimizer.parse(r.optimizer).title,
        "Precision": clean(r.dtype),
        "Seed": str(r.seed),
    }
    if r.schedule:
        facts["Schedule"] = f"gamma to {clean(r.schedule)} within {plural(r.schedule_steps, 'step')}"
    if r.distill_weight:
        facts["Distillation"] = f"{1 - r.distill_weight:g} x cross entropy + {r.distill_weight:g} x KL(original, model)"
    if r.max_loss_increase is not None:
        facts["Budget for side bits"] = f"{numbers.change_text(r.max_loss_increase)} nats before training"
    if run.teacher_bytes:
        facts["Teacher"] = f"{format_bytes(run.teacher_bytes)}, a frozen copy of the original"
    if run.step_seconds:
        facts["Time of a step"] = f"{format_seconds(run.step_seconds)} (median of those whose memory was not looked at)"
        facts["Speed"] = f"{format_rate(run.tokens_per_second)} tokens/s"
    return facts


def corpus_facts(run: FineTuning) -> dict[str, str]:
    """What it was trained and evaluated on."""
    c = run.corpus
    facts = {
        "Text": clean(c.source),
        "Documents": format_integer(c.documents),
        "Training": f"{format_integer(c.training_tokens)} tokens count for the loss",
        "Validation": f"{format_integer(c.validation_tokens)} tokens",
        "Rows": "several documents in one, each seeing itself alone" if c.packed else "one document each, padded",
    }
    if c.truncated:
        facts["Cut"] = f"{plural(c.truncated, 'document')} did not fit a row and lost the end"
    return facts
