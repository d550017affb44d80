"""``kvrepro recommend``: which method to use for a model, a text and a budget, measured on this machine."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click
from tqdm import tqdm

import kvrepro
from kvrepro import methods as registry
from kvrepro import models, texts
from kvrepro.cli_eval import Budget, completed
from kvrepro.experiments.common import parse_variants
from kvrepro.recommend import CANDIDATES, Setting, check, read_text

_DEFAULT = Setting()


class _Bar:
    """A progress bar made when the number of steps is known."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        """As :data:`kvrepro.recommend.Progress` has it."""
        if self._bar is None:
            self._bar = tqdm(total=total, unit="step", desc="recommend", dynamic_ncols=True)
        self._bar.update(done - self._bar.n)
        self._bar.set_postfix_str(what)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


@click.command(
    "recommend",
    epilog="\b\nExamples:\n  kvrepro recommend\n  kvrepro recommend --budget 0.5 --budget 0.25 --text notes.txt\n"
    "  kvrepro recommend --model Qwen/Qwen2.5-0.5B-Instruct --budget 0.25 --method h2o --method 'kvmerger(sigma=5.0)'",
)
@click.option(
    "--budget",
    "budgets",
    type=Budget(),
    multiple=True,
    default=[0.25],
    show_default=True,
    help="Share of the full cache's bytes (0.25), or slots per KV head and layer (256); may be given several times.",
)
@click.option("--model", default=models.DEFAULT, show_default=True, help="Embedded, a hub id or a folder.")
@click.option(
    "--text",
    default="essays",
    show_default=True,
    help=f"A text file of yours, or one of {', '.join(texts.names())}.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=CANDIDATES,
    shell_complete=completed(registry.names),
    help=f"Such as h2o or 'kvmerger(sigma=5.0)'; may be given several times.  [default: {', '.join(CANDIDATES)}]",
)
@click.option(
    "--tolerance",
    default=_DEFAULT.tolerance,
    show_default=True,
    help="Divergence above which no method helps, nats per token.",
)
@click.option("--context", default=_DEFAULT.context, show_default=True, help="Tokens that are compressed.")
@click.option("--continuation", default=_DEFAULT.continuation, show_default=True, help="Tokens that are predicted.")
@click.option("-n", "--passages", default=_DEFAULT.passages, show_default=True, help="Passages of the text.")
@click.option(
    "--needles",
    default=_DEFAULT.needles,
    show_default=True,
    help="Prompts as long as the context with a number hidden in them; 0 leaves retrieval out.",
)
@click.option(
    "--answer", default=_DEFAULT.answer, show_default=True, help="Tokens written after a prompt, for the cost."
)
@click.option("--repeats", default=_DEFAULT.repeats, show_default=True, help="Times that each method is timed.")
@click.option("--seed", default=_DEFAULT.seed, show_default=True, help="Of all random draws.")
@click.option("--device", help="As torch calls it.  [default: cuda where there is a GPU]")
@click.option("--dtype", help="As torch calls it.  [default: bfloat16 on a GPU, else float32]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the numbers of each passage and prompt.")
def recommend_command(
    budgets: tuple[int | float, ...],
    model: str,
    text: str,
    methods: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Say which method to use for a model, a text and a budget, from measuring them here.

    Methods are compared at equal bytes: their divergence from the full cache, whether they still find a needle, and the
    time to read a prompt and to write. The verdict follows a rule, which is printed, and may be to keep the full cache.
    Nothing is stored. A long context, a large model or slow methods such as KVSlimmer take their time on a CPU.
    """
    setting = Setting(**sizes)
    check(budgets, parse_variants(methods), setting)
    source = read_text(text)
    found = _measured(kvrepro.load_model(model, device=device, dtype=dtype), budgets, source, methods, setting)
    found = dataclasses.replace(found, model=model)
    click.echo(json.dumps(found.as_dict(), indent=1) if as_json else str(found))


def _measured(
    pair: tuple[Any, Any],
    budgets: tuple[int | float, ...],
    source: texts.Text,
    methods: tuple[str, ...],
    setting: Setting,
) -> kvrepro.Recommendation:
    """Measure with a progress bar."""
    click.echo(
        f"{len(methods)} methods at {len(budgets)} budget{'s' * (len(budgets) > 1)}: {setting.passages} passages of "
        f"{setting.context} + {setting.continuation} tokens, {setting.needles} prompts with a needle, times",
        err=True,
    )
    bar = _Bar()
    try:
        return kvrepro.recommend(*pair, budgets, text=source, methods=methods, setting=setting, progress=bar)
    except KeyboardInterrupt:
        bar.close()
        click.echo("stopped; nothing is kept, a verdict needs all methods", err=True)
        raise SystemExit(130) from None
    finally:
        bar.close()
