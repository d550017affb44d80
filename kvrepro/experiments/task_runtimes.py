"""KVSlimmer's Fig. 4: the time of reading LongBench's prompts, against AsymKV's.

The model has random weights, which change nothing that is computed; the prompts are LongBench's own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvrepro import models
from kvrepro.experiments import speed
from kvrepro.experiments.common import Job, Variant, as_list, parse_variants
from kvrepro.records import Cell, Record, Skip, Value
from kvrepro.tasks import longbench
from kvrepro.tasks.base import MissingData, Task, check_count, encode, pick, render
from kvrepro.texts import DATA_VARIABLE


def task_runtimes(
    setup: speed.Setup,
    tasks: str | Sequence[str],
    pair: Sequence[str] = ("kvslimmer", "asymkv"),
    *,
    budget: int | float = 2080,
    chunk: int = 512,
    samples: int | None = 3,
    max_length: int = 7500,
    tokenizer: str = models.DEFAULT,
) -> list[Record]:
    """Time of reading LongBench's prompts with one method, in per cent of another's.

    Args:
        setup: model and device. What decides the time is how many tokens a prompt has, not what the weights say.
        tasks: names in `kvrepro.tasks.longbench.NAMES`.
        pair: two methods or variants, the one whose time is given first.
        budget: slots per KV head and layer, or a share of the prompt.
        chunk: tokens read at a time.
        samples: prompts a task, the first ones; None is all.
        max_length: tokens of a prompt at most, the chat template not counted; longer ones lose their middle.
        tokenizer: model whose tokenizer reads the prompts.

    Returns:
        One record a task, see :func:`_task_runtime`; ``skipped``, with the reason, where the data are not there, and
        ``error`` where a file is damaged.

    Raises:
        ValueError: an unknown task, method or option, not two methods, or a number out of range.
    """
    variants = parse_variants(pair)
    if len(variants) != 2:
        raise ValueError(
            f"pair={list(pair)} must be two methods: the first's time is given in per cent of the second's"
        )
    if chunk < 1 or max_length < 2:
        raise ValueError(f"chunk={chunk} must be 1 or more, max_length={max_length} 2 or more")
    check_count(samples)
    labels = tuple(variant.label for variant in variants)
    ask = partial(_task_cell, setup, variants, budget=budget, chunk=chunk, max_length=max_length, tokenizer=tokenizer)
    jobs: list[Job] = []
    for name in [pick(longbench.NAMES, name, longbench.SUITE) for name in as_list(tasks)]:
        try:
            task = longbench.load(name, samples)
        except ValueError as error:
            jobs.append((ask(name, None, samples), partial(_fail, _without_folder(error))))
            continue
        run = partial(_task_runtime, setup, task, labels, budget, chunk, max_length, tokenizer)
        jobs.append((ask(name, task, len(task.samples)), run))
    return speed.sweep(jobs, "task_runtimes")


def _task_cell(
    setup: speed.Setup,
    variants: Sequence[Variant],
    name: str,
    task: Task | None,
    samples: int | None,
    *,
    budget: int | float,
    **params: object,
) -> Cell:
    """The cell of one task and two methods; without its data it cannot name their sha256."""
    single = [
        setup.cell(
            "task_runtimes", "relative runtime", "%", method=v, budget=budget, task=name, samples=samples, **params
        )
        for v in variants
    ]
    labels = [variant.label for variant in variants]
    return replace(
        single[0],
        method="+".join(cell.method for cell in single),
        options={label: cell.options for label, cell in zip(labels, single, strict=True)},
        data=task.data if task else f"{longbench.SUITE}/{name}",
        data_sha256=task.sha256 if task else "not there",
        params={**single[0].params, "label": " / ".join(labels)},
    )


def _without_folder(error: ValueError) -> Exception:
    """Why a task cannot be loaded, without where on this machine the data folder is; missing data are skipped."""
    message, named = str(error), os.environ.get(DATA_VARIABLE)
    if named:
        message = message.replace(str(Path(named).expanduser()), DATA_VARIABLE)
    return Skip(message) if isinstance(error, MissingData) else ValueError(message)


def _fail(problem: Exception) -> Value:
    """In place of measuring a task that could not be loaded."""
    raise problem


def _task_runtime(
    setup: speed.Setup,
    task: Task,
    labels: tuple[str, str],
    budget: int | float,
    chunk: int,
    max_length: int,
    tokenizer: str,
) -> Value:
    """Read every prompt of a task with two methods in turn: a machine that slows down meanwhile slows both alike.

    To warm up, both read all prompts once before on a GPU; elsewhere the beginning of one.

    Returns:
        The value is the first method's time for all prompts in per cent of the second's, see :func:`ratio_of_sums`; n
        counts prompts, each timed once. ``extra``: ``ids`` and ``tokens`` of the prompts, and ``seconds``, by method.

    Raises:
        Skip: the task has no samples.
        ValueError: the tokenizer writes tokens that the model does not know.
    """
    if not task.samples:
        raise Skip(f"{task.data} has no samples")
    prompts = _prompts(setup, task, max_length, tokenizer)
    model = setup.load()
    speed.free()
    warm = prompts if model.device.type == "cuda" else [prompts[0][:, : 2 * chunk]]  # kernels are compiled by size
    for ids, label in product(warm, labels):
        _timed_read(model, ids, label, budget, chunk)
    turns = [[_timed_read(model, ids, label, budget, chunk) for label in labels] for ids in prompts]
    times = torch.tensor(turns, dtype=torch.float64)  # [prompts, 2]
    ratio, error = ratio_of_sums(times[:, 0], times[:, 1])
    extra = {
        "ids": [sample.id for sample in task.samples],
        "tokens": [ids.numel() for ids in prompts],
        "seconds": {label: times[:, place] for place, label in enumerate(labels)},
    }
    return Value(100 * ratio, None if error is None else 100 * error, len(prompts), extra)


_tokenizer = lru_cache(maxsize=1)(models.load_tokenizer)


def _prompts(setup: speed.Setup, task: Task, max_length: int, tokenizer: str) -> list[Tensor]:
    """The prompts of a task ``[1, L]`` as LongBench asks them, on the device.

    Raises:
        ValueError: a token is none of the model's.
    """
    reader = _tokenizer(tokenizer)
    found = [encode(reader, task, render(reader, task, sample, max_length)) for sample in task.samples]
    highest, vocabulary = max(int(ids.max()) for ids in found), models.shape(setup.shape).vocab_size
    if highest >= vocabulary:
        raise ValueError(
            f"{tokenizer}'s tokenizer writes token {highest}, but {setup.shape} knows {vocabulary} tokens: choose a "
            "shape with a larger vocabulary"
        )
    return [ids.to(setup.place) for ids in found]


def _timed_read(model: PreTrainedModel, ids: Tensor, label: str, budget: int | float, chunk: int) -> float:
    """Seconds of reading one prompt.

    Raises:
        torch.OutOfMemoryError: names the method, of which there are two in a cell.
    """
    try:
        return speed.seconds_of(
            partial(speed.read_prompt, model, ids, Variant.parse(label), budget, chunk), model.device
        )
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{label}: {error}") from error


def ratio_of_sums(over: Tensor, under: Tensor) -> tuple[float, float | None]:
    """The sum of ``over`` by the sum of ``under``, both ``[n]`` and of the same things, and its standard error.

    The error is that of a ratio estimate over drawings of the things: what the ratio leaves of each pair, over the mean
    of ``under``. None for a single pair.
    """
    n, ratio = len(over), float(over.sum() / under.sum())
    if n < 2:
        return ratio, None
    left = over - ratio * under
    return ratio, float((left.square().sum() / (n - 1) / n).sqrt() / under.mean())
