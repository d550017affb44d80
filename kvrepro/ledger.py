"""The ledger: what the papers claim, and what the published records say about it.

The claims are in ``kvrepro/data/claims.yml``, the papers' numbers in ``kvrepro/data/published_numbers.csv``, the rules
in ``kvrepro.rules``. A verdict is computed here, from records; the file of claims has no field for one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from kvrepro.experiments import tables
from kvrepro.fingerprint import is_current
from kvrepro.records import Record, Store, canonical, read_records
from kvrepro.rules import (
    NOT_RUN,
    RULES,
    Comparison,
    Judged,
    Missing,
    Verdict,
    label,
    mean_draw,
    over_draws,
    problem,
)

PAPERS = ("WeightedKV", "KVMerger", "KVSlimmer")
SOURCES = ("paper", "second-hand", "code")
EFFECTS = ("percent", "difference", "value")
_REQUIRED = {"id", "paper", "where", "source", "text"}
_OPTIONAL = {"command", "numbers", "effect", "rule", "caveat", "not_run", "model", "page"}


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    Attributes:
        id: its name.
        paper: the paper's name as printed.
        where: table, figure or section.
        source: how it was read: in the paper, second-hand, or in the authors' code.
        text: the claim, in our words.
        command: what runs it with the paper's own model and data; empty where nothing here does.
        numbers: rows of the published numbers, each by columns that tell it apart: ours first, then what it is
            compared with.
        effect: how two numbers are compared: ``percent`` of the second, their ``difference``; or one ``value``.
        rule: name, ``where`` (which records) and parameters of the rule; empty where nothing measures the claim.
        caveat: what differs from the paper.
        not_run: why it was not run, as long as the records are missing.
        model: the paper's model; records of it are judged before those of others.
        page: notebook that measures it.
    """

    id: str
    paper: str
    where: str
    source: str
    text: str
    command: str = ""
    numbers: Sequence[Mapping[str, Any]] = ()
    effect: str = "value"
    rule: Mapping[str, Any] = field(default_factory=dict)
    caveat: str = ""
    not_run: str = ""
    model: str = ""
    page: str = ""

    @property
    def paper_values(self) -> list[float]:
        """The paper's numbers.

        Raises:
            ValueError: a row is not there, or is not told apart.
        """
        return [_lookup(self.id, self.paper, row) for row in self.numbers]

    @property
    def paper_effect(self) -> float | None:
        """The paper's effect, None without numbers."""
        values = self.paper_values
        if not values:
            return None
        if self.effect == "value":
            return values[0]
        first, second = values[0], values[1]
        return 100 * (first / second - 1) if self.effect == "percent" else first - second


@dataclass(frozen=True)
class Entry:
    """A claim with its verdict.

    Attributes:
        claim: the claim.
        judged: what the rule found; a verdict of ``not run`` without comparisons where it found no records.
        reason: why it was not run.
    """

    claim: Claim
    judged: Judged
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """The verdict."""
        return self.judged.verdict

    @property
    def stale(self) -> int:
        """How many of the records behind it were made by other code than is here now."""
        return sum(not current(record) for record in self.judged.records)

    @property
    def models(self) -> list[str]:
        """Models that the records are of."""
        return sorted({record.cell.model for record in self.judged.records})

    @property
    def own_model(self) -> bool:
        """Whether the records are of the paper's own model."""
        return bool(self.claim.model) and self.models == [self.claim.model]

    @property
    def state(self) -> str:
        """Whether the records are of the present code, in words; empty without records."""
        total = len(self.judged.records)
        if not total:
            return ""
        return f"{self.stale} of {total} records by other code" if self.stale else "current"

    def as_dict(self) -> dict[str, Any]:
        """The entry for a machine."""
        claim = self.claim
        about = {name: getattr(claim, name) for name in ("id", "paper", "where", "source", "text", "command", "caveat")}
        records = [
            {
                "key": record.key,
                "commit": record.provenance.get("commit"),
                "device": record.provenance.get("device"),
                "current": current(record),
            }
            for record in self.judged.records
        ]
        return {
            **about,
            "verdict": self.verdict,
            "reason": self.reason,
            "rule": dict(claim.rule),
            "paper_values": claim.paper_values,
            "paper_effect": claim.paper_effect,
            "ours": [vars(comparison) for comparison in self.judged.comparisons],
            "note": self.judged.note,
            "models": self.models,
            "stale": self.stale,
            "records": records,
        }


def _lookup(claim: str, paper: str, row: Mapping[str, Any]) -> float:
    """The one published number that agrees with all columns given."""
    table = tables.published(paper)
    chosen = table
    for column, value in row.items():
        if column not in table.columns:
            raise ValueError(f"{claim}: numbers: no column {column}; there are {', '.join(table.columns)}")
        chosen = chosen[chosen[column].astype(str) == str(value)]
    if len(chosen) != 1:
        raise ValueError(f"{claim}: numbers: {len(chosen)} rows of published_numbers.csv are {dict(row)}, not one")
    return float(chosen.iloc[0].value)


def read_claims(path: Path | None = None) -> list[Claim]:
    """The claims of a file, checked.

    Args:
        path: the file; the package's own by default.

    Raises:
        ValueError: an entry is not valid; the message names it and the field.
    """
    source = files("kvrepro").joinpath("data/claims.yml") if path is None else path
    found = yaml.safe_load(source.read_text(encoding="utf-8"))
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{source} must be a list of claims")
    for number, entry in enumerate(found, start=1):
        if bad := _problem(entry):
            raise ValueError(f"{source}: claim {entry.get('id', number)}: {bad}")
    claims = [Claim(**entry) for entry in found]
    names = [claim.id for claim in claims]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{source}: claim {twice[0]}: id: used twice")
    for claim in claims:
        _ = claim.paper_values  # each must be found
    return claims


def _problem(entry: Mapping[str, Any]) -> str:
    """What is wrong with an entry; empty for nothing."""
    if lacks := sorted(_REQUIRED - set(entry)):
        return f"{lacks[0]}: missing"
    if extra := sorted(set(entry) - _REQUIRED - _OPTIONAL):
        return f"{extra[0]}: unknown field"
    for name, valid in (("paper", PAPERS), ("source", SOURCES), ("effect", EFFECTS)):
        if entry.get(name, valid[0]) not in valid:
            return f"{name}: {entry[name]!r} is none of {', '.join(valid)}"
    for name in ("rule", "command"):
        if not (entry.get(name) or entry.get("not_run")):
            return f"{name}: missing, and no not_run says why"
    if entry.get("effect", "value") != "value" and len(entry.get("numbers", ())) != 2:
        return "numbers: an effect compares two"
    return problem(entry["rule"]) if entry.get("rule") else ""


def current(record: Record) -> bool:
    """Whether a record was made by the code that is here now; looked up once a process and kind of record."""
    return _is_current(record.provenance["module"], record.cell.methods, record.provenance["code"])


_is_current = functools.cache(is_current)


def newest(records: Iterable[Record]) -> list[Record]:
    """One record a cell: one of the present code where there is one, else the newest."""
    best: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (current(r), r.provenance["date"])):
        best[record.cell.identity] = record
    return list(best.values())


def published() -> list[Record]:
    """The records published with the project."""
    folder = Store.default().published_folder
    found = [] if folder is None else [r for path in sorted(folder.glob("*.jsonl")) for r in read_records(path)]
    return newest(found)


def select(records: Iterable[Record], where: Mapping[str, Any]) -> list[Record]:
    """Measured records whose cells have the fields and parameters asked for; the full cache fits every budget.

    Args:
        records: to choose from.
        where: names with a value or a list of values.
    """
    return [r for r in records if r.status == "ok" and all(_fits(r, name, value) for name, value in where.items())]


def _fits(record: Record, name: str, value: Any) -> bool:
    if name == "budget" and record.cell.method == "full":
        return True
    found = record.cell.params.get(name, getattr(record.cell, name, None))
    return found in value if isinstance(value, list) else found == value


def judge(claim: Claim, records: Sequence[Record]) -> Entry:
    """Judge a claim by its rule.

    Records of different models are never mixed: the paper's own model is tried first, then the others, the most
    recently measured first. A method that draws at random counts with the mean over the seeds it was measured with.

    Args:
        claim: the claim.
        records: one a cell, see :func:`newest`.
    """
    nothing = Judged(NOT_RUN, [], [])
    if not claim.rule:
        return Entry(claim, nothing, claim.not_run)
    parameters = {name: value for name, value in claim.rule.items() if name not in ("name", "where")}
    chosen = select(records, claim.rule.get("where", {}))
    missing = "no such record is published"
    for model in _models(chosen, claim.model):
        draws = over_draws([record for record in chosen if record.cell.model == model])
        try:
            found = RULES[claim.rule["name"]].judge(
                [mean_draw(group) for group in draws.values()], claim.paper_effect, **parameters
            )
            return Entry(claim, _with_draws(found, draws.values()))
        except Missing as error:
            missing = str(error)
    return Entry(claim, nothing, claim.not_run or missing)


def _with_draws(found: Judged, draws: Iterable[Sequence[Record]]) -> Judged:
    """What a rule found, with all records that a mean over seeds was taken of, and their number in its note."""
    behind = {group[0].key: group for group in draws}
    groups = [behind[record.key] for record in found.records]
    seeds: dict[str, set[int]] = {}
    for group in groups:
        seeds.setdefault(label(group[0]), set()).add(len(group))
    told = [
        f"{name}: mean over {' or '.join(map(str, sorted(n)))} seeds" for name, n in sorted(seeds.items()) if n != {1}
    ]
    note = "; ".join(filter(None, [found.note, *told]))
    return replace(found, records=[record for group in groups for record in group], note=note)


def _models(records: Sequence[Record], own: str) -> list[str]:
    dates: dict[str, str] = {}
    for record in records:
        dates[record.cell.model] = max(dates.get(record.cell.model, ""), record.provenance["date"])
    return sorted(dates, key=lambda model: (model == own, dates[model]), reverse=True)


def _cell_order(record: Record) -> tuple[Any, ...]:
    """Where a record stands among others: by its cell's fields, numbers by their size."""
    cell = record.cell
    fields = {**cell.params, "budget": cell.budget, "options": cell.options}
    return (cell.experiment, cell.metric, cell.method, cell.data, [_ordered(*item) for item in sorted(fields.items())])


def _ordered(name: str, value: Any) -> tuple[str, bool, float, str]:
    """A field for sorting: numbers before all else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return name, False, float(value), ""
    return name, True, 0.0, canonical(value)


def ledger(claims: Sequence[Claim] | None = None, records: Sequence[Record] | None = None) -> list[Entry]:
    """Every claim with its verdict.

    Records are taken in the order of their cells, not of their dates: so the same values give the same lines and
    the same bootstrap intervals, whenever and in whatever order they were measured.

    Args:
        claims: the package's own by default.
        records: the published ones by default.
    """
    claims = read_claims() if claims is None else claims
    records = sorted(published() if records is None else newest(records), key=_cell_order)
    return [judge(claim, records) for claim in claims]


def counts(entries: Iterable[Entry]) -> Counter[str]:
    """Number of claims by verdict."""
    return Counter(entry.verdict for entry in entries)


def shown(comparisons: Sequence[Comparison]) -> list[str]:
    """Comparisons as text, one line each."""
    return [f"{c.name}: {c}" for c in comparisons]
