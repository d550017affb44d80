"""The page "On your machine": values measured here beside the published ones, written by the build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kvrepro.book.pages import code, markdown_table, wide
from kvrepro.book.project import Notebook
from kvrepro.book.stamps import Stamp
from kvrepro.compare import (
    COARSE_RTOL,
    REBUILT_ATOL,
    REBUILT_ERROR,
    REBUILT_RTOL,
    Apart,
    Pair,
    Rebuilt,
    rebuilt,
)
from kvrepro.ledger import current
from kvrepro.records import Record, Store, read_records

_INTRO = f"""# On your machine

The build measured the results pages of this copy on this machine. Here each value stands beside the one that the
project published for the **same cell**: the same method and options, budget, model, text, samples, seed and number
format. Where no cell is the same, the second table of a page says what differs.
`results/published/quick/` holds the values of the `quick` profile for this page alone (no claim is judged by them),
`results/published/` those of the other profiles. `kvrepro compare A B` puts any two stores of records side by side.

**Tolerance.** Nothing is drawn anew, so statistical error is no excuse: what may differ is rounding, and the choices
that rounding turns now and then. A value agrees when it differs from the published one by no more than the largest of
{100 * REBUILT_RTOL["float32"]:g} % of the value in float32 ({100 * COARSE_RTOL:g} % in coarser formats),
{REBUILT_ERROR:g} standard errors of the published value (but no more than {100 * COARSE_RTOL:g} % of it), and
{REBUILT_ATOL:g}. Times and speeds are never compared.
"""
_NONE = """:::{{note}}
None of the values here can be compared: {why}.
:::
"""


def published_records() -> list[Record]:
    """All published records, those of the quick profile included."""
    folder = Store.default().published_folder
    return [] if folder is None else [r for path in sorted(folder.rglob("*.jsonl")) for r in read_records(path)]


def compared(notebooks: Sequence[Notebook]) -> dict[str, Rebuilt]:
    """The values of every page that was run, beside the published ones.

    Args:
        notebooks: the pages.

    Returns:
        By name of the notebook, in order.
    """
    known = published_records()
    found = {}
    for notebook in notebooks:
        if Stamp.read(notebook.stamp) is not None and notebook.records.is_file():
            found[notebook.name] = rebuilt(known, read_records(notebook.records))
    return found


def summary(found: dict[str, Rebuilt], link: str) -> str:
    """The whole comparison in one sentence.

    Args:
        found: from :func:`compared`.
        link: address of the page.
    """
    pairs = [pair for each in found.values() for pair in each.pairs]
    apart = sum(len(each.apart) for each in found.values())
    if not pairs:
        return f"No value of this copy can be put beside a published one ([why]({link}))."
    agree = sum(pair.agrees for pair in pairs)
    sentence = f"{agree} of {len(pairs)} values that this machine measured anew agree with the published ones"
    return f"{sentence} within the stated tolerance ([cell by cell]({link})); {apart} more cannot be compared."


def compare_page(found: dict[str, Rebuilt], titles: dict[str, str]) -> str:
    """The page.

    Args:
        found: from :func:`compared`.
        titles: of the pages, by name of the notebook.
    """
    parts = [_INTRO, "## Summary\n", f"**{summary(found, '#cell-by-cell')}**\n"]
    if not any(each.pairs for each in found.values()):
        kinds = Counter(apart.kind for each in found.values() for apart in each.apart)
        why = ", ".join(f"{kind} ({n})" for kind, n in kinds.most_common()) or "nothing was run yet"
        parts.append(_NONE.format(why=why))
    parts += [wide(_overview(found, titles)), "(cell-by-cell)=\n## Cell by cell\n"]
    for name, each in found.items():
        if each.pairs or each.apart:
            parts += [f"### {titles[name]}\n", f"[The page](results/{name}.ipynb)\n", *_section(each)]
    return "\n".join(parts)


def _overview(found: dict[str, Rebuilt], titles: dict[str, str]) -> str:
    rows = []
    for name, each in found.items():
        kinds = Counter(apart.kind for apart in each.apart)
        worst = max((abs(p.difference) / p.tolerance for p in each.pairs), default=None)
        rows.append(
            [
                f"[{titles[name]}](results/{name}.ipynb)",
                str(len(each.pairs)),
                str(len(each.pairs) - len(each.disagreements)),
                "" if worst is None else f"{worst:.2g}",
                ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()),
            ]
        )
    header = ["Page", "Compared", "Agree", "Largest difference, in tolerances", "Not compared"]
    return markdown_table(header, rows)


def _section(each: Rebuilt) -> list[str]:
    """Both tables of a page."""
    parts = []
    if each.pairs:
        header = ["Cell", "Published", "Here", "Difference", "Tolerance", "", "Published from"]
        parts.append(wide(markdown_table(header, _pair_rows(each.pairs)), "compare"))
    if each.apart:
        rows = [[_name(a.record, _varying(x.record for x in each.apart)), a.kind, a.reason] for a in _first(each.apart)]
        table = markdown_table(["Cell", "Not compared", "Why"], rows)
        more = f"\n{len(each.apart) - len(rows)} more of these kinds.\n" if len(rows) < len(each.apart) else ""
        parts.append(wide(table, "compare") + more)
    return parts


def _first(apart: Sequence[Apart], each: int = 8) -> list[Apart]:
    """The first few of each kind."""
    seen: Counter[str] = Counter()
    chosen = []
    for item in apart:
        seen[item.kind] += 1
        if seen[item.kind] <= each:
            chosen.append(item)
    return chosen


def _pair_rows(pairs: Sequence[Pair]) -> list[list[str]]:
    varying = _varying(pair.b for pair in pairs)
    return [
        [
            _name(pair.b, varying),
            _value(pair.a),
            _value(pair.b),
            f"{pair.difference:+.2g}",
            f"{pair.tolerance:.2g}",
            "{bdg-success}`agrees`" if pair.agrees else "{bdg-danger}`differs`",
            _origin(pair.a),
        ]
        for pair in pairs
    ]


def _value(record: Record) -> str:
    value, spread = record.value.value, record.value.spread
    shown = f"{value:.6g}" if spread is None else f"{value:.6g} ± {spread:.2g}"
    return f"{shown} {record.cell.unit}".strip()


def _origin(record: Record) -> str:
    run = record.provenance
    commit = (run.get("commit") or "none")[:8]
    return f"{run.get('device')}, {commit}" + ("" if current(record) else ", other code")


def _varying(records: Iterable[Record]) -> set[str]:
    """Parameters that tell the cells of a page apart."""
    values: dict[str, set[str]] = {}
    every = [dict(record.cell.params) for record in records]
    for name in {name for params in every for name in params}:
        values[name] = {str(params.get(name)) for params in every}
    return {name for name, seen in values.items() if len(seen) > 1 and name not in ("label", "dtype", "hardware")}


def _name(record: Record, varying: set[str]) -> str:
    """Measure, method, budget, text, and the parameters in which cells of this page differ."""
    cell = record.cell
    parts = [cell.metric, code(cell.params.get("label", cell.method))]
    parts += [] if cell.budget is None else [f"budget {cell.budget:g}"]
    parts += [f"{name} {cell.params[name]}" for name in sorted(varying) if name in cell.params]
    return ", ".join([*parts, cell.data])


def comparable(record: Record) -> bool:
    """Whether another machine can be held to this value: finished, a number, and no time."""
    return record.status == "ok" and record.value.value is not None and not record.cell.is_time
