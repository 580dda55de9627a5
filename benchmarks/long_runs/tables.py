"""What is shown of long runs: Markdown of their recorded lines, finished or not."""

from __future__ import annotations

from collections.abc import Iterator

from autorev.format import format_bytes
from benchmarks.long_runs.saved import Line

MIB = 2**20


def of_context(lines: list[Line]) -> Iterator[str]:
    """What each way needs at the full length, how long it trains within the limit, and what it reaches."""
    if not lines:
        return
    plan = lines[0]["plan"]
    length = plan["length"]
    yield (
        f"| trained by | peak at {length:,} tokens | on the host | longest within {plan['limit'] / MIB:g} MiB "
        f"| steps | highest peak in training | loss, last 10 steps | right at {length:,} tokens |"
    )
    yield "|---|" + "---:|" * 7
    for line in lines:
        done, curve = line.get("step", 0), line.get("curve", [])
        shorter = "" if line.get("length", length) == length else f" (at {line['length']:,})"
        cells = [f"{line['peak'] / MIB:.2f} MiB{shorter}", f"{line['host'] / MIB:.1f} MiB" if line["host"] else "-"]
        cells += [
            f"{line['trained_at']:,}" if line.get("trained_at") else "-",
            f"{done} of {line['steps']}" if done else "-",
        ]
        cells += [f"{line['highest'] / MIB:.2f} MiB" if line.get("highest") else "-"]
        cells += [f"{sum(row[2] for row in curve[-10:]) / len(curve[-10:]):.3f}" if curve else "-"]
        asked = line["asked"][-1] if line.get("asked") else None
        after = "" if asked is None or line["status"] == "done" else f" after {asked['step']} steps"
        cells += [f"{asked['right'][str(length)]:.1%}{after}" if asked else "-"]
        yield f"| {line['name']} | {' | '.join(cells)} |"


def of_trainings(lines: list[Line]) -> Iterator[str]:
    """Losses, speed and answers of fine-tunings."""
    answers = sorted({key for line in lines for key in line.get("answers", {})})
    heads = ["steps", "before", "validation loss", "as the plain", "peak", "tokens/s", *answers]
    yield f"| run | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * len(heads)
    for line in lines:
        found = line["evaluations"]
        speed, peak, plain = line["tokens_per_second"], line["peak_bytes"], line["exported"]
        cells = [f"{line['step']:,} of {line['steps']:,}", f"{found[0][1]:.3f}" if found else "-"]
        cells += [f"{found[-1][1]:.3f} ({found[-1][0]:,})" if len(found) > 1 else "-"]
        cells += [f"{plain:.3f}" if plain is not None else "-", format_bytes(peak) if peak else "-"]
        cells += [f"{speed:.0f}" if speed else "-"]
        cells += [f"{line['answers'][key]:.1%}" if key in line.get("answers", {}) else "-" for key in answers]
        yield f"| {line['name']} | {' | '.join(cells)} |"
