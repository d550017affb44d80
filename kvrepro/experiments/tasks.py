"""Long-context tasks with every method at the papers' budgets: LongBench, QMSum, RULER-style needles, SynthWiki.

A task is measured in two ways, each a record of its own: the log-likelihood of the reference answers, and the scores of
written answers, which cost far more. Nothing here needs more than torch and transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

import kvrepro
from kvrepro import methods as registry
from kvrepro import models
from kvrepro.experiments.common import Bench, Job, Variant, as_list, parse_variants
from kvrepro.records import Cell, Record, Skip, Store, Value
from kvrepro.tasks import longbench as longbench_suite
from kvrepro.tasks import ruler, synthwiki, zeroscrolls
from kvrepro.tasks.base import MissingData, Task, folder, pick
from kvrepro.tasks.batch import Prompts, score_references, write_answers

PAPER = "across"
#: What is measured of each task.
MEASURES = ("loglik", "score")
#: The nine tasks of KVMerger's LongBench table.
KVMERGER_TASKS = (
    "2wikimqa",
    "gov_report",
    "narrativeqa",
    "passage_retrieval_en",
    "multifieldqa_en",
    "trec",
    "multi_news",
    "triviaqa",
    "qasper",
)
#: Characters of each answer that a record keeps.
_KEPT = 120


@dataclass(frozen=True)
class Setting:
    """How the prompts of a suite are read.

    Attributes:
        max_length: tokens of a prompt at most, the chat template not counted; None cuts nothing.
        chunk: tokens read between compressions; None compresses a prompt once, in one shot.
        samples: samples a task at most; None is all.
        seed: of all random draws.
        rows: prompts read side by side, see `kvrepro.tasks.batch.Prompts`.
    """

    max_length: int | None = None
    chunk: int | None = None
    samples: int | None = None
    seed: int = 0
    rows: int | None = None


def longbench(
    tasks: str | Sequence[str],
    methods: str | Iterable[str],
    budget: int | float | Sequence[int | float],
    *,
    measure: str | Sequence[str] = "loglik",
    samples: int | None = None,
    max_length: int | None = 2048,
    chunk: int | None = None,
    seed: int = 0,
    rows: int | None = None,
    model: str = models.DEFAULT,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """LongBench's English tasks and, under the name ``zeroscrolls/qmsum``, the one of ZeroSCROLLS that can be asked.

    Args:
        tasks: names in `kvrepro.tasks.longbench.NAMES`, or ``zeroscrolls/qmsum``.
        methods: methods or variants; the full cache is measured once, whatever the budgets.
        budget: slots per KV head and layer, or shares of the prompt; one or several.
        measure: ``loglik``, ``score``, or both.
        samples: samples a task at most; None is all.
        max_length: tokens of a prompt at most; longer ones lose their middle (QMSum: their end).
        chunk: tokens read between compressions; None compresses once, in one shot.
        seed: of all random draws.
        rows: prompts read side by side; None is 16 on a GPU, else 4. Results do not depend on it.
        model: model to load.
        device: device, or None for the default.
        dtype: name of a torch dtype, or None for the default.

    Returns:
        One record a task, method, budget and measure, task by task; ``skipped``, with the reason, where the data are
        not there, and ``error`` where a file is damaged. See `_loglik` and `_score` for what they hold.

    Raises:
        ValueError: an unknown task, method, option or measure, or a budget that leaves no room.
    """
    setting = Setting(max_length, chunk, samples, seed, rows)
    loaders = [_longbench_loader(name, samples) for name in as_list(tasks)]
    bench = partial(Bench, PAPER, model=model, device=device, dtype=dtype)
    return _sweep(bench, loaders, methods, as_list(budget), as_list(measure), setting)


def retrieval(
    tasks: str | Sequence[str],
    methods: str | Iterable[str],
    budget: int | float | Sequence[int | float],
    *,
    length: int,
    samples: int | None = 4,
    measure: str | Sequence[str] = "loglik",
    chunk: int | None = None,
    seed: int = 0,
    rows: int | None = None,
    model: str = models.DEFAULT,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Facts to be found in a long prompt: needles made from a seed and, where the data are there, SynthWiki.

    Args:
        tasks: names in `kvrepro.tasks.ruler.NAMES` or `kvrepro.tasks.synthwiki.NAMES`.
        methods: as in `longbench`.
        budget: as in `longbench`.
        length: tokens of a prompt: with what is to be written for needles, of all biographies for SynthWiki.
        samples: prompts a task; None is all (SynthWiki only).
        measure: as in `longbench`.
        chunk: as in `longbench`.
        seed: as in `longbench`; of the needles, too.
        rows: as in `longbench`.
        model: as in `longbench`.
        device: as in `longbench`.
        dtype: as in `longbench`.

    Returns:
        As `longbench`.

    Raises:
        ValueError: as `longbench`, or a length with no room.
    """
    setting = Setting(None, chunk, samples, seed, rows)
    loaders = [_retrieval_loader(name, model, length, samples, seed) for name in as_list(tasks)]
    bench = partial(Bench, PAPER, model=model, device=device, dtype=dtype)
    return _sweep(bench, loaders, methods, as_list(budget), as_list(measure), setting, length=length)


@dataclass(frozen=True)
class _Loader:
    """A task that may not be there: its suite, its name, its metric, and what loads it."""

    suite: str
    name: str
    metric: str
    load: Callable[[], Task]


def _longbench_loader(name: str, samples: int | None) -> _Loader:
    """A task of LongBench, or QMSum."""
    suite, _, rest = name.rpartition("/")
    if suite == zeroscrolls.SUITE:
        pick(zeroscrolls.NAMES, rest, suite)
        return _Loader(suite, rest, "rouge_geometric", partial(zeroscrolls.load, rest, samples))
    pick((*longbench_suite.NAMES, *(f"{zeroscrolls.SUITE}/{each}" for each in zeroscrolls.NAMES)), name, "longbench")
    return _Loader(
        longbench_suite.SUITE, name, longbench_suite.METRIC[name], partial(longbench_suite.load, name, samples)
    )


def _retrieval_loader(name: str, model: str, length: int, samples: int | None, seed: int) -> _Loader:
    """A generated task, or one of SynthWiki."""
    pick((*ruler.NAMES, *synthwiki.NAMES), name, "retrieval")

    def load() -> Task:
        """The task; only now the tokenizer is needed."""
        tokenizer = _tokenizer(model)
        if name in synthwiki.NAMES:
            return synthwiki.load(name, tokenizer, length, samples, seed)
        return ruler.load(name, tokenizer, length, samples or 1, seed)

    if name in synthwiki.NAMES:
        return _Loader(synthwiki.SUITE, name, "contains", load)
    return _Loader(ruler.SUITE, name, "share_found", load)


_tokenizer = functools.lru_cache(maxsize=1)(models.load_tokenizer)


def _sweep(
    make_bench: Callable[..., Bench],
    loaders: Sequence[_Loader],
    methods: str | Iterable[str],
    budgets: Sequence[int | float],
    measures: Sequence[str],
    setting: Setting,
    **params: object,
) -> list[Record]:
    """Measure every task with every method at every budget."""
    if wrong := sorted(set(measures) - set(MEASURES)):
        raise ValueError(f"measure={wrong[0]!r} is not valid; choose among {', '.join(MEASURES)}")
    variants = parse_variants(methods)
    _check(variants, budgets, setting)
    jobs: list[Job] = []
    for loader in loaders:
        bench = make_bench(experiment=loader.suite)
        task, problem = _load(loader)
        prompts = None if task is None else Prompts(bench, task, setting.max_length, setting.rows)
        for variant, measure in product(variants, measures):
            for budget in [None] if variant.method == "full" else budgets:
                cell = _cell(bench, loader, task, variant, budget, measure, setting, params)
                run = partial(_fail, problem) if prompts is None else partial(_measure, prompts, cell)
                jobs.append((cell, run))
    return Store.default().sweep(jobs, f"{PAPER}/{loaders[0].suite}" if loaders else PAPER)


def _check(variants: Sequence[Variant], budgets: Sequence[int | float], setting: Setting) -> None:
    """Check what needs no model.

    Raises:
        ValueError: a chunk or length out of range, or a budget that leaves no room for what a method protects.
    """
    if (setting.chunk or 1) < 1 or (setting.max_length or 2) < 2:
        raise ValueError(f"chunk={setting.chunk} must be 1 or more, max_length={setting.max_length} 2 or more")
    for variant, budget in product(variants, budgets):
        method = registry.create(variant.method, **variant.options)
        if isinstance(budget, int) and not method.unlimited:
            method.resolve(budget).check(budget)


def _load(loader: _Loader) -> tuple[Task | None, Exception | None]:
    """The task, or what stands in its way: its data are not there, or they are damaged."""
    try:
        return loader.load(), None
    except MissingData as error:
        return None, Skip(_without_folder(str(error)))
    except ValueError as error:
        if loader.suite == ruler.SUITE:
            raise
        return None, ValueError(_without_folder(str(error)))


def _without_folder(message: str) -> str:
    """A message that does not say where on this machine the data folder is."""
    try:
        return message.replace(f"{folder('')}/", "KVREPRO_DATA_DIR/")
    except MissingData:
        return message


def _fail(problem: Exception) -> Value:
    """In place of measuring a task that could not be loaded."""
    raise problem


def _cell(
    bench: Bench,
    loader: _Loader,
    task: Task | None,
    variant: Variant,
    budget: int | float | None,
    measure: str,
    setting: Setting,
    params: dict[str, object],
) -> Cell:
    """The cell of one task, method, budget and measure; without its data it cannot name their sha256."""
    options = registry.create(variant.method, **{"seed": setting.seed, **variant.options}).resolved()
    found = len(task.samples) if task else setting.samples
    return Cell(
        paper=PAPER,
        experiment=bench.experiment,
        metric="log-likelihood" if measure == "loglik" else loader.metric,
        unit="nats/token" if measure == "loglik" else "%",
        method=variant.method,
        options=options,
        model=bench.model,
        model_sha256=models.identity(bench.model),
        data=task.data if task else f"{loader.suite}/{loader.name}",
        data_sha256=task.sha256 if task else "not there",
        budget=budget,
        seed=setting.seed,
        params={
            "label": variant.label,
            "task": loader.name,
            "measure": measure,
            "samples": found,
            "max_length": setting.max_length,
            "chunk": setting.chunk,
            "dtype": bench.number_format,
            **params,
        },
    )


def _measure(prompts: Prompts, cell: Cell) -> Value:
    """Measure a cell.

    Raises:
        Skip: the task has no samples.
    """
    if not prompts.task.samples:
        raise Skip(f"{prompts.task.data} has no samples")
    model, _ = prompts.bench.load()
    budget = {} if cell.budget is None else {"budget": cell.budget}
    new_cache = partial(kvrepro.make_cache, model, cell.method, **budget, **cell.options)
    take = _loglik if cell.params["measure"] == "loglik" else _score
    return take(prompts, new_cache, cell.params["chunk"])


def _loglik(prompts: Prompts, new_cache: Callable[[], kvrepro.CompressedCache], chunk: int | None) -> Value:
    """Log-likelihood of the reference answers.

    Returns:
        The value is the mean, nats per token, its spread the standard error over samples. ``extra`` has, a sample,
        ``ids``, ``documents``, ``loglik``, ``exact`` (1 where greedy decoding begins with the answer, the cache no
        longer compressed while it is read), ``tokens`` of the prompt, and ``slots``: what a head holds of it, mean over
        layers. Where the method counts it also ``fallbacks``: how often a head of any layer fell back to plain
        eviction.
    """
    found = score_references(prompts, new_cache, chunk)
    extra = {
        "loglik": [each.loglik for each in found],
        "exact": [int(each.exact) for each in found],
        "tokens": [each.tokens for each in found],
        "slots": [each.slots for each in found],
    }
    if found[0].fallbacks is not None:
        extra["fallbacks"] = [each.fallbacks for each in found]
    return _value(extra["loglik"], prompts.task, extra)


def _score(prompts: Prompts, new_cache: Callable[[], kvrepro.CompressedCache], chunk: int | None) -> Value:
    """Scores of what the model writes, the cache held to its budget meanwhile.

    Returns:
        The value is the mean by the task's metric in per cent, its spread the standard error over samples. ``extra``
        has, a sample, ``ids``, ``documents``, ``scores`` in per cent and ``texts``, the beginning of each answer.
    """
    found = write_answers(prompts, new_cache, chunk)
    scores = [100 * score for _, score in found]
    return _value(scores, prompts.task, {"scores": scores, "texts": [text[:_KEPT] for text, _ in found]})


def _value(values: Sequence[float], task: Task, extra: dict[str, object]) -> Value:
    """Mean and standard error over samples, with what tells the samples and the copy of the data apart."""
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std()) / len(x) ** 0.5 if len(x) > 1 else None
    about = {
        "ids": [sample.id for sample in task.samples],
        "documents": [sample.document or sample.id for sample in task.samples],
        "files": dict(task.files),  # sha256 of each: which copy it was
    }
    return Value(float(x.mean()), error, len(x), {**about, **extra})
