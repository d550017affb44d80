"""``kvrepro eval longbench|zeroscrolls|synthwiki|ruler``: tasks with one method or several, without a notebook."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import click
from transformers import PreTrainedTokenizerBase

from kvrepro import methods as registry
from kvrepro import models
from kvrepro.cli_eval import Budget, completed, executor_option
from kvrepro.records import DONE, Record
from kvrepro.tasks import longbench, ruler, synthwiki, zeroscrolls
from kvrepro.tasks.base import Task
from kvrepro.tasks.run import Reading, check, compare, run


@dataclass(frozen=True)
class Request:
    """What all suites are asked for.

    Attributes:
        names: tasks.
        samples: samples a task at most.
        seed: of all random draws.
        model: name of the model.
    """

    names: tuple[str, ...]
    samples: int
    seed: int
    model: str

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return models.load_tokenizer(self.model)


def _suite(names: Sequence[str], example: str) -> Callable[[Callable[..., list[Task]]], click.Command]:
    """Make a command of a function that loads tasks: it gets a ``Request`` and its own options."""

    def command(load: Callable[..., list[Task]]) -> click.Command:
        def body(**given: Any) -> None:
            _evaluate(load, **given)

        body.__doc__ = load.__doc__
        wrapped: Any = body
        for decorate in reversed(_options(names)):
            wrapped = decorate(wrapped)
        wrapped.__click_params__ = [*getattr(load, "__click_params__", []), *wrapped.__click_params__]
        name = load.__name__.removesuffix("_command")
        return click.command(name, epilog=f"\b\nExample:\n  kvrepro eval {name} {example}")(wrapped)

    return command


def _options(names: Sequence[str]) -> list[Callable[..., Any]]:
    """Options that all suites share."""
    return [
        click.option(
            "--task",
            "names",
            multiple=True,
            default=names[:1],
            show_default=True,
            shell_complete=completed(lambda: list(names)),
            help=f"One of {', '.join(names)}; may be given several times.",
        ),
        click.option(
            "--method",
            "methods",
            multiple=True,
            required=True,
            shell_complete=completed(registry.names),
            help="Such as h2o or 'kvmerger(sigma=5.0)'; may be given several times, the others are compared with the "
            "first.",
        ),
        click.option("--budget", type=Budget(), help="Slots per KV head and layer, or a share such as 0.25."),
        click.option("-n", "--samples", default=4, show_default=True, help="Samples a task, at most."),
        click.option("--chunk", type=int, help="Tokens of a prompt read at a time.  [default: all]"),
        click.option("--seed", default=0, show_default=True, help="Of all random draws."),
        click.option("--model", default=models.DEFAULT, show_default=True, help="Embedded, a hub id or a folder."),
        click.option("--device", help="As torch calls it.  [default: cuda where there is a GPU]"),
        click.option("--dtype", help="As torch calls it.  [default: bfloat16 on a GPU, else float32]"),
        executor_option,
        click.option("--json", "as_json", is_flag=True, help="Print JSON, with each sample's results."),
    ]


def _evaluate(
    load: Callable[..., list[Task]],
    *,
    methods: tuple[str, ...],
    budget: int | float | None,
    names: tuple[str, ...],
    samples: int,
    chunk: int | None,
    seed: int,
    model: str,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    **own: Any,
) -> None:
    """Check what was asked for, load the tasks, measure, and print."""
    reading = Reading(own.get("max_length"), chunk, seed)
    check(methods, budget, reading)
    tasks = load(Request(tuple(dict.fromkeys(names)), samples, seed, model), **own)
    records = run(tasks, methods, budget, reading=reading, model=model, device=device, dtype=dtype)
    _show(records, seed, as_json)
    failed = [record.reason for record in records if record.status not in DONE]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(records)} could not be measured; first reason: {failed[0]}")


def _show(records: list[Record], seed: int, as_json: bool) -> None:
    differences = [asdict(compare(a, b, seed)) | _names(b, first=a) for a, b in _pairs(records)]
    means = _means(records)
    if as_json:
        rows = [asdict(record.value) | _names(record) | _state(record) for record in records]
        click.echo(json.dumps({"results": rows, "differences": differences, "means": means}, indent=1))
        return
    for record in records:
        click.echo(_line(record))
    for found in differences:
        click.echo(
            f"{found['task']}: {found['method']} - {found['first']}: score {_interval(found['score'].values())}, "
            f"log-likelihood {_interval(found['loglik'].values())}"
        )
    for method, mean in means.items():
        click.echo(f"mean of {mean['tasks']} tasks: {method} {mean['score']:.2f}")


def _names(record: Record, first: Record | None = None) -> dict[str, Any]:
    cell = record.cell
    names = {"task": cell.params["task"], "data": cell.data, "method": cell.params["label"], "budget": cell.budget}
    return names if first is None else {**names, "first": first.cell.params["label"]}


def _state(record: Record) -> dict[str, Any]:
    return {"metric": record.cell.metric, "status": record.status, "reason": record.reason}


def _line(record: Record) -> str:
    """One record as a line."""
    name = f"{record.cell.params['task']:22} {record.cell.params['label']:24}"
    if record.status != "ok":
        return f"{name} {record.status}: {record.reason}"
    extra = record.value.extra
    return (
        f"{name} {record.cell.metric} {_interval(extra['score'])}  log-likelihood {_interval(extra['mean_loglik'])}  "
        f"n={record.value.n}"
    )


def _interval(numbers: Iterable[float | None]) -> str:
    mean, low, high = numbers
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _pairs(records: Iterable[Record]) -> list[tuple[Record, Record]]:
    """Each task's first method with each other one, where both were measured."""
    pairs = []
    for _, group in groupby(records, key=lambda record: record.cell.params["task"]):
        first, *others = group
        pairs += [(first, other) for other in others if first.status == other.status == "ok"]
    return pairs


def _means(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """Mean score of each method over the tasks that have one, where there are several."""
    scores: dict[str, list[float]] = {}
    for record in records:
        if record.value.value is not None:
            scores.setdefault(record.cell.params["label"], []).append(record.value.value)
    return {
        name: {"score": sum(found) / len(found), "tasks": len(found)}
        for name, found in scores.items()
        if len(found) > 1
    }


@_suite(longbench.NAMES, "--task qasper --method full --method weightedkv --budget 0.5 --max-length 2048")
@click.option(
    "--max-length", default=7500, show_default=True, help="Tokens of a prompt; longer ones lose their middle."
)
def longbench_command(request: Request, max_length: int) -> list[Task]:
    """LongBench's English tasks, from KVREPRO_DATA_DIR, with the official prompts, lengths and metrics."""
    return [longbench.load(name, request.samples) for name in request.names]


@_suite(zeroscrolls.NAMES, "--method full --method h2o --budget 0.5 --max-length 2048 -n 2")
@click.option("--max-length", default=7500, show_default=True, help="Tokens of a prompt; longer ones lose their end.")
def zeroscrolls_command(request: Request, max_length: int) -> list[Task]:
    """QMSum as ZeroSCROLLS asks for it, from KVREPRO_DATA_DIR."""
    return [zeroscrolls.load(name, request.samples) for name in request.names]


@_suite(synthwiki.NAMES, "--method full --method snapkv --budget 0.25 --length 1000")
@click.option("--length", default=1000, show_default=True, help="Tokens of all biographies together.")
def synthwiki_command(request: Request, length: int) -> list[Task]:
    """SynthWiki's questions about one biography among many, from KVREPRO_DATA_DIR."""
    return [synthwiki.load(name, request.tokenizer, length, request.samples, request.seed) for name in request.names]


@_suite(ruler.NAMES, "--task niah_single --task variable_tracking --method h2o --budget 0.5 --length 2048")
@click.option("--length", default=1024, show_default=True, help="Tokens of prompt and answer.")
def ruler_command(request: Request, length: int) -> list[Task]:
    """RULER-style needles and variable tracking, generated from a seed; needs no data."""
    return [ruler.load(name, request.tokenizer, length, request.samples, request.seed) for name in request.names]


#: To be added to ``kvrepro eval``.
COMMANDS = (longbench_command, zeroscrolls_command, synthwiki_command, ruler_command)
