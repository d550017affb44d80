"""Which method at which budget: what the published records say, purpose by purpose, and rules that they bear out.

Every number is a loss against the full cache in nats per token, so that purposes can be read side by side: lower is
better, 0 is as good as the full cache. Sentences are made here, by rule, from records: one that no longer holds is not
made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvrepro import methods, plots
from kvrepro.ledger import select
from kvrepro.recommend import TOLERANCE
from kvrepro.records import Record, canonical
from kvrepro.rules import Comparison, label, over_seeds, with_error
from kvrepro.tasks.intervals import Interval, macro

#: Ours: a task counts as beyond a model that finds no more than this share of the answers with the full cache.
ABLE = 0.1
#: Draws of the bootstrap: fewer than on the pages of the numbers, whose intervals may differ in the last digit; ours.
DRAWS = 2_000
#: Fewer methods on the same samples are no comparison; ours.
LEAST_METHODS = 3

#: Cells of a task's reference answers after a prompt that is read at once.
_ONE_SHOT: Mapping[str, Any] = {"paper": "across", "metric": "log-likelihood", "chunk": None}

#: Losses of one method: by part (a task, a text) one number a sample, and the samples' documents.
Losses = Mapping[str, tuple[Sequence[float], Sequence[str]]]


@dataclass(frozen=True, eq=False)
class Purpose:
    """What a cache may have to be good at, and the records that measure it.

    Attributes:
        name: for readers; reads on from "if it is about".
        page: the notebook that measures it.
        where: fields and parameters of its cells, see :func:`kvrepro.ledger.select`.
        samples: extra results that hold one number a sample.
        sign: 1 where a higher sample is worse, -1 where it is better, 0 where samples are losses already.
        part: parameter or field that tells the parts apart, each of which counts alike; or two, joined by +.
        budget: budget of a cell: its size for sorting, a share of the context, and its text.
        exact: whether greedy decoding could give the very answer, so that the share found says something.
    """

    name: str
    page: str
    where: Mapping[str, Any]
    samples: str
    sign: int
    part: str
    budget: Callable[[Record], tuple[float, str]]
    exact: bool = False


def _bytes(record: Record) -> tuple[float, str]:
    share = record.cell.params["share"]
    return share, f"{100 * share:g} % of the bytes"


def _slots(record: Record) -> tuple[float, str]:
    share = float(record.cell.budget or 1)
    return share, f"{100 * share:g} % of the slots"


def _chunked(record: Record) -> tuple[float, str]:
    slots, most = int(record.cell.budget or 0), int(record.cell.params["max_length"])
    return slots / most, f"{slots:,} of {most:,} slots"


def _window(record: Record) -> tuple[float, str]:
    slots, window = int(record.cell.budget or 0), int(record.cell.params["window"])
    return slots / window, f"{slots:,} of {window:,} slots"


def _retrieval(name: str, experiment: str, task: str) -> Purpose:
    where = {**_ONE_SHOT, "experiment": experiment, "task": task}
    return Purpose(name, "across/retrieval", where, "loglik", -1, "task", _slots, exact=True)


def _longbench(name: str, chunk: int | None, budget: Callable[[Record], tuple[float, str]]) -> Purpose:
    where = {**_ONE_SHOT, "experiment": "longbench", "chunk": chunk}
    return Purpose(name, "across/longbench", where, "loglik", -1, "task", budget)


FIDELITY = Purpose(
    "fidelity to the full cache",
    "across/same_bytes",
    {"paper": "across", "experiment": "same_bytes", "seed": 0},
    "kl",
    0,
    "data",
    _bytes,
)
ONE_NEEDLE = _retrieval("one needle", "ruler", "niah_single")
RETRIEVAL = (
    ONE_NEEDLE,
    _retrieval("one needle of several", "ruler", "niah_multikey"),
    _retrieval("a fact among biographies", "synthwiki", "madlibs1"),
)
PURPOSES = (
    FIDELITY,
    _longbench("LongBench, prompts read at once", None, _slots),
    _longbench("LongBench, prompts read in chunks", 512, _chunked),
    *RETRIEVAL,
    Purpose(
        "perplexity of a stream",
        "weightedkv/perplexity",
        {"paper": "weightedkv", "experiment": "perplexity"},
        "nll",
        1,
        "data",
        _window,
    ),
)
#: Where a method is looked at part by part: a task, or the length of a prompt and the depth of the needle in it.
SINGLE = (
    _longbench("LongBench", None, _slots),
    replace(_longbench("ZeroSCROLLS", None, _slots), where={**_ONE_SHOT, "experiment": "zeroscrolls"}),
    replace(ONE_NEEDLE, name="RULER's tasks", where={**_ONE_SHOT, "experiment": "ruler"}),
    replace(ONE_NEEDLE, name="SynthWiki", where={**_ONE_SHOT, "experiment": "synthwiki"}),
    Purpose(
        "the needle map",
        "kvmerger/needle",
        {"paper": "kvmerger", "experiment": "needle", "question": "seen"},
        "loglik",
        -1,
        "length+depth",
        _slots,
    ),
)


@dataclass(frozen=True)
class Standing:
    """A method in a row.

    Attributes:
        label: the method or variant.
        loss: against the full cache, nats per token.
        behind: its loss minus the best's, paired by sample.
        losses: the samples.
        found: share of the answers that greedy decoding would begin with; None where that was not measured.
    """

    label: str
    loss: Interval
    behind: Interval
    losses: Losses
    found: float | None

    @property
    def kind(self) -> str:
        """``eviction`` or ``merging``."""
        return plots.style(self.label).kind

    @property
    def title(self) -> str:
        """Its name in figures."""
        return plots.style(self.label).title

    @property
    def level(self) -> bool:
        """Whether it is not shown to differ from the best."""
        return self.behind.low is None or self.behind.low <= 0


@dataclass(frozen=True)
class Row:
    """All methods measured for one purpose at one budget, on the same samples, with one model.

    Attributes:
        purpose: the purpose.
        model: name of the model.
        share: the budget as a share of the context.
        budget: the budget in words.
        standings: the methods, the least loss first.
        n: samples of each.
        full_found: the full cache's share of answers found; None where that was not measured.
        records: the records behind it.
    """

    purpose: Purpose
    model: str
    share: float
    budget: str
    standings: tuple[Standing, ...]
    n: int
    full_found: float | None
    records: tuple[Record, ...]

    @property
    def best(self) -> Standing:
        """The method with the least loss."""
        return self.standings[0]

    @property
    def runner_up(self) -> Standing:
        """The next one."""
        return self.standings[1]

    @property
    def able(self) -> bool:
        """Whether the model can do it with the full cache."""
        return self.full_found is None or self.full_found > ABLE

    def of(self, name: str) -> Standing | None:
        """A method's standing."""
        return next((s for s in self.standings if s.label == name), None)

    def first(self, kind: str) -> Standing | None:
        """The best method of a kind."""
        return next((s for s in self.standings if s.kind == kind), None)


def difference(first: Standing, second: Standing) -> Interval:
    """The second's loss minus the first's, paired by sample, every part counting alike."""
    parts = []
    for name, (values, documents) in first.losses.items():
        parts.append((np.subtract(second.losses[name][0], values).tolist(), documents))
    return macro(parts, draws=DRAWS)


def sign(interval: Interval) -> int:
    """1 or -1 where the whole interval lies above or below 0, else 0."""
    if interval.low is None or interval.high is None:
        return 0
    return int(interval.low > 0) - int(interval.high < 0)


def rows(records: Iterable[Record], purposes: Sequence[Purpose] = PURPOSES) -> list[Row]:
    """What the records say, purpose by purpose, the largest budget first.

    A method that draws at random counts with the mean over the seeds it was measured with. A fixed threshold, which
    leaves what it leaves, stands at no budget.

    Args:
        records: one a cell, see :func:`kvrepro.ledger.newest`.
        purposes: what to look for.
    """
    records = over_seeds([r for r in records if r.cell.options.get("budget_mode") != "threshold"])
    found = []
    for purpose in purposes:
        own = [r for r in select(records, purpose.where) if purpose.samples in r.value.extra]
        full = {_samples_of(r): r for r in own if r.cell.method == "full"}
        groups: dict[str, list[Record]] = {}
        for record in own:
            if record.cell.method != "full":
                groups.setdefault(_setting(purpose, record), []).append(record)
        made = [row for group in groups.values() if (row := _row(purpose, group, full)) is not None]
        made.sort(key=lambda row: (row.model, -row.share, row.budget, -len(row.standings), -row.n))
        found += {(row.model, row.budget): row for row in reversed(made)}.values()
    order = {purpose: place for place, purpose in enumerate(purposes)}
    return sorted(found, key=lambda row: (order[row.purpose], row.model, -row.share, -row.n))


def _setting(purpose: Purpose, record: Record) -> str:
    """What the records of a row agree in: all but method and part, and what goes with the part."""
    left_out = ("label", *purpose.part.split("+"), "samples", "files")
    params = {k: v for k, v in record.cell.params.items() if k not in left_out}
    return canonical([record.cell.model, record.cell.model_sha256, record.cell.budget, record.cell.seed, params])


def _row(purpose: Purpose, group: Sequence[Record], full: Mapping[str, Record]) -> Row | None:
    """One row; None where too few methods were measured on the same parts."""
    by_label: dict[str, dict[str, Record]] = {}
    for record in group:
        if purpose.sign == 0 or _samples_of(record) in full:
            by_label.setdefault(label(record), {})[_part(purpose, record)] = record
    whole = _on_the_same_samples(by_label, purpose.samples)
    if len(whole) < LEAST_METHODS:
        return None
    parts = sorted(next(iter(whole.values())))
    losses = {name: {part: _losses(purpose, each[part], full) for part in parts} for name, each in whole.items()}
    means = {name: macro(list(each.values()), draws=DRAWS) for name, each in losses.items()}
    order = sorted(means, key=lambda name: means[name].mean)
    nothing = Interval(0.0, None, None)
    drafts = [Standing(name, means[name], nothing, losses[name], None) for name in order]
    standings = [
        replace(each, behind=difference(drafts[0], each), found=_found(purpose, whole[each.label].values()))
        for each in drafts
    ]
    used = [record for each in whole.values() for record in each.values()]
    wholes = {key: full[key] for record in used if (key := _samples_of(record)) in full}
    n = sum(len(values) for values, _ in losses[order[0]].values())
    share, budget = purpose.budget(group[0])
    whole_found = _found(purpose, wholes.values())
    return Row(purpose, group[0].cell.model, share, budget, tuple(standings), n, whole_found, (*used, *wholes.values()))


def _part(purpose: Purpose, record: Record) -> str:
    names = purpose.part.split("+")
    return ", ".join(str(record.cell.params.get(name, getattr(record.cell, name, None))) for name in names)


def _samples_of(record: Record) -> str:
    """What a record and the full cache's of the same samples agree in."""
    cell = record.cell
    params = {name: value for name, value in cell.params.items() if name != "label"}
    return canonical([cell.paper, cell.experiment, cell.metric, cell.model_sha256, cell.data_sha256, params])


def _on_the_same_samples(by_label: Mapping[str, dict[str, Record]], samples: str) -> dict[str, dict[str, Record]]:
    """The parts and samples that most methods have (of equals the most parts), with all methods that have them."""
    seen = {name: {part: _sampled(r, samples) for part, r in parts.items()} for name, parts in by_label.items()}
    commonest = Counter(frozenset(parts.items()) for parts in seen.values())
    wanted = max(commonest, key=lambda parts: (commonest[parts], len(parts)), default=frozenset())
    there = [name for name, parts in seen.items() if wanted <= parts.items()]
    return {name: {part: by_label[name][part] for part, _ in sorted(wanted)} for name in there}


def _sampled(record: Record, samples: str) -> str:
    """What records of the same samples agree in."""
    extra = record.value.extra
    return canonical([record.cell.data_sha256, extra.get("ids", []), len(extra[samples])])


def _losses(purpose: Purpose, record: Record, full: Mapping[str, Record]) -> tuple[list[float], list[str]]:
    """Losses of one part, a number a sample, and their documents."""
    values = np.asarray(record.value.extra[purpose.samples], dtype=float)
    if purpose.sign:
        whole = full[_samples_of(record)].value.extra[purpose.samples]
        values = purpose.sign * (values - np.asarray(whole, dtype=float))
    documents = record.value.extra.get("documents", [str(i) for i in range(len(values))])
    return values.tolist(), [str(document) for document in documents]


def _found(purpose: Purpose, records: Iterable[Record]) -> float | None:
    """Share of the answers found, where that says something."""
    if not purpose.exact:
        return None
    exact = [value for record in records for value in record.value.extra.get("exact", ())]
    return float(np.mean(exact)) if exact else None


@dataclass(frozen=True)
class Beside:
    """A method beside the best eviction in one part of a purpose.

    Attributes:
        part: the task, or the needle's length and depth.
        rival: the eviction with the least loss there, of those measured on the same samples.
        gap: the method's loss minus the rival's, paired by sample.
        theirs: the rival's loss against the full cache, below 0 where it is better than that.
    """

    part: str
    rival: Standing
    gap: Comparison
    theirs: Comparison


def beside_evictions(row: Row, name: str) -> list[Beside]:
    """A method beside the best eviction of each part; empty where the row lacks the method or has no eviction."""
    own, rivals = row.of(name), [s for s in row.standings if s.kind == "eviction"]
    pairs = []
    for part, (losses, _) in own.losses.items() if own and rivals else ():
        rival = min(rivals, key=lambda each: np.mean(each.losses[part][0]))  # noqa: B023
        theirs = rival.losses[part][0]
        pairs.append(Beside(part, rival, _mean(part, np.subtract(losses, theirs)), _mean(part, np.asarray(theirs))))
    return pairs


def _mean(name: str, samples: np.ndarray) -> Comparison:
    """The mean of losses with its interval."""
    error = float(samples.std(ddof=1)) / len(samples) ** 0.5 if len(samples) > 1 else None
    return with_error(name, float(samples.mean()), error, len(samples), "nats/token")


def missing(found: Sequence[Row], purposes: Sequence[Purpose] = PURPOSES) -> dict[str, list[str]]:
    """By purpose the methods without a record in any of its rows."""
    lacks = {}
    for purpose in purposes:
        there = {s.label.partition("(")[0] for row in found if row.purpose is purpose for s in row.standings}
        lacks[purpose.name] = [name for name in methods.names() if name != "full" and name not in there]
    return lacks


@dataclass(frozen=True)
class Beyond:
    """A task that the model cannot do with the full cache.

    Attributes:
        task: its name.
        model: the model.
        found: share of the answers found.
        n: prompts.
    """

    task: str
    model: str
    found: float
    n: int


def beyond(records: Iterable[Record]) -> list[Beyond]:
    """Retrieval tasks that tell nothing about caches: the model finds :data:`ABLE` of the answers at most."""
    whole = select(records, {"paper": "across", "experiment": ["ruler", "synthwiki"], "method": "full"})
    found = [
        Beyond(str(r.cell.params["task"]), r.cell.model, float(np.mean(r.value.extra["exact"])), r.value.n)
        for r in whole
        if "exact" in r.value.extra
    ]
    return sorted((each for each in found if each.found <= ABLE), key=lambda each: (each.model, each.task))


def within(records: Iterable[Record]) -> list[Record]:
    """The records without those of tasks that the model cannot do with the full cache (:func:`beyond`)."""
    records = list(records)
    unable = {(each.model, each.task) for each in beyond(records)}
    return [r for r in records if (r.cell.model, str(r.cell.params.get("task"))) not in unable]


def harmful(records: Iterable[Record]) -> dict[str, list[Comparison]]:
    """Merges that leave a larger error of the attention output than evicting from the same slots, at every budget.

    Returns:
        By method the share of the avoidable error removed, below 0, at each budget.
    """
    own = select(records, {"paper": "across", "experiment": "best_merge", "metric": "avoidable error removed"})
    by_label: dict[str, list[Comparison]] = {}
    for record in own:
        value, budget = record.value, f"{100 * float(record.cell.budget or 1):g} % of the slots"
        by_label.setdefault(label(record), []).append(
            with_error(budget, float(value.value or 0), value.spread, value.n)
        )
    return {name: each for name, each in by_label.items() if all(c.sign() == -1 for c in each)}


# --- cost


@dataclass(frozen=True)
class Cost:
    """What a method costs with a prompt of one length, beside the full cache on the same device.

    Attributes:
        label: the method.
        read: seconds to read the prompt and compress it.
        more: the same minus the full cache's.
        token: milliseconds for a token written after it, None where that was not measured.
        nbytes: bytes held after the prompt.
    """

    label: str
    read: Comparison
    more: Comparison
    token: Comparison | None
    nbytes: int


@dataclass(frozen=True)
class Costs:
    """Costs at one shape of model and length of prompt.

    Attributes:
        model: the shape.
        device: what it was measured on.
        length: tokens of the prompt.
        share: of the slots that methods keep.
        full: the full cache's.
        methods: the methods', the fastest reading first.
        records: the records behind it.
    """

    model: str
    device: str
    length: int
    share: float
    full: Cost
    methods: tuple[Cost, ...]
    records: tuple[Record, ...]

    def saved_after(self, cost: Cost) -> float | None:
        """Tokens to write until a method has taken less time than the full cache.

        0 where its reading is not shown to take longer; None where its steps are not shown to be shorter.
        """
        step, whole = cost.token, self.full.token
        if step is None or whole is None or None in (step.high, whole.low) or step.high >= whole.low:
            return None
        return 1000 * cost.more.mean / (whole.mean - step.mean) if cost.more.sign() == 1 else 0.0


def costs(records: Iterable[Record]) -> list[Costs]:
    """What methods cost, one for each shape of model: the longest prompt that enough methods read in one pass."""
    timed = [r for r in records if r.status == "ok" and r.cell.paper == "speed"]
    own = [r for r in timed if r.cell.params.get("peer") is None and r.cell.params.get("batch") == 1]
    reads = [r for r in own if r.cell.experiment in ("prefill", "fit") and r.cell.params.get("chunk") is None]
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in reads:
        key = (record.cell.model, str(record.provenance.get("device")), int(record.cell.params["length"]))
        groups.setdefault(key, []).append(record)
    steps = [r for r in own if r.cell.experiment == "decode" and not r.cell.params.get("compile")]
    best: dict[str, Costs] = {}
    for (model, device, length), group in sorted(groups.items()):
        there = [r for r in steps if (r.cell.model, str(r.provenance.get("device"))) == (model, device)]
        made = _costs(model, device, length, group, there)
        if made is not None:
            best[model] = made  # the longest comes last
    return list(best.values())


def _costs(model: str, device: str, length: int, reads: Sequence[Record], steps: Sequence[Record]) -> Costs | None:
    whole = max((r for r in reads if r.cell.method == "full"), key=lambda r: r.value.n, default=None)
    shares = {r.cell.budget for r in reads if isinstance(r.cell.budget, float)}
    if whole is None or not shares:
        return None
    share = min(shares)
    by_label = {label(r): r for r in sorted(reads, key=lambda r: r.value.n) if r.cell.budget == share}
    chosen = list(by_label.values())  # the most repeats where one was timed twice
    if len(chosen) < LEAST_METHODS:
        return None
    made = [_cost(r, whole, steps, round(length * share)) for r in chosen]
    first = _cost(whole, whole, steps, length)
    made.sort(key=lambda cost: cost.read.mean)
    used = (whole, *chosen, *(r for r in steps if r.cell.params.get("slots") in (length, round(length * share))))
    return Costs(model, device, length, share, first, tuple(made), used)


def _cost(record: Record, whole: Record, steps: Sequence[Record], slots: int) -> Cost:
    own = [r for r in steps if label(r) == label(record) and r.cell.params.get("slots") == slots]
    fastest = min(own, key=lambda r: r.value.value or 0, default=None)  # where the same was run in two ways
    token = None if fastest is None else timed(fastest, "ms")
    return Cost(label(record), timed(record, "s"), apart(record, whole), token, int(record.value.extra["cache"]))


def timed(record: Record, unit: str) -> Comparison:
    """A record's time with its interval."""
    return with_error(label(record), float(record.value.value or 0), record.value.spread, record.value.n, unit)


def apart(record: Record, other: Record) -> Comparison:
    """The first's time minus the other's: runs that are not paired, so their errors add up."""
    mean = float(record.value.value or 0) - float(other.value.value or 0)
    n = min(record.value.n, other.value.n)
    errors = [record.value.spread, other.value.spread]
    error = None if record is other or None in errors else float(np.hypot(*errors))
    return with_error(label(record), mean, error, n, "s")


# --- rules


def advice(found: Sequence[Row], spent: Sequence[Costs], records: Sequence[Record]) -> list[str]:
    """Sentences "if …, then …" that the records bear out, in order; those that they do not are not made.

    Args:
        found: from :func:`rows`.
        spent: from :func:`costs`.
        records: one a cell.
    """
    said: list[str] = []
    several = len({row.model for row in found}) > 1
    for model in dict.fromkeys(row.model for row in found):
        own = [row for row in found if row.model == model and row.able]
        where = f"With {model}: " if several else ""
        for rule in (_always, _facts, _kinds, _variants, _enough):
            said += [where + sentence for sentence in rule(own)]
    for each in spent:
        said += _speed(each)
    return [*said, *_throughput(records)]


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.0f} %"


def _named(labels: Iterable[str]) -> str:
    """Titles of methods, any of which will do."""
    return in_words([plots.style(name).title for name in labels], "or")


def in_words(words: Sequence[str], last: str = "and") -> str:
    """Words in a sentence."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _span(own: Sequence[Row]) -> str:
    """The budgets of rows in words: ``50, 25 % of the bytes``."""
    budgets = list(dict.fromkeys(row.budget for row in own))
    numbers, units = zip(*(budget.split(" ", 1) for budget in budgets), strict=True)
    return f"{', '.join(numbers)} {units[0]}" if len(set(units)) == 1 else "; ".join(budgets)


def _always(own: Sequence[Row]) -> Iterator[str]:
    """Methods that are the best, or level with it, at every budget of a purpose; else the best of each budget."""
    for purpose in dict.fromkeys(row.purpose for row in own):
        group = [row for row in own if row.purpose is purpose]
        stay = [s.label for s in group[0].standings if all((x := row.of(s.label)) and x.level for row in group)]
        if stay:
            budgets = f"at every budget measured ({_span(group)})" if len(group) > 1 else f"at {group[0].budget}"
            yield (
                f"**If it is about {purpose.name}, take {_named(stay)}**: the best, or not shown to differ from the "
                f"best, {budgets}."
            )
        else:
            level = [[s.label for s in row.standings if s.level] for row in group]
            each = "; ".join(f"{_named(labels)} at {row.budget}" for labels, row in zip(level, group, strict=True))
            names = {label.partition("(")[0] for labels in level for label in labels}
            if len(names) == 1:
                yield (
                    f"**If it is about {purpose.name}, take {_named(names)}**; which of its variants is the best "
                    f"depends on the budget: {each}."
                )
            else:
                yield f"**If it is about {purpose.name}, it depends on the budget**: {each}."


def _facts(own: Sequence[Row]) -> Iterator[str]:
    """Where the method with the least divergence loses facts that another one keeps."""
    near = [row for row in own if row.purpose is FIDELITY]
    lost = []
    for row in own:
        if row.purpose not in RETRIEVAL or not near:
            continue
        closest = min(near, key=lambda other: abs(other.share - row.share))
        there = next((x for s in closest.standings if (x := row.of(s.label))), None)  # variants may lack it
        if there is None or there.level or there.found is None or row.best.found is None:
            continue
        if there.found < row.best.found:  # a lower likelihood alone loses no fact
            lost.append(
                f"{row.purpose.name}, {row.budget}: {there.title} succeeds in {percent(there.found)} of the prompts, "
                f"{row.best.title} in {percent(row.best.found)}"
            )
    if lost:
        yield (
            "**If single facts must survive, do not choose by the mean divergence**: of the methods measured on both "
            f"the one nearest to the full cache's predictions loses facts that another one keeps ({'; '.join(lost)})."
        )


def _kinds(own: Sequence[Row]) -> Iterator[str]:
    """Whether merging or eviction is ahead more often."""
    signs = [outcome for row in own if (outcome := merging_against_eviction(row)) is not None]
    better, worse = (sum(s == -1 for _, s in signs), sum(s == 1 for _, s in signs))
    if not signs or better == worse:
        return
    counted = (
        f"the best method that merges is better than the best that evicts in {better} of {len(signs)} comparisons, "
        f"worse in {worse}, and not shown to differ in the others"
    )
    if worse > better:
        yield f"**If nothing else decides, evict**: {counted}."
    else:
        yield f"**If nothing else decides, merge**: {counted}."


def merging_against_eviction(row: Row) -> tuple[Interval, int] | None:
    """The best merging method's loss minus the best evicting one's, and its sign; None where a kind is missing."""
    merge, evict = row.first("merging"), row.first("eviction")
    if merge is None or evict is None:
        return None
    gap = difference(evict, merge)
    return gap, sign(gap)


def _variants(own: Sequence[Row]) -> Iterator[str]:
    """Variants that diverge less than their method as published at every share of the bytes."""
    near = [row for row in own if row.purpose is FIDELITY]
    for variant in near[0].standings if near else ():
        base = variant.label.partition("(")[0]
        pairs = [(a, b) for row in near if (a := row.of(base)) and (b := row.of(variant.label))]
        if base == variant.label or len(pairs) < len(near):
            continue
        gaps = [difference(a, b) for a, b in pairs]
        if all(sign(gap) == -1 for gap in gaps):
            yield (
                f"**If you use {plots.style(base).title}, use `{variant.label}`**: its predictions are nearer to the "
                f"full cache's at every budget measured ({_span(near)}), by "
                f"{-max(g.mean for g in gaps):.2g} to {-min(g.mean for g in gaps):.2g} nats per token."
            )


def _enough(own: Sequence[Row]) -> Iterator[str]:
    """The least bytes at which some method stays within the tolerance."""
    fit = [row for row in own if row.purpose is FIDELITY and row.best.loss.mean <= TOLERANCE]
    if fit:
        least = min(fit, key=lambda row: row.share)
        yield (
            f"**If the divergence may be {TOLERANCE:g} nats per token, {least.budget} are enough**, the least measured "
            f"that are, with {least.best.title} ({least.best.loss.mean:.3g})."
        )


def _speed(spent: Costs) -> Iterator[str]:
    """Whether reading becomes faster, and after how many tokens a smaller cache has saved time."""
    where = f"a prompt of {spent.length:,} tokens at the shape of {spent.model}, one text at a time on {spent.device}"
    slower = [c.more.mean / spent.full.read.mean for c in spent.methods if c.more.sign() == 1]
    faster = [c for c in spent.methods if c.more.sign() == -1]
    if slower and not faster:
        yield (
            f"**If you only read, do not compress for speed**: with {where}, {len(slower)} of {len(spent.methods)} "
            f"methods take longer than the full cache, by {percent(min(slower))} to {percent(max(slower))}, and none "
            "is shown to take less."
        )
    after = {c.label: n for c in spent.methods if (n := spent.saved_after(c)) is not None}
    if after:
        at_once = [plots.style(name).title for name, n in after.items() if not n]
        later = [f"{plots.style(name).title} {n:,.0f}" for name, n in sorted(after.items(), key=lambda x: x[1]) if n]
        yield (
            f"**If you write after reading, a smaller cache saves time as well as memory**: after {where}, "
            f"{percent(spent.share)} of the slots have saved time with {len(after)} of {len(spent.methods)} methods"
            + (f", from the first token on with {in_words(at_once)}" if at_once else "")
            + (f"; tokens to write until then: {', '.join(later)}" if later else "")
            + "."
        )


def _throughput(records: Sequence[Record]) -> Iterator[str]:
    """As many rows as memory holds, written side by side."""
    own = select(records, {"paper": "speed", "experiment": "throughput"})
    for record in own:
        length = record.cell.params["length"]
        same = [r for r in own if r.cell.model == record.cell.model and r.cell.params["length"] == length]
        whole = next((r for r in same if r.cell.method == "full"), None)
        if record.cell.method == "full" or whole is None:
            continue
        ratio = float(record.value.value or 0) / float(whole.value.value or 1)
        peer = whole.cell.params.get("peer")
        if ratio > 1:
            yield (
                f"**If memory limits how many texts are written side by side, compress**: at the shape of "
                f"{record.cell.model} after {length:,} tokens, as many rows as fit give {record.value.value:,.0f} "
                f"tokens per second with {plots.style(label(record)).title} and {whole.value.value:,.0f} with the full "
                f"cache{f' in {peer}' if peer else ''}, {ratio:.1f} times as many"
                + (", a part of which is this package's faster steps." if peer else ".")
            )
