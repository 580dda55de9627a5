"""`autorev report`: from records to terminal, HTML, tables and traces; nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from autorev.cli.ending import COMMAND
from autorev.cli.group import ANYWHERE, OUTPUT, main
from autorev.cli.output import console, printing, say, write


@main.command(short_help="Render recorded analyses, profiles or fine-tunings.")
@click.argument("records", nargs=-1, required=True, type=ANYWHERE, metavar="RECORD...")
@click.option("--html", type=OUTPUT, metavar="PATH", help="One offline page.")
@click.option("--markdown", type=OUTPUT, metavar="PATH", help="GitHub tables.")
@click.option("--csv", type=OUTPUT, metavar="PATH", help="One row per method.")
@click.option("--parquet", type=OUTPUT, metavar="PATH", help="One row per method; needs pyarrow.")
@click.option("--trace", type=OUTPUT, metavar="PATH", help="For chrome://tracing or Perfetto; of one record.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON and nothing else.")
@click.pass_context
def report(
    ctx: click.Context,
    /,
    records: tuple[Path, ...],
    html: Path | None,
    markdown: Path | None,
    csv: Path | None,
    parquet: Path | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Show recorded analyses, profiles or fine-tunings, and compare the latter two when there are several.

    RECORD is a file that `autorev profile` or `autorev analyze --json` wrote, the folder of a run of `autorev
    finetune`, or a folder of these.

    \b
    Examples:
      autorev report runs/smollm2-momentum-k-3
      autorev report profiles/recorded/*.json
      autorev report profiles/recorded/*.json --html reports/comparison.html
      autorev report profiles/recorded/one.json --trace trace.json
    """
    from autorev.report.render import render_markdown

    found = _read(_files(records))
    kind = found[0].kind
    if kind in ("analysis", "plan") and len(found) > 1 and (html or markdown):
        raise click.UsageError(f"a page is of one {kind}; name one")
    if trace and len(found) != 1:
        raise click.UsageError("--trace is of one record; name one")
    for option, path in {"--csv": csv, "--parquet": parquet, "--trace": trace}.items():
        if path and kind != "profile":
            raise click.UsageError(f"{option} is of profiles; other records are JSON, with --json")
    show(found, ctx.meta[COMMAND], as_json, html)
    if markdown:
        write(markdown, render_markdown(found))
    from autorev.profiler.frames import write_tables
    from autorev.profiler.trace import write_trace

    if csv:
        write_tables(found, csv)
    if parquet:
        write_tables(found, parquet, "parquet")
    if trace:
        write_trace(found[0], trace)
    for path in (markdown, csv, parquet, trace):
        if path and not as_json:
            say(f"Written: {path}")


def show(records: Sequence[Any], command: str, as_json: bool, html: Path | None) -> None:
    """Print records of one kind, and write their page."""
    from autorev.report.render import print_records, render_html

    if as_json:
        texts = [record.to_json() for record in records]
        say(texts[0] if len(texts) == 1 else json.dumps([json.loads(each) for each in texts], indent=1))
    else:
        with printing():
            print_records(records, console())
    if html:
        write(html, render_html(records, command))
        if not as_json:
            say(f"Report: {html}")


def _read(files: list[Path]) -> list[Any]:
    """The records of files, all of one kind."""
    from autorev.analysis import Analysis
    from autorev.finetuning.record import FineTuning
    from autorev.plan import Plan
    from autorev.profiler.record import Profile
    from autorev.records import kind_of

    classes: dict[str | None, Any] = {"analysis": Analysis, "fine-tuning": FineTuning, "plan": Plan}
    kinds = {kind_of(path) for path in files}
    if len(kinds) > 1 and kinds & {*classes}:
        raise click.UsageError("records of different kinds have reports of their own; name one kind at a time")
    kind = kinds.pop() if len(kinds) == 1 else "profile"
    return [classes.get(kind, Profile).read(path) for path in files]


def _files(records: tuple[Path, ...]) -> list[Path]:
    found = [file for path in records for file in (_in_folder(path) if path.is_dir() else [path])]
    if not found:
        raise click.UsageError(
            f"{', '.join(map(str, records))} holds no record; `autorev profile` and `autorev finetune` write them"
        )
    return list(dict.fromkeys(found))


def _in_folder(folder: Path) -> list[Path]:
    """The record of a run's folder; of any other folder, the records in it, and those of the runs below it."""
    from autorev.finetuning.record import FILE as RUN

    if (folder / RUN).is_file():
        return [folder / RUN]
    files = sorted(folder.glob("*.json"))
    found = [path for path in files if _is_record(path)]
    if found and len(found) < len(files):
        others = ", ".join(path.name for path in files if path not in found)
        say(f"Left out of {folder}, as they are no records: {others}", err=True)
    return found + sorted(folder.glob(f"*/{RUN}"))


def _is_record(path: Path) -> bool:
    """Or was it one? What is cut short is refused later, and not left out in silence."""
    from autorev.errors import RecordError
    from autorev.records import read_text

    try:
        # Whatever its bounds: a tokenizer's longest text is larger than any size, and that file is no record.
        data = json.loads(read_text(path))
    except (RecordError, ValueError, RecursionError):
        return True
    return isinstance(data, dict) and data.get("kind") in ("analysis", "fine-tuning", "profile")
