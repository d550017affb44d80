"""Tasks through compressed caches: scores and log-likelihoods as records, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvrepro
from kvrepro import methods as registry
from kvrepro import models
from kvrepro.adapter import cache_arguments
from kvrepro.experiments.common import Bench, Variant, parse_variants
from kvrepro.records import Cell, Record, Skip, Store, Value
from kvrepro.tasks.base import Sample, Task, encode, encode_reference, render, token_ids
from kvrepro.tasks.intervals import Interval, bootstrap, paired
from kvrepro.tasks.metrics import METRICS

PAPER = "tasks"
#: Characters of each answer that a record keeps.
_KEPT = 200


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    Attributes:
        max_length: tokens of a prompt at most, the chat template not counted; None cuts nothing.
        chunk: tokens read between compressions; None reads a prompt in one pass.
        seed: of the method's draws, and of the bootstrap.
    """

    max_length: int | None = None
    chunk: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What came of one sample.

    Attributes:
        text: what was written.
        score: by the task's metric, in [0, 1].
        loglik: mean log-likelihood of the reference answer, nats per token.
        tokens: of the prompt, template included.
    """

    text: str
    score: float
    loglik: float
    tokens: int


def run(
    tasks: Iterable[Task],
    methods: str | Iterable[str],
    budget: int | float | None,
    *,
    reading: Reading | None = None,
    model: str = models.DEFAULT,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Measure every task with every method.

    Args:
        tasks: from the `load` functions of the suites.
        methods: methods or variants, as ``"kvmerger(sigma=5.0)"``.
        budget: slots per KV head and layer, or a share of the prompt; the full cache ignores it.
        reading: how prompts are read.
        model: model to load.
        device: device, or None for the default.
        dtype: name of a torch dtype, or None for the default.

    Returns:
        One record a task and method, see `measure`; ``skipped``, with the reason, where a task has no samples.

    Raises:
        ValueError: an unknown method or option, or a budget that leaves no room.
    """
    reading = reading or Reading()
    variants = check(methods, budget, reading)
    jobs = []
    for task, variant in product(tasks, variants):
        bench = Bench(PAPER, task.suite, model, device, dtype)
        own = None if variant.method == "full" else budget
        cell = _cell(bench, task, variant, own, reading)
        jobs.append((cell, partial(measure, bench, task, variant, own, reading)))
    return Store.default().sweep(jobs, PAPER)


def check(methods: str | Iterable[str], budget: int | float | None, reading: Reading) -> list[Variant]:
    """The variants of the methods' labels, after checking all that needs no model.

    Raises:
        ValueError: an unknown method or option, a budget that leaves no room for what a method protects, a chunk or
            length out of range.
    """
    if (reading.chunk is not None and reading.chunk < 1) or (reading.max_length is not None and reading.max_length < 2):
        raise ValueError(f"chunk={reading.chunk} must be 1 or more, max_length={reading.max_length} 2 or more")
    variants = parse_variants(methods)
    for variant in variants:
        method = registry.create(variant.method, **variant.options)
        if isinstance(budget, int) and not method.unlimited:
            method.resolve(budget).check(budget)
    return variants


def _cell(bench: Bench, task: Task, variant: Variant, budget: int | float | None, reading: Reading) -> Cell:
    return Cell(
        paper=PAPER,
        experiment=task.suite,
        metric=task.metric,
        unit="%",
        method=variant.method,
        options=registry.create(variant.method, **{"seed": reading.seed, **variant.options}).resolved(),
        model=bench.model,
        model_sha256=models.identity(bench.model),
        data=task.data,
        data_sha256=task.sha256,
        budget=budget,
        seed=reading.seed,
        params={
            "label": variant.label,
            "task": task.name,
            "samples": len(task.samples),
            "files": task.files,
            "max_length": reading.max_length,
            "chunk": reading.chunk,
            "dtype": bench.number_format,
        },
    )


@torch.no_grad()
def measure(bench: Bench, task: Task, variant: Variant, budget: int | float | None, reading: Reading) -> Value:
    """Answer the samples of one task with one method.

    Returns:
        The value is the mean score in per cent, its spread the standard error over samples. ``extra`` has, a sample,
        ``ids``, ``documents``, ``scores`` in [0, 1], ``loglik`` in nats per token, ``tokens`` of the prompt and
        ``texts``, the beginning of each answer; and ``score`` and ``mean_loglik``, each mean, low and high end of its
        95 % bootstrap interval over documents.

    Raises:
        Skip: the task has no samples.
    """
    if not task.samples:
        raise Skip(f"{task.data} has no samples")
    model, tokenizer = bench.load()
    options = {"seed": reading.seed, **variant.options, **({} if budget is None else {"budget": budget})}
    new_cache = partial(kvrepro.make_cache, model, variant.method, **options)
    samples = tqdm(task.samples, unit="sample", desc=f"{task.name} {variant.label}", leave=False, disable=None)
    answers = [ask(model, tokenizer, task, sample, new_cache, reading) for sample in samples]
    scores = [answer.score for answer in answers]
    loglik = [answer.loglik for answer in answers]
    documents = [sample.document or sample.id for sample in task.samples]
    extra = {
        "ids": [sample.id for sample in task.samples],
        "documents": documents,
        "scores": scores,
        "loglik": loglik,
        "tokens": [answer.tokens for answer in answers],
        "texts": [answer.text[:_KEPT] for answer in answers],
        "score": _listed(bootstrap([100 * score for score in scores], documents, seed=reading.seed)),
        "mean_loglik": _listed(bootstrap(loglik, documents, seed=reading.seed)),
    }
    values = 100 * torch.tensor(scores, dtype=torch.float64)
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Value(float(values.mean()), error, len(values), extra)


def _listed(interval: Interval) -> list[float | None]:
    return [interval.mean, interval.low, interval.high]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sample: Sample,
    new_cache: Callable[[], kvrepro.CompressedCache],
    reading: Reading,
) -> Answer:
    """Answer one sample, and score the reference answer after the same prompt.

    The prompt is read once for each, into a cache of its own: writing goes on compressing, scoring must not.

    Args:
        model: a prepared model.
        tokenizer: its tokenizer.
        task: says how the prompt is written and the answer scored.
        sample: the sample.
        new_cache: makes an empty cache.
        reading: how the prompt is read.
    """
    text = render(tokenizer, task, sample, reading.max_length)
    prompt = encode(tokenizer, task, text).to(model.device)
    reference = encode_reference(tokenizer, text, sample).to(model.device)
    loglik = log_likelihood(model, prompt, reference, new_cache(), reading.chunk)
    stops = end_tokens(model, tokenizer, task)
    ids = write(
        model, prompt, new_cache(), sample.max_new_tokens, stops, reading.chunk, at_least_one=task.stop_at_newline
    )
    written = str(tokenizer.decode(ids, skip_special_tokens=True))
    scored = written.lstrip("\n").split("\n")[0] if task.first_line else written
    score = METRICS[task.metric](scored, sample.answers, sample.all_classes)
    return Answer(written, score, loglik, prompt.shape[1])


def log_likelihood(
    model: PreTrainedModel, prompt: Tensor, answer: Tensor, cache: kvrepro.CompressedCache, chunk: int | None = None
) -> float:
    """Mean log-likelihood of an answer's tokens, nats per token: all in one pass over the prompt compressed once.

    Args:
        model: a prepared model.
        prompt: `[1, n]`.
        answer: `[1, a]`.
        cache: an empty cache; nothing is compressed after the prompt.
        chunk: tokens of the prompt read at a time; None is all.
    """
    logits = kvrepro.prefill(model, prompt, cache, chunk=chunk).logits[:, -1:]  # [1, 1, V]
    cache.freeze()
    if answer.shape[1] > 1:
        rest = model(input_ids=answer[:, :-1], **cache_arguments(model, cache)).logits
        logits = torch.cat([logits, rest], dim=1)  # [1, a, V]
    found = logits.float().log_softmax(-1).gather(-1, answer[..., None])  # [1, a, 1]
    return float(found.double().mean())


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[int]:
    """Tokens that end an answer: the model's and the tokenizer's, and the newline where the task says so."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, Sequence) else [named])} - {None}
    if task.stop_at_newline:
        ends.add(token_ids(tokenizer, "\n", special=False)[-1])
    return sorted(ends)


def write(
    model: PreTrainedModel,
    prompt: Tensor,
    cache: kvrepro.CompressedCache,
    max_new_tokens: int,
    stops: Sequence[int],
    chunk: int | None = None,
    *,
    at_least_one: bool = False,
) -> list[int]:
    """The likeliest token, one after another, as `kvrepro.generate` takes them.

    Args:
        model: a prepared model.
        prompt: `[1, n]`.
        cache: an empty cache.
        max_new_tokens: tokens to write at most.
        stops: tokens that end the answer; the one that did is left out of what is returned.
        chunk: tokens of the prompt read at a time; None is all.
        at_least_one: never take a stop as the first token.
    """
    logits = kvrepro.prefill(model, prompt, cache, chunk=chunk).logits[:, -1].float()  # [1, V]
    if at_least_one:
        logits[:, list(stops)] = -torch.inf
    first = logits.argmax(-1, keepdim=True)  # [1, 1]
    if max_new_tokens > 1 and int(first) not in stops:
        first = kvrepro.generate(model, first, cache, max_new_tokens - 1, eos_token_id=stops)
    ids = first[0].tolist()
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


@dataclass(frozen=True)
class Difference:
    """How much a second method differs from a first over the same samples.

    Attributes:
        score: second − first, in per cent.
        loglik: second − first, in nats per token.
    """

    score: Interval
    loglik: Interval


def compare(first: Record, second: Record, seed: int = 0) -> Difference:
    """The paired difference of two records of one task.

    Raises:
        ValueError: they are not of the same samples of the same data, or one has no value.
    """
    a, b = first.value.extra, second.value.extra
    measured = first.status == "ok" and second.status == "ok"
    if not measured or first.cell.data_sha256 != second.cell.data_sha256 or a["ids"] != b["ids"]:
        raise ValueError(f"{first.cell.label()} and {second.cell.label()} have no samples in common to compare")
    documents = a["documents"]
    scores = [[100 * score for score in extra["scores"]] for extra in (a, b)]
    return Difference(paired(*scores, documents, seed=seed), paired(a["loglik"], b["loglik"], documents, seed=seed))
