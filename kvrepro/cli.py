"""The command ``kvrepro``: methods, run, eval, recommend, build, compare, ledger, doctor, fetch, completion.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 stopped. Errors are one line; ``--debug`` shows where they come from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

import kvrepro
from kvrepro import assets, methods
from kvrepro.book.project import PROFILES, BookError, Project
from kvrepro.cli_eval import completed, evaluate, executor_option
from kvrepro.cli_papers import papers_command
from kvrepro.cli_recommend import recommend_command
from kvrepro.cli_tasks import COMMANDS
from kvrepro.compare import RTOL, Comparison, compare
from kvrepro.doctor import examine
from kvrepro.ledger import PAPERS, counts, ledger, published

_PROFILE = click.Choice(list(PROFILES))
_FAILURES = (OSError, RuntimeError)  # what this package and its libraries raise when something cannot be done


def _example(*lines: str) -> str:
    """An epilog that click does not rewrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """For imports that need an extra of the package: where that is not installed, the error says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}: pip install 'kvrepro[{name}]'") from error


def _notebooks() -> list[str]:
    """The names of the checkout's notebooks; none outside one, where there is nothing to complete."""
    try:
        return [notebook.name for notebook in Project.find().notebooks()]
    except BookError:
        return []


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_example("kvrepro methods kvmerger", "kvrepro eval ppl weightedkv --budget 256", "kvrepro build"),
)
@click.version_option(kvrepro.__version__, prog_name="kvrepro")
@click.option("--debug", is_flag=True, help="Show where an error comes from. Works behind a command too.")
def cli(debug: bool) -> None:
    """KV-cache merging, reproduced: the methods, their measurements, and the book made from them."""


@cli.command("methods", epilog=_example("kvrepro methods", "kvrepro methods weightedkv", "kvrepro methods --json"))
@click.argument("name", required=False, shell_complete=completed(methods.names))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def methods_command(name: str | None, as_json: bool) -> None:
    """List the methods, or show one with its options, their defaults and where each default comes from."""
    about = [methods.describe(each) for each in ([name] if name else methods.names())]
    if as_json:
        found = [asdict(description) for description in about]
        click.echo(json.dumps(found[0] if name else found, indent=1, default=str))
    elif name:
        click.echo(str(about[0]))
    else:
        rows = [("name", "kind", "paper, and the options beneath")]
        for d in about:
            rows += [(d.name, d.kind, d.paper or d.title), ("", "", f"  {', '.join(o.name for o in d.options)}")]
        _print_table(rows[0], rows[1:])


@cli.command(
    "run",
    epilog=_example(
        "kvrepro run weightedkv/perplexity",
        "kvrepro run weightedkv/perplexity budget=128 window=1024,2048",
        "kvrepro run kvmerger/needle methods='[full, kvmerger(sigma=5.0)]'",
    ),
)
@click.argument("notebook", shell_complete=completed(_notebooks))
@click.argument("parameters", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--profile", type=_PROFILE, help="Whose parameters to start from.  [default: gpu with CUDA, else quick]")
@click.option("--force", is_flag=True, help="Run it although nothing changed.")
@executor_option
def run_command(notebook: str, parameters: tuple[str, ...], profile: str | None, force: bool) -> None:
    """Run one notebook, with parameters of your own if any are given, and print where it is.

    A run with own parameters goes to results/runs and leaves the book's page alone. A parameter takes one value or a
    list of values with commas.
    """
    from kvrepro.book.parameters import parse

    project = Project.find()
    with _extra("book"):
        from kvrepro.book.build import run  # slow to import
    click.echo(run(project, notebook, parse(parameters), profile, force=force))


@cli.command(
    "build", epilog=_example("kvrepro build", "kvrepro build --profile smoke", "kvrepro build -n kvmerger/needle")
)
@click.option("--profile", type=_PROFILE, help="How much to measure.  [default: gpu with CUDA, else quick]")
@click.option(
    "-n",
    "--notebook",
    "notebooks",
    multiple=True,
    shell_complete=completed(_notebooks),
    help="Only this notebook; may be given several times.",
)
@click.option("--force", is_flag=True, help="Run the notebooks although nothing changed.")
@click.option("--site/--no-site", default=True, show_default=True, help="Build the pages afterwards.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    help="Notebooks that run at a time; those that measure times run alone.  [default: one a core, at most 4; 1 with a "
    "GPU or a cluster, 3 with workers]",
)
@click.option(
    "-w",
    "--workers",
    type=click.IntRange(min=1),
    help="Processes on this machine that measure the notebooks' cells, several on one GPU; times are measured without "
    "them.  [default: none, each notebook measures its own]",
)
@executor_option
def build_command(
    profile: str | None, notebooks: tuple[str, ...], force: bool, site: bool, jobs: int | None, workers: int | None
) -> None:
    """Make the book: run the notebooks that need it, then build the pages."""
    project = Project.find()
    with _extra("book"):
        from kvrepro.book.build import build  # slow to import
    report = build(project, profile, notebooks, force=force, site=site, jobs=jobs, workers=workers)
    what = "the notebooks" if not site else "the book"
    if not report.ran and not report.built:
        click.echo(f"{what} ({report.profile}): up to date")
    for name, problem in report.failed.items():
        click.echo(f"failed: {name}: {problem}", err=True)
    if report.missing:
        click.echo(f"not run yet: {', '.join(report.missing)}", err=True)
    if site:
        click.echo(f"open {report.front.as_uri()}")
    if report.failed:
        raise SystemExit(1)


@cli.group("fetch", invoke_without_command=True, epilog=_example("kvrepro fetch", "kvrepro fetch papers --dry-run"))
@click.pass_context
def fetch_command(context: click.Context) -> None:
    """Fetch and check the embedded model and texts; after that no network is needed."""
    if context.invoked_subcommand is None:
        assets.fetch()


@cli.command("doctor", epilog=_example("kvrepro doctor", "kvrepro doctor --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--online", is_flag=True, help="Also ask the Hugging Face hub for the models of the profile paper.")
def doctor_command(as_json: bool, online: bool) -> None:
    """Say what this machine has and lacks, and the command that gets what is missing. Exit code 1 for a problem."""
    findings = examine(online)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        signs = {"ok": click.style("ok     ", fg="green"), "warning": click.style("warning", fg="yellow")}
        signs["problem"] = click.style("problem", fg="red")
        for finding in findings:
            click.echo(f"{signs[finding.state]}  {finding.name}: {finding.detail}")
            if finding.fix:
                click.echo(f"         -> {finding.fix}")
    if any(finding.state == "problem" for finding in findings):
        raise SystemExit(1)


@cli.command(
    "compare", epilog=_example("kvrepro compare results/published results/local", "kvrepro compare a.jsonl b.jsonl")
)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--rtol", default=RTOL, show_default=True, help="Share of the values that may differ in any case.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--all", "show_all", is_flag=True, help="Show the cells that agree, too.")
def compare_command(a: Path, b: Path, rtol: float, as_json: bool, show_all: bool) -> None:
    """Compare two record stores (folders or .jsonl files) cell by cell; exit code 1 when they disagree.

    Two values agree when they differ by no more than two combined standard errors.
    """
    found = compare(a, b, rtol)
    if as_json:
        click.echo(json.dumps(_comparison_json(found), indent=1))
    else:
        _print_comparison(found, a, b, show_all)
    if found.disagreements or not (found.pairs or found.without_value):
        raise SystemExit(1)


@cli.command("ledger", epilog=_example("kvrepro ledger", "kvrepro ledger --paper KVMerger", "kvrepro ledger --json"))
@click.option("--paper", type=click.Choice(PAPERS, case_sensitive=False), help="Only this paper's claims.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ledger_command(paper: str | None, as_json: bool) -> None:
    """Say what the papers claim and what the published records make of it: verdicts by rule, never typed."""
    records = published()
    if not records:
        raise click.ClickException(
            "the published records are not here: a checkout of the repository has them, with the package installed "
            "from it (pip install -e .)"
        )
    entries = [entry for entry in ledger(records=records) if paper in (None, entry.claim.paper)]
    if as_json:
        click.echo(json.dumps([entry.as_dict() for entry in entries], indent=1))
        return
    rows = [(entry.claim.id, entry.verdict, entry.state or "no records", entry.claim.text) for entry in entries]
    _print_table(("claim", "verdict", "records", "text"), rows)
    click.echo(", ".join(f"{number} {verdict}" for verdict, number in counts(entries).items()))


@cli.command(
    "completion",
    epilog=_example(
        'eval "$(kvrepro completion bash)"              # in ~/.bashrc',
        'eval "$(kvrepro completion zsh)"               # in ~/.zshrc',
        "kvrepro completion fish > ~/.config/fish/completions/kvrepro.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print what lets a shell complete commands, options, methods and notebooks with the tab key."""
    click.echo(get_completion_class(shell)(cli, {}, "kvrepro", "_KVREPRO_COMPLETE").source())


@cli.command("lm-eval", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval_command(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness's command lm_eval, which then knows a model kvrepro; all ARGUMENTS are its own."""
    with _extra("lm-eval"):
        from kvrepro.lm_eval import main as harness  # slow to import
    harness(arguments)


def _print_comparison(found: Comparison, a: Path, b: Path, show_all: bool) -> None:
    shown = found.pairs if show_all else found.disagreements
    if shown:
        header = ("cell", str(a), str(b), "difference", "tolerance", "")
        _print_table(header, [_pair_row(pair) for pair in shown])
    if not (found.pairs or found.without_value):
        click.echo("the two stores have no cell in common", err=True)
    click.echo(f"{len(found.pairs)} cells compared, {len(found.disagreements)} disagree")
    for store, records in ((a, found.only_a), (b, found.only_b)):
        if records:
            click.echo(f"{len(records)} only in {store}")
    if found.without_value:
        click.echo(f"{len(found.without_value)} in both are no single number and were not compared")


def _pair_row(pair: Any) -> tuple[str, ...]:
    cell = pair.a.cell
    name = f"{cell.paper}/{cell.experiment} {cell.metric} {cell.label()}"
    numbers = (pair.a.value.value, pair.b.value.value, pair.difference, pair.tolerance)
    return (name, *(f"{number:.6g}" for number in numbers), "" if pair.agrees else "DISAGREES")


def _comparison_json(found: Comparison) -> dict[str, Any]:
    pairs = [
        {
            "cell": asdict(pair.a.cell),
            "a": pair.a.value.value,
            "b": pair.b.value.value,
            "difference": pair.difference,
            "tolerance": pair.tolerance,
            "agrees": pair.agrees,
        }
        for pair in found.pairs
    ]
    rest = {
        name: [asdict(record.cell) for record in getattr(found, name)] for name in ("only_a", "only_b", "without_value")
    }
    return {"pairs": pairs, **rest}


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns side by side, the last one unpadded."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


for task_command in COMMANDS:
    evaluate.add_command(task_command)
cli.add_command(evaluate)
cli.add_command(recommend_command)
fetch_command.add_command(papers_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    Args:
        arguments: the command line without the program's name; the process's own by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = cli.main([word for word in words if word != "--debug"], prog_name="kvrepro", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; what was finished is kept, the same command goes on from there", err=True)
        code = 130
    except (ValueError, *_FAILURES) as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        code = 2 if isinstance(error, ValueError) else 1
    sys.exit(code if isinstance(code, int) else 0)
