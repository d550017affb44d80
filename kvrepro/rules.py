"""Rules of the ledger: from records to a verdict on a claim, always the same way.

A rule is a function of records and of the parameters that ``kvrepro/data/claims.yml`` gives it. It returns what was
compared, each with its interval, and a verdict. What a rule asks of the numbers is its ``text``, which the ledger's
page prints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from kvrepro.records import Record, Value, canonical
from kvrepro.tasks.intervals import macro

Verdict = Literal["reproduced", "same direction", "not reproduced", "contradicted", "not run"]
REPRODUCED: Verdict = "reproduced"
SAME: Verdict = "same direction"
NOT_REPRODUCED: Verdict = "not reproduced"
CONTRADICTED: Verdict = "contradicted"
NOT_RUN: Verdict = "not run"
VERDICTS = (REPRODUCED, SAME, NOT_REPRODUCED, CONTRADICTED, NOT_RUN)
#: Ours and the paper's effect agree in size when neither is more than so many times the other; infinity: not asked.
FACTOR = 2.0
#: Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond, two standard errors.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11)
_STUDENT += (2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04)
#: A method's option in its label, ``method(seed=1)`` or ``method(option=2, seed=1)``.
_SEED = re.compile(r"(, |(?<=\())seed=\d+")
#: The sign of a difference in the direction that is claimed.
DIRECTIONS = {"lower": -1, "higher": 1}


class Missing(Exception):
    """The records that a rule needs are not there; the message names them."""


@dataclass(frozen=True)
class Comparison:
    """One number that a verdict rests on.

    Attributes:
        name: what it is of.
        mean: the number.
        low: lower end of its interval; None where it was measured once and can vary.
        high: upper end.
        n: samples behind it.
        unit: its unit.
    """

    name: str
    mean: float
    low: float | None
    high: float | None
    n: int
    unit: str = ""

    def sign(self, limit: float = 0.0) -> int:
        """1 or -1 where the whole interval is above or below the limit, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > limit) - int(self.high < limit)

    def __str__(self) -> str:
        """As ``0.012 [0.010, 0.014] nats/token``."""
        ends = "" if self.low is None or self.high is None else f" [{self._show(self.low)}, {self._show(self.high)}]"
        exact = self.low == self.mean == self.high
        return f"{self._show(self.mean)}{'' if exact else ends} {self.unit}".rstrip()

    def _show(self, number: float) -> str:
        return f"{number:.3g}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Judged:
    """What a rule found.

    Attributes:
        verdict: the verdict.
        comparisons: the numbers behind it.
        records: the records behind them.
        note: what else the rule looked at, in words.
    """

    verdict: Verdict
    comparisons: Sequence[Comparison]
    records: Sequence[Record]
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """A rule by name.

    Attributes:
        judge: the function: records, the paper's effect or None, and parameters by name.
        text: what it asks, for readers.
        needs: parameters it must be given.
        takes: parameters it may be given.
    """

    judge: Callable[..., Judged]
    text: str
    needs: frozenset[str]
    takes: frozenset[str]


RULES: dict[str, Rule] = {}


def _rule(text: str, needs: str, takes: str = "") -> Callable[[Callable[..., Judged]], Callable[..., Judged]]:
    """Put a function into :data:`RULES` under its own name."""

    def keep(judge: Callable[..., Judged]) -> Callable[..., Judged]:
        RULES[judge.__name__] = Rule(judge, text, frozenset(needs.split()), frozenset(takes.split()))
        return judge

    return keep


# --- numbers


def quantile(n: int) -> float:
    """Standard errors that an interval over ``n`` samples reaches to each side: two, or more where they are few."""
    return max(2.0, _STUDENT[n - 2]) if 2 <= n < len(_STUDENT) + 2 else 2.0


def interval(name: str, samples: Sequence[float] | np.ndarray, unit: str = "") -> Comparison:
    """The mean of independent samples with its interval; without one for a single sample."""
    x = np.asarray(samples, dtype=float)
    if len(x) < 2:
        return Comparison(name, float(x.mean()), None, None, len(x), unit)
    return with_error(name, float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x)), len(x), unit)


def with_error(name: str, mean: float, error: float | None, n: int, unit: str = "") -> Comparison:
    """A mean whose standard error is known; without an interval where it is not."""
    if error is None:
        return Comparison(name, mean, None, None, n, unit)
    half = quantile(n) * error
    return Comparison(name, mean, mean - half, mean + half, n, unit)


def correlation(name: str, x: np.ndarray, y: np.ndarray) -> Comparison:
    """Pearson's correlation with Fisher's interval."""
    r = float(np.corrcoef(x, y)[0, 1])
    z, half = math.atanh(max(min(r, 1 - 1e-12), -1 + 1e-12)), 2 / math.sqrt(max(1, len(x) - 3))
    return Comparison(name, r, math.tanh(z - half), math.tanh(z + half), len(x))


def label(record: Record) -> str:
    """The method or variant that a record is of."""
    return str(record.cell.params.get("label", record.cell.method))


def series(record: Record, path: str) -> np.ndarray:
    """Samples of a record's extra results, ``[n]``: means over all but their first axis.

    Args:
        record: the record.
        path: ``name``, ``name.i`` for entry i of the last axis, or the ratio of two such, ``a/b``.

    Raises:
        Missing: the record has no such results.
    """
    if "/" in path:
        over, under = path.split("/")
        return series(record, over) / series(record, under)
    name, _, place = path.partition(".")
    if name not in record.value.extra:
        raise Missing(f"the record of {label(record)} has no {name}")
    found = np.asarray(record.value.extra[name], dtype=float)
    if place:
        found = found[..., int(place)]
    return found.reshape(len(found), -1).mean(axis=1)


def _same(record: Record) -> str:
    """What two records must agree in to be compared; budgets apart, since the full cache has none."""
    cell = record.cell
    params = {name: value for name, value in cell.params.items() if name != "label"}
    return canonical([cell.paper, cell.experiment, cell.metric, cell.model_sha256, cell.data_sha256, params, cell.seed])


def pairs(records: Sequence[Record], of: str, against: str) -> list[tuple[Record, Record]]:
    """Records of two methods that measured the same thing in the same way, at the same budget.

    Raises:
        Missing: there are none.
    """
    found = [
        (a, b)
        for a in records
        for b in records
        if label(a) == of and label(b) == against and _same(a) == _same(b)
        and (a.cell.budget == b.cell.budget or None in (a.cell.budget, b.cell.budget))
    ]  # fmt: skip
    if not found:
        raise Missing(f"no records of {of} and {against} on the same text and settings")
    return found


def over_draws(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by what they measured, whatever was drawn: those in a list differ in the seed of the draws alone.

    Args:
        records: one a cell.

    Returns:
        Lists of records by their settings, in the records' order; in a list the lowest seed comes first.
    """
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=_seeds):
        cell = record.cell
        options = {name: value for name, value in cell.options.items() if name != "seed"}
        params = {**cell.params, "label": _SEED.sub("", label(record)).replace("()", "")}
        names = [cell.paper, cell.experiment, cell.metric, cell.method, options]
        names += [cell.model, cell.model_sha256, cell.data, cell.data_sha256, cell.budget, params]
        found.setdefault(canonical(names), []).append(record)
    first = {record.key: place for place, record in enumerate(records)}
    return dict(sorted(found.items(), key=lambda item: min(first[record.key] for record in item[1])))


def _seeds(record: Record) -> tuple[int, int]:
    return int(record.cell.options.get("seed", 0)), record.cell.seed


def mean_draw(draws: Sequence[Record]) -> Record:
    """One record for several draws of the same thing: the first's cell, with the means of its numbers over the draws.

    Args:
        draws: records that differ in the seed alone, the lowest first.

    Returns:
        The first where there is no other. Else its ``value`` and ``spread`` are means, and so is each extra result that
        is an array of numbers of one shape in all of them; the rest is the first's.
    """
    if len(draws) == 1:
        return draws[0]
    first, values = draws[0], [record.value for record in draws]
    extra = {name: _mean([value.extra.get(name) for value in values]) for name in first.value.extra}
    mean = Value(_mean([v.value for v in values]), _mean([v.spread for v in values]), first.value.n, extra)
    return replace(first, value=mean)


def over_seeds(records: Sequence[Record]) -> list[Record]:
    """The records with one for all draws of the same thing, see `mean_draw`."""
    return [mean_draw(draws) for draws in over_draws(records).values()]


def _mean(items: Sequence[Any]) -> Any:
    """The mean of numbers, or of arrays of one shape; the first item where they are anything else."""
    try:
        arrays = [np.asarray(item) for item in items]
    except ValueError:  # rows of different lengths
        return items[0]
    same = len({a.shape for a in arrays}) == 1 and all(a.dtype.kind in "if" for a in arrays)
    return np.mean(arrays, axis=0).tolist() if same else items[0]


def _all_of(pairs_found: Sequence[tuple[Record, Record]]) -> list[Record]:
    return list({record.key: record for pair in pairs_found for record in pair}.values())


# --- verdicts


def by_direction(found: Sequence[Comparison], direction: str, effect: float | None, factor: float) -> Verdict:
    """The verdict of comparisons that must all go one way, and be as large as the paper's effect where there is one."""
    claimed = DIRECTIONS[direction]
    signs = [claimed * c.sign() for c in found]
    if -1 in signs:
        return CONTRADICTED
    once = [c for c, sign in zip(found, signs, strict=True) if sign == 0]
    if any(c.low is not None or claimed * c.mean <= 0 for c in once):
        return NOT_REPRODUCED
    if once:
        return SAME
    ours = float(np.mean([c.mean for c in found]))
    sized = effect is not None and math.isfinite(factor)
    return SAME if sized and not close(ours, float(effect or 0), factor) else REPRODUCED


def close(ours: float, theirs: float, factor: float) -> bool:
    """Whether two numbers have one sign and neither is more than ``factor`` times the other."""
    return ours * theirs > 0 and 1 / factor <= ours / theirs <= factor


def by_limit(found: Sequence[Comparison], limit: float, floors: Sequence[Comparison] | None = None) -> Verdict:
    """The verdict of numbers that must all exceed a limit, or at least zero (or a floor of their own)."""
    if all(c.sign(limit) == 1 for c in found):
        return REPRODUCED
    if any(c.sign() == -1 for c in found):
        return CONTRADICTED
    return SAME if all(c.sign() == 1 for c in [*found, *(floors or [])]) else NOT_REPRODUCED


# --- rules


@_rule(
    "The methods read the same texts, and their samples are compared one by one: a number is the method's minus the "
    "other's. Reproduced: every difference goes the claimed way beyond its interval and, where the paper has numbers, "
    "their mean is no more than {factor:g} times larger or smaller than the paper's. Same direction: every difference "
    "goes the claimed way beyond its interval, but they are not of the paper's size. Not reproduced: at least one lies "
    "within its interval. Contradicted: at least one goes the other way beyond its interval. A claim about every "
    "setting, or every rival, fails with one of them.",
    "of against samples",
    "direction scale unit each average factor",
)
def difference(
    records: Sequence[Record],
    effect: float | None,
    *,
    of: str,
    against: Sequence[str],
    samples: str,
    direction: str = "lower",
    scale: str = "",
    unit: str = "",
    each: str = "",
    average: bool = False,
    factor: float = FACTOR,
) -> Judged:
    """Paired differences of a method to others.

    Args:
        records: to choose from.
        effect: the paper's.
        of: the method's label.
        against: the others' labels.
        samples: name of the extra results that hold one number a sample.
        direction: ``lower`` or ``higher``.
        scale: ``percent`` where the samples are logarithms.
        unit: of a difference.
        each: parameter whose values are compared apart.
        average: whether cells hold the same samples, so that their mean is taken first; else samples are pooled.
        factor: see :data:`FACTOR`.
    """
    found, used = [], []
    for rival in against:
        matched = pairs(records, of, rival)
        used += matched
        for value, group in _groups(matched, each):
            name = f"against {rival}, {each} {value}" if each else f"against {rival}"
            apart = [series(a, samples) - series(b, samples) for a, b in group]
            x = np.mean(apart, axis=0) if average else np.concatenate(apart)
            found.append(_scaled(interval(name, x, unit), scale))
    return Judged(by_direction(found, direction, effect, factor), found, _all_of(used))


def _groups(matched: Sequence[tuple[Record, Record]], each: str) -> list[tuple[Any, list[tuple[Record, Record]]]]:
    """Pairs by the value of a parameter, or all together."""
    groups: dict[Any, list[tuple[Record, Record]]] = {}
    for pair in matched:
        groups.setdefault(pair[0].cell.params.get(each) if each else None, []).append(pair)
    return list(groups.items())


def _scaled(c: Comparison, scale: str) -> Comparison:
    """A difference of logarithms as the percentage by which the numbers themselves differ."""
    if scale != "percent":
        return c
    ends = [None if x is None else 100 * math.expm1(x) for x in (c.low, c.high)]
    return Comparison(c.name, 100 * math.expm1(c.mean), ends[0], ends[1], c.n, "%")


@_rule(
    "As *difference*, for a gain that must be larger at one setting than at another: the paired difference to each "
    "rival at the first setting minus that at the second.",
    "of against samples parameter first second",
    "direction unit",
)
def larger_at(
    records: Sequence[Record],
    effect: float | None,
    *,
    of: str,
    against: Sequence[str],
    samples: str,
    parameter: str,
    first: float,
    second: float,
    direction: str = "lower",
    unit: str = "",
) -> Judged:
    """Whether a method's lead over others grows from one setting to another."""
    found, used = [], []
    for rival in against:
        leads = {}
        for value in (first, second):
            matched = pairs([r for r in records if _setting(r, parameter) == value], of, rival)
            used += matched
            leads[value] = np.concatenate([series(a, samples) - series(b, samples) for a, b in matched])
        if leads[first].shape != leads[second].shape:
            raise Missing(f"the samples at {parameter} {first} and {second} are not the same ones")
        found.append(interval(f"against {rival}", leads[first] - leads[second], unit))
    return Judged(by_direction(found, direction, effect, FACTOR), found, _all_of(used))


@_rule(
    "One method at two settings, on the same texts, sample by sample: little is claimed to be lost at the first. A "
    "number is the change of perplexity in per cent; the entry names a margin that still counts as little. Reproduced: "
    "every whole interval lies below the margin. Contradicted: one lies above it. Not reproduced: the rest.",
    "of parameter first second samples margin",
)
def holds_at(
    records: Sequence[Record],
    effect: float | None,
    *,
    of: str,
    parameter: str,
    first: float,
    second: float,
    samples: str,
    margin: float,
) -> Judged:
    """Whether a method is about as good at one setting as at another.

    Args:
        records: to choose from, one a text and setting.
        effect: not used.
        of: the method's label.
        parameter: what is set.
        first: its value where little is claimed to be lost.
        second: its value that this is compared with.
        samples: name of the extra results that hold one negative log-likelihood a sample.
        margin: per cent.
    """
    found, used = [], []
    own = [r for r in records if label(r) == of]
    base = {r.cell.data_sha256: r for r in own if _setting(r, parameter) == second}
    for record in (r for r in own if _setting(r, parameter) == first and r.cell.data_sha256 in base):
        other = base[record.cell.data_sha256]
        used += [record, other]
        name = f"{_place(record)}, {parameter} {first:,} against {second:,}"
        found.append(_scaled(interval(name, series(record, samples) - series(other, samples)), "percent"))
    if not found:
        raise Missing(f"no records of {of} at {parameter} {first} and {second} on the same text")
    signs = [c.sign(margin) for c in found]
    verdict = CONTRADICTED if 1 in signs else REPRODUCED if all(sign == -1 for sign in signs) else NOT_REPRODUCED
    return Judged(verdict, found, used, f"margin {margin:g} %")


def _setting(record: Record, name: str) -> Any:
    return record.cell.params.get(name, getattr(record.cell, name, None))


@_rule(
    "A method's time or bytes against another's, as a change in per cent. Verdicts as for *difference*; the "
    "interval comes from the spread of repeated runs, bytes are exact, and a time taken once can give no more than "
    "the same direction. Where an entry names a least change, a smaller one counts as none: runs of one process agree "
    "better than processes do.",
    "of against measure",
    "plus exact each direction factor least",
)
def change(
    records: Sequence[Record],
    effect: float | None,
    *,
    of: str,
    against: str,
    measure: str,
    plus: str = "",
    exact: bool = False,
    each: str = "length",
    direction: str = "lower",
    factor: float = FACTOR,
    least: float = 0.0,
) -> Judged:
    """Relative change of one measured number.

    Args:
        records: to choose from.
        effect: the paper's, per cent.
        of: the method's label.
        against: the other's.
        measure: ``value``, or the name of an extra result.
        plus: an extra result to add to both.
        exact: whether the number does not vary.
        each: parameter that tells the comparisons apart.
        direction: ``lower`` or ``higher``.
        factor: see :data:`FACTOR`.
        least: per cent; a smaller change counts as none.
    """
    matched, found = pairs(records, of, against), []
    for a, b in matched:
        x, y = (_number(r, measure) + (_number(r, plus) if plus else 0.0) for r in (a, b))
        name, mean = f"{each} {_setting(a, each)}", 100 * (x / y - 1)
        spreads = (a.value.spread, b.value.spread)
        error = None
        if measure == "value" and None not in spreads:
            error = 100 * x / y * math.hypot(float(spreads[0] or 0) / x, float(spreads[1] or 0) / y)
        found.append(with_error(name, mean, 0.0 if exact else error, a.value.n, "%"))
    counted = [c for c in found if abs(c.mean) >= least]
    verdict = by_direction(counted, direction, effect, factor) if counted else NOT_REPRODUCED
    if len(counted) < len(found) and verdict != CONTRADICTED:
        verdict = NOT_REPRODUCED
    note = f"less than {least:g} % counts as none" if least else ""
    return Judged(verdict, found, _all_of(matched), note)


def _number(record: Record, name: str) -> float:
    number = record.value.value if name == "value" else record.value.extra.get(name)
    if number is None:
        raise Missing(f"the record of {label(record)} has no {name}")
    return float(number)


@_rule(
    "One method's time for a task's prompts against another's, as a change in per cent, for every task that the entry "
    "names; none may lack. Both read the same prompts in turn, and a task's interval is that of a ratio of sums over "
    "its prompts. Verdicts as for *difference*: every task counts, and one prompt a task can give no more than the "
    "same direction.",
    "tasks",
    "direction",
)
def every_task(
    records: Sequence[Record], effect: float | None, *, tasks: Sequence[str], direction: str = "lower"
) -> Judged:
    """Relative runtimes, task by task.

    Args:
        records: to choose from, whose values are in per cent of the other method's time.
        effect: the paper's mean change, per cent.
        tasks: names of the tasks.
        direction: ``lower`` or ``higher``.
    """
    used = [record for name in tasks for record in records if record.cell.params.get("task") == name]
    measured = {record.cell.params["task"] for record in used}
    if lacks := [name for name in tasks if name not in measured]:
        raise Missing(f"no records of {', '.join(lacks)}")
    found = [
        with_error(str(r.cell.params["task"]), _number(r, "value") - 100, r.value.spread, r.value.n, "%") for r in used
    ]
    return Judged(by_direction(found, direction, effect, FACTOR), found, used)


@_rule(
    "Two things measured within one record, such as keys and values of the same windows, compared sample by sample. "
    "Verdicts as for *difference*.",
    "",
    "of against direction unit",
)
def within(
    records: Sequence[Record],
    effect: float | None,
    *,
    of: str = "",
    against: Sequence[str] = (),
    direction: str = "higher",
    unit: str = "",
) -> Judged:
    """Differences within each record: the record's own value where nothing is named, else of extra results."""
    found = []
    for record in _some(records):
        place = _place(record)
        if not of:
            mean, error = _number(record, "value"), record.value.spread
            found.append(with_error(place, mean, error, record.value.n, unit))
        for other in against:
            x = series(record, of) - series(record, other)
            found.append(interval(f"{_plain(of)} − {_plain(other)}, {place}", x, unit))
    return Judged(by_direction(found, direction, effect, FACTOR), found, records)


def _plain(path: str) -> str:
    """A path's name for readers."""
    return path.partition(".")[0].replace("_", " ")


def _place(record: Record) -> str:
    """The text, and the layer where a record is of one."""
    layer = record.cell.params.get("layer")
    return record.cell.data if layer is None else f"{record.cell.data}, layer {layer}"


def _some(records: Sequence[Record]) -> Sequence[Record]:
    if not records:
        raise Missing("no such record")
    return records


@_rule(
    "Each number must exceed a limit. Reproduced: the whole interval of each lies above the limit. Same direction: "
    "above zero, and above what chance gives where the entry names that. Contradicted: one lies below zero. Not "
    "reproduced: the rest.",
    "paths limit",
    "floors names",
)
def above(
    records: Sequence[Record],
    effect: float | None,
    *,
    paths: Sequence[str],
    limit: float,
    floors: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Judged:
    """Extra results, named in the same order, against a limit, and against others that show what chance gives."""
    found, beyond = [], []
    for record in _some(records):
        for number, path in enumerate(paths):
            name = f"{names[number]}, {_place(record)}" if names else _place(record)
            x = series(record, path)
            found.append(interval(name, x))
            if floors:
                beyond.append(interval(name, x - series(record, floors[number])))
    over = [c.mean for c in beyond]
    note = f"beyond chance by {min(over):.2g} to {max(over):.2g}".replace("-", "\N{MINUS SIGN}") if over else ""
    return Judged(by_limit(found, limit, beyond or None), found, records, note)


@_rule(
    "Head by head, the mean cosine of one quantity against that of another, in each layer. Reproduced: the whole "
    "interval of every correlation (Fisher's) lies above the limit. Same direction: above zero. Contradicted: one "
    "below zero. Not reproduced: the rest.",
    "path columns limit",
    "names",
)
def heads_agree(
    records: Sequence[Record],
    effect: float | None,
    *,
    path: str,
    columns: Sequence[Sequence[float]],
    limit: float,
    names: Sequence[str] = (),
) -> Judged:
    """Correlations over heads of the columns of ``[samples, heads, columns]``; a column's sign goes with it.

    Args:
        records: to choose from.
        effect: not used.
        path: the extra result.
        columns: for each comparison the two columns and the sign of the second: ``[0, 2, -1]``.
        limit: what the correlations must exceed.
        names: of the comparisons.
    """
    found = []
    for record in _some(records):
        heads = np.asarray(record.value.extra[path], dtype=float).mean(axis=0)  # [heads, columns]
        for number, (first, second, sign) in enumerate(columns):
            name = f"{names[number] if names else number}, {_place(record)}"
            found.append(correlation(name, heads[:, int(first)], sign * heads[:, int(second)]))
    return Judged(by_limit(found, limit), found, records)


@_rule(
    "The profile over layers of one text against that of another. Reproduced: the whole interval of every "
    "correlation (Fisher's) lies above the limit, and texts differ less than layers (standard deviation of their "
    "means). Same direction: the correlations are above zero and texts differ less than layers. Contradicted: a "
    "correlation is below zero, or texts differ more than layers. Not reproduced: the rest.",
    "path limit",
)
def alike(records: Sequence[Record], effect: float | None, *, path: str, limit: float) -> Judged:
    """Layer profiles ``[samples, layers]`` of texts against each other."""
    if len({record.cell.data_sha256 for record in records}) < 2:
        raise Missing("records of two texts are needed")
    curves = {r.cell.data: np.asarray(r.value.extra[path], dtype=float).mean(axis=0) for r in records}
    found = [correlation(f"{a} and {b}", curves[a], curves[b]) for a, b in combinations(curves, 2)]
    table = np.array(list(curves.values()))  # [texts, layers]
    over_texts, over_layers = float(table.mean(1).std(ddof=1)), float(table.mean(0).std(ddof=1))
    note = f"standard deviation over texts {over_texts:.3g}, over layers {over_layers:.3g}"
    verdict = CONTRADICTED if over_texts >= over_layers else by_limit(found, limit)
    return Judged(verdict, found, records, note)


@_rule(
    "One setting is claimed to be the best of several, tried on the same texts. Reproduced: it is better than every "
    "other beyond the interval of their paired difference. Same direction: it has the best mean, but not beyond "
    "every interval. Contradicted: another is better beyond its interval. Not reproduced: the rest.",
    "of against samples",
    "direction unit",
)
def best_of(
    records: Sequence[Record],
    effect: float | None,
    *,
    of: str,
    against: Sequence[str],
    samples: str,
    direction: str = "lower",
    unit: str = "",
) -> Judged:
    """A setting against all others that were tried."""
    found, used = [], []
    for other in against:
        matched = pairs(records, of, other)
        used += matched
        found.append(
            interval(
                f"against {other}", np.concatenate([series(a, samples) - series(b, samples) for a, b in matched]), unit
            )
        )
    verdict = by_direction(found, direction, None, FACTOR)
    if verdict == NOT_REPRODUCED and all(DIRECTIONS[direction] * c.mean > 0 for c in found):
        verdict = SAME
    return Judged(verdict, found, _all_of(used))


@_rule(
    "A number that follows from the paper's formulas. Reproduced: ours differs by no more than the limit. "
    "Contradicted: by more.",
    "limit",
)
def exact(records: Sequence[Record], effect: float | None, *, limit: float) -> Judged:
    """The largest deviation against a limit."""
    found = [Comparison(_place(r), (x := _number(r, "value")), x, x, r.value.n) for r in _some(records)]
    return Judged(REPRODUCED if all(c.mean <= limit for c in found) else CONTRADICTED, found, records)


@_rule(
    "A size is claimed, not a direction. Reproduced: ours, averaged over texts, is within the factor that the entry "
    "names of the paper's number. Not reproduced: it is not. The size on another model can be missed; it cannot "
    "contradict.",
    "factor",
    "of against samples scale target unit",
)
def near(
    records: Sequence[Record],
    effect: float | None,
    *,
    factor: float,
    of: str = "",
    against: Sequence[str] = (),
    samples: str = "",
    scale: str = "",
    target: float | None = None,
    unit: str = "",
) -> Judged:
    """A record's value, or a paired difference, against the paper's number or a target."""
    if of:
        found, records = _differences(records, of, against, samples, scale)
    else:
        found = [with_error(_place(r), _number(r, "value"), r.value.spread, r.value.n, unit) for r in _some(records)]
    wanted = effect if target is None else target
    if wanted is None:
        raise ValueError("near needs the paper's numbers or a target")
    ours = float(np.mean([c.mean for c in found]))
    return Judged(REPRODUCED if close(ours, wanted, factor) else NOT_REPRODUCED, found, records)


def _differences(
    records: Sequence[Record], of: str, against: Sequence[str], samples: str, scale: str
) -> tuple[list[Comparison], list[Record]]:
    """Paired differences and the records behind them."""
    judged = difference(records, None, of=of, against=against, samples=samples, scale=scale)
    return list(judged.comparisons), list(judged.records)


@_rule(
    "Several long-context tasks, every task counting alike: the mean over tasks of the mean paired difference over a "
    "task's samples, the method's minus the other's, with its 95 % bootstrap interval; documents are drawn within each "
    "task. The tasks' own scores judge where they were measured for all tasks and the full cache's average reaches "
    "what the entry names: a model that cannot answer has no score to lose. Else the mean log-likelihood of the "
    "reference answers judges, in nats per token, whose size is not compared with the paper's. Each number says which "
    "it is, and the other measure is told where there is one. Verdicts as for *difference*; a claim that little is "
    "lost names a margin that the whole interval must stay within.",
    "of against tasks least",
    "direction margin",
)
def tasks(
    records: Sequence[Record],
    effect: float | None,
    *,
    of: str,
    against: Sequence[str],
    tasks: Sequence[str],
    least: float,
    direction: str = "higher",
    margin: Mapping[str, float] | None = None,
) -> Judged:
    """A method's average over tasks against others'.

    Args:
        records: to choose from, of one way of reading the prompts.
        effect: the paper's, points.
        of: the method's label.
        against: the others' labels.
        tasks: names of the tasks, all of which must be there.
        least: average score of the full cache, in per cent, from which on scores judge.
        direction: ``lower`` or ``higher``.
        margin: for a claim that little is lost: the loss that still counts as little, by measure, ``scores`` in points
            and ``loglik`` in nats per token. Reproduced: the whole interval lies above minus the margin.
            Contradicted: below it.
    """
    able = _average_score(records, tasks)
    by_score = able is not None and able >= least
    found, used = _over_tasks(records, of, against, tasks, "scores" if by_score else "loglik")
    other = _told(records, of, against, tasks, "loglik" if by_score else "scores")
    note = "; ".join(filter(None, [_ability(able), other]))
    if margin is not None:
        limit = -float(margin["scores" if by_score else "loglik"])
        signs = [c.sign(limit) for c in found]
        kept = CONTRADICTED if -1 in signs else REPRODUCED if all(sign == 1 for sign in signs) else NOT_REPRODUCED
        return Judged(kept, found, used, f"margin {limit:g}; {note}".replace("-", "\N{MINUS SIGN}"))
    verdict = by_direction(found, direction, effect if by_score else None, FACTOR)
    return Judged(verdict, found, used, note)


def _average_score(records: Sequence[Record], tasks: Sequence[str]) -> float | None:
    """The full cache's score averaged over tasks; None where a task has none."""
    found = {r.cell.params["task"]: r.value.value for r in records if label(r) == "full" and "scores" in r.value.extra}
    values = [found.get(name) for name in tasks]
    return None if None in values else float(np.mean([value for value in values if value is not None]))


def _ability(able: float | None) -> str:
    """What the full cache scores, in words."""
    return "" if able is None else f"the full cache scores {able:.1f} points on average"


def _over_tasks(
    records: Sequence[Record], of: str, against: Sequence[str], tasks: Sequence[str], samples: str
) -> tuple[list[Comparison], list[Record]]:
    """Average differences to each rival, and the records behind them.

    Raises:
        Missing: not all tasks were measured in that way.
    """
    own = [r for r in records if samples in r.value.extra and r.cell.params.get("task") in tasks]
    unit = "points" if samples == "scores" else "nats/token"
    found, used = [], []
    for rival in against:
        matched = pairs(own, of, rival)
        if lacks := [name for name in tasks if name not in {a.cell.params["task"] for a, _ in matched}]:
            raise Missing(f"no records of {of} and {rival} on {', '.join(lacks)}")
        parts = [((series(a, samples) - series(b, samples)).tolist(), a.value.extra["documents"]) for a, b in matched]
        mean = macro(parts)
        name = f"against {rival}, " + ("scores" if samples == "scores" else "log-likelihood")
        found.append(Comparison(name, mean.mean, mean.low, mean.high, sum(len(x) for x, _ in parts), unit))
        used += matched
    return found, _all_of(used)


def _told(records: Sequence[Record], of: str, against: Sequence[str], tasks: Sequence[str], samples: str) -> str:
    """The other measure in words, where there is one."""
    try:
        found, _ = _over_tasks(records, of, against, tasks, samples)
    except Missing:
        return ""
    return "; ".join(f"{c.name}: {c}" for c in found)


def problem(given: Mapping[str, Any]) -> str:
    """What is wrong with a rule's name and parameters as a file gives them; empty for nothing."""
    name, rest = given.get("name"), set(given) - {"name", "where"}
    if name not in RULES:
        return f"rule.name: {name!r} is no rule; there are {', '.join(RULES)}"
    rule = RULES[str(name)]
    if lacks := sorted(rule.needs - rest):
        return f"rule: {name} needs {', '.join(lacks)}"
    if extra := sorted(rest - rule.needs - rule.takes):
        return f"rule: {name} does not take {', '.join(extra)}; it takes {', '.join(sorted(rule.needs | rule.takes))}"
    if given.get("direction", "lower") not in DIRECTIONS:
        return f"rule.direction: {given['direction']!r} is neither of {', '.join(DIRECTIONS)}"
    return ""
