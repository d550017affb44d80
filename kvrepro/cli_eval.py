"""``kvrepro eval``: perplexity, fidelity and needle retrieval of one method on one text, without a notebook."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvrepro
from kvrepro import executors, methods, models, texts


@dataclass(frozen=True)
class Setup:
    """What every evaluation needs, checked before the model is loaded.

    Attributes:
        method: name of the method.
        budget: slots per KV head and layer, a share of the prompt, or None.
        options: the method's options.
        model: name of the model.
        text: name of the text.
        device, dtype: of the model; None for its defaults.
    """

    method: str
    budget: int | float | None
    options: Mapping[str, Any]
    model: str
    text: str
    device: str | None
    dtype: str | None

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ValueError: unknown method, option, value or text, or a budget that leaves no room.
        """
        method = methods.create(self.method, **self.options)
        if isinstance(self.budget, int) and not method.unlimited:
            method.resolve(self.budget).check(self.budget)
        texts.load(self.text)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer."""
        return kvrepro.load_model(self.model, device=self.device, dtype=self.dtype)

    def tokens(self, tokenizer: PreTrainedTokenizerBase, length: int, n: int) -> torch.Tensor:
        """Windows of the text, token ids ``[n, length]``."""
        return texts.tokens(texts.load(self.text), tokenizer, length, n)

    def report(self, **results: Any) -> dict[str, Any]:
        """Results beside what they are results of."""
        return {
            "method": self.method,
            "options": dict(methods.create(self.method, **self.options).resolved()),
            "budget": self.budget,
            "model": self.model,
            "text": self.text,
            **results,
        }


class Budget(click.ParamType):
    """A whole number of slots, or a share with a decimal point."""

    name = "slots or share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """Read the number; bad ones are a usage error."""
        try:
            budget = float(value) if "." in str(value) else int(value)
        except ValueError:
            budget = -1
        if budget <= 0 or (isinstance(budget, float) and budget > 1):
            self.fail(f"{value!r} is neither a number of slots (256) nor a share of the prompt (0.25)", param, ctx)
        return budget


def _choose(context: click.Context, parameter: click.Parameter, value: str) -> None:
    try:
        executors.scheduler(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    os.environ[executors.VARIABLE] = value  # for this process and for the kernels that it starts


#: For commands that measure cells.
executor_option = click.option(
    "--executor",
    envvar=executors.VARIABLE,
    default=executors.LOCAL,
    show_default=True,
    expose_value=False,
    callback=_choose,
    help=f"Who measures: {executors.LOCAL}, the workers of a Dask scheduler, dask://HOST:PORT, or nobody: "
    f"{executors.STORED} shows what is stored.",
)


def _options(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, Any]:
    from kvrepro.book.parameters import parse  # the same spelling as a notebook's parameters

    return parse(value)


def completed(names: Callable[[], list[str]]) -> Callable[..., list[str]]:
    """What the tab key offers for an argument: those of ``names()`` that begin with what is written."""

    def offered(context: click.Context, parameter: click.Parameter, written: str) -> list[str]:
        """As click calls it."""
        return [name for name in names() if name.startswith(written)]

    return offered


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Argument and options that all evaluations share; the command gets a ``Setup``."""

    def with_setup(as_json: bool, **given: Any) -> None:
        names = ("method", "budget", "options", "model", "text", "device", "dtype")
        setup = Setup(**{name: given.pop(name) for name in names})
        _show(command(setup, **given), as_json)

    with_setup.__doc__, with_setup.__name__ = command.__doc__, command.__name__
    decorators = [
        click.argument("method", shell_complete=completed(methods.names)),
        click.option("--budget", type=Budget(), help="Slots per KV head and layer, or a share such as 0.25."),
        click.option("-o", "--option", "options", multiple=True, callback=_options, help="NAME=VALUE of the method."),
        click.option("--model", default=models.DEFAULT, show_default=True, help="Embedded, a hub id or a folder."),
        click.option("--text", default="essays", show_default=True, help=f"One of {', '.join(texts.names())}."),
        click.option("--device", help="As torch calls it.  [default: cuda where there is a GPU]"),
        click.option("--dtype", help="As torch calls it.  [default: bfloat16 on a GPU, else float32]"),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ]
    wrapped: Any = with_setup
    for decorate in reversed(decorators):
        wrapped = decorate(wrapped)
    if hasattr(command, "__click_params__"):
        wrapped.__click_params__ = [*command.__click_params__, *wrapped.__click_params__]
    return wrapped


def _show(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        if value is not None:
            click.echo(f"{name:30} {value:.6g}" if isinstance(value, float) else f"{name:30} {value}")


def _mean(samples: torch.Tensor) -> tuple[float, float | None]:
    """Mean of ``[n]`` samples and its standard error, None for one sample."""
    x = samples.double()
    return float(x.mean()), float(x.std() / math.sqrt(len(x))) if len(x) > 1 else None


@click.group("eval")
def evaluate() -> None:
    """Measure methods: perplexity, fidelity to the full cache, a needle, or long-context tasks."""


@evaluate.command("ppl", epilog="\b\nExample:\n  kvrepro eval ppl weightedkv --budget 256 --window 1024 --json")
@_common
@click.option("--window", default=1024, show_default=True, help="Tokens read from an empty cache.")
@click.option("--stride", type=int, help="Tokens scored at the end of each window.  [default: half the window]")
@click.option("-n", "--windows", default=4, show_default=True, help="Windows.")
@click.option("--chunk", default=1, show_default=True, help="Tokens read between compressions.")
def ppl(setup: Setup, window: int, stride: int | None, windows: int, chunk: int) -> dict[str, Any]:
    """Sliding-window perplexity of METHOD."""
    stride = window // 2 if stride is None else stride
    if windows < 1 or window < 2 or stride < 1:
        raise ValueError("windows and stride must be 1 or more, window 2 or more")
    model, tokenizer = setup.load()
    ids = setup.tokens(tokenizer, window + (windows - 1) * stride, 1)[0]
    with tqdm(total=windows * (window - 1), unit="token", desc=f"perplexity of {setup.method}") as bar:
        found = kvrepro.perplexity(
            model,
            ids,
            setup.method,
            setup.budget,
            window=window,
            stride=stride,
            chunk=chunk,
            progress=bar.update,
            **setup.options,
        )
    nll, error = _mean(found.nll.mean(1))
    return setup.report(
        perplexity=found.ppl,
        nll=nll,
        nll_standard_error=error,
        window=window,
        stride=stride,
        windows=windows,
        chunk=chunk,
    )


@evaluate.command("fidelity", epilog="\b\nExample:\n  kvrepro eval fidelity kvmerger --budget 0.5 -o sigma=5.0")
@_common
@click.option("--context", default=1024, show_default=True, help="Tokens that are compressed.")
@click.option("--continuation", default=256, show_default=True, help="Tokens that are predicted.")
@click.option("-n", "--samples", default=4, show_default=True, help="Passages of the text.")
@click.option("--chunk", type=int, help="Tokens of the context read at a time.  [default: all]")
def fidelity(setup: Setup, context: int, continuation: int, samples: int, chunk: int | None) -> dict[str, Any]:
    """How far METHOD's predictions are from the full cache's: KL divergence and loss, in nats per token."""
    model, tokenizer = setup.load()
    passages = setup.tokens(tokenizer, context + continuation, samples)
    found = [
        kvrepro.fidelity(
            model,
            passage[None],
            setup.method,
            setup.budget,
            context=context,
            continuation=continuation,
            chunk=chunk,
            **setup.options,
        )
        for passage in tqdm(passages, unit="passage", desc=f"fidelity of {setup.method}")
    ]
    kl, kl_error = _mean(torch.stack([each.kl.mean() for each in found]))
    delta, delta_error = _mean(torch.stack([(each.nll - each.nll_full).mean() for each in found]))
    return setup.report(
        kl=kl,
        kl_standard_error=kl_error,
        delta_nll=delta,
        delta_nll_standard_error=delta_error,
        bytes=found[0].nbytes,
        bytes_full=found[0].nbytes_full,
        context=context,
        continuation=continuation,
        samples=samples,
    )


@evaluate.command("needle", epilog="\b\nExample:\n  kvrepro eval needle h2o --budget 0.35 --length 2048 --depth 0.5")
@_common
@executor_option
@click.option("--length", default=1024, show_default=True, help="Tokens of the prompt.")
@click.option("--depth", default=0.5, show_default=True, help="Place of the needle, 0 (start) to 1 (end).")
@click.option("-n", "--samples", default=4, show_default=True, help="Prompts, each with its own number.")
@click.option("--unseen", is_flag=True, help="Compress the text before the question is known.")
def needle(setup: Setup, length: int, depth: float, samples: int, unseen: bool) -> dict[str, Any]:
    """How well METHOD finds a number hidden in the text: share found, and log-likelihood per token of the number."""
    from kvrepro.experiments import needle as experiment
    from kvrepro.experiments.common import Variant

    if samples < 1:
        raise ValueError("samples must be 1 or more")
    record = experiment.needle(
        setup.text,
        Variant(setup.method, setup.options).label,
        length,
        depth,
        setup.budget if setup.budget is not None else 1.0,
        samples,
        "unseen" if unseen else "seen",
        model=setup.model,
        device=setup.device,
        dtype=setup.dtype,
    )[0]
    found, _ = _mean(torch.tensor(record.value.extra["found"]))
    return setup.report(
        found=found,
        log_likelihood=record.value.value,
        log_likelihood_standard_error=record.value.spread,
        slots=record.value.extra["slots"],
        length=length,
        depth=depth,
        samples=samples,
    )
