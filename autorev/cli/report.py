"""`autorev report`: from records to terminal, HTML, tables and traces; nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autorev.cli.ending import COMMAND
from autorev.cli.group import ANYWHERE, FILE, main
from autorev.cli.output import console, printing, say, write

if TYPE_CHECKING:
    from rich.console import Console

    from autorev.finetuning.record import FineTuning
    from autorev.profiler.record import Profile


@main.command(short_help="Render recorded analyses, profiles or fine-tunings.")
@click.argument("records", nargs=-1, required=True, type=ANYWHERE, metavar="RECORD...")
@click.option("--html", type=FILE, metavar="PATH", help="One offline page.")
@click.option("--markdown", type=FILE, metavar="PATH", help="GitHub tables.")
@click.option("--csv", type=FILE, metavar="PATH", help="One row per method.")
@click.option("--parquet", type=FILE, metavar="PATH", help="One row per method; needs pyarrow.")
@click.option("--trace", type=FILE, metavar="PATH", help="For chrome://tracing or Perfetto; of one record.")
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
    from autorev.profiler.record import Profile
    from autorev.records import kind_of

    files = _files(records)
    kinds = {kind_of(path) for path in files}
    others = kinds & {"analysis", "fine-tuning"}
    if others:
        if len(kinds) > 1:
            raise click.UsageError("records of different kinds have reports of their own; name one kind at a time")
        for option, path in {"--csv": csv, "--parquet": parquet, "--trace": trace}.items():
            if path:
                raise click.UsageError(f"{option} is of profiles; other records are JSON, with --json")
        show_others = _show_fine_tunings if "fine-tuning" in others else _show_analyses
        show_others(files, ctx.meta[COMMAND], as_json, html, markdown)
        return
    profiles = [Profile.read(path) for path in files]
    if trace and len(profiles) != 1:
        raise click.UsageError("--trace is of one record; name one")
    show(profiles, ctx.meta[COMMAND], as_json, html)
    if markdown:
        from autorev.report.profile.markdown import render_markdown

        write(markdown, render_markdown(profiles))
    from autorev.profiler import exports

    if csv:
        exports.write_csv(profiles, csv)
    if parquet:
        exports.write_parquet(profiles, parquet)
    if trace:
        exports.write_trace(profiles[0], trace)
    for path in (markdown, csv, parquet, trace):
        if path and not as_json:
            say(f"Written: {path}")


def _show_fine_tunings(
    files: list[Path], command: str, as_json: bool, html: Path | None, markdown: Path | None
) -> None:
    from autorev.finetuning.record import FineTuning

    runs = [FineTuning.read(path) for path in files]
    show_fine_tunings(runs, command, as_json, html)
    if markdown:
        from autorev.report.finetuning.markdown import render_markdown

        write(markdown, render_markdown(runs))
        if not as_json:
            say(f"Written: {markdown}")


def _show_analyses(files: list[Path], command: str, as_json: bool, html: Path | None, markdown: Path | None) -> None:
    from autorev.analysis import Analysis
    from autorev.report.analysis.terminal import print_analysis

    analyses = [Analysis.read(path) for path in files]
    if len(analyses) > 1 and (html or markdown):
        raise click.UsageError("a page is of one analysis; name one")

    def on_screen(shown: list[Analysis], where: Console) -> None:
        for analysis in shown:
            print_analysis(analysis, where)

    def page() -> str:
        from autorev.report.analysis.html import render_html

        return render_html(analyses[0], command)

    _show(analyses, on_screen, page, as_json, html)
    if markdown:
        from autorev.report.analysis.markdown import render_markdown

        write(markdown, render_markdown(analyses[0]))
        if not as_json:
            say(f"Written: {markdown}")


def show_fine_tunings(runs: list[FineTuning], command: str, as_json: bool, html: Path | None) -> None:
    """Print records of fine-tunings, and write their page."""
    from autorev.report.finetuning.terminal import print_fine_tunings

    def page() -> str:
        from autorev.report.finetuning.html import render_finetune_html

        return render_finetune_html(runs, command)

    _show(runs, print_fine_tunings, page, as_json, html)


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
    from autorev.errors import RecordError, UnreadableError
    from autorev.files import parse_json
    from autorev.records import read_text

    try:
        data = parse_json(read_text(path))
    except (RecordError, UnreadableError):
        return True
    return isinstance(data, dict) and data.get("kind") in ("analysis", "fine-tuning", "profile")


def show(profiles: list[Profile], command: str, as_json: bool, html: Path | None) -> None:
    """Print records of profiles, and write their page."""
    from autorev.report.profile.terminal import print_profiles

    def page() -> str:
        from autorev.report.profile.html import render_profile_html

        return render_profile_html(profiles, command)

    _show(profiles, print_profiles, page, as_json, html)


def _show(
    records: Sequence[Any],
    on_screen: Callable[[Any, Console], None],
    page: Callable[[], str],
    as_json: bool,
    html: Path | None,
) -> None:
    if as_json:
        data = [json.loads(record.to_json()) for record in records]
        say(json.dumps(data[0] if len(data) == 1 else data, indent=1))
    else:
        with printing():
            on_screen(records, console())
    if html:
        write(html, page())
        if not as_json:
            say(f"Report: {html}")
