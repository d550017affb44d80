"""The deciding chapter: which method at which budget, for which purpose, at what cost; written by the build."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

from kvrepro import plots
from kvrepro.book.decide_figure import Drawn, draw
from kvrepro.book.files import write_if_changed
from kvrepro.book.pages import code, markdown_table, wide
from kvrepro.decide import (
    ABLE,
    DRAWS,
    LEAST_METHODS,
    SINGLE,
    Cost,
    Costs,
    Row,
    advice,
    beside_evictions,
    beyond,
    costs,
    difference,
    harmful,
    in_words,
    merging_against_eviction,
    missing,
    percent,
    rows,
    within,
)
from kvrepro.ledger import current, published
from kvrepro.recommend import RULE, TOLERANCE
from kvrepro.records import Record, Store
from kvrepro.rules import Comparison
from kvrepro.tasks.intervals import LEVEL, Interval

#: The method that is looked at part by part: the chapter's heading and text name it too.
FITTED = "attention_matching"
#: Share of comparisons without a difference whose 95 % interval lies above 0.
CHANCE = (1 - LEVEL) / 2


@dataclass(frozen=True)
class Parts:
    """What the build puts into the chapter.

    Attributes:
        texts: Markdown by the name that the chapter includes it under.
        figures: SVG by file name.
    """

    texts: Mapping[str, str]
    figures: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Write texts and figures into a folder."""
        for name, text in self.texts.items():
            write_if_changed(folder / f"{name}.md", text)
        for name, drawing in self.figures.items():
            write_if_changed(folder / name, drawing)


def published_parts(with_page: Collection[str]) -> Parts:
    """:func:`decide_parts` of the published records, made once a process as long as these stay the same."""
    folder = Store.default().published_folder
    files = [] if folder is None else sorted(folder.glob("*.jsonl"))
    return _published_parts(tuple(sorted(with_page)), tuple((path, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=2)
def _published_parts(with_page: tuple[str, ...], files: tuple[tuple[Path, int], ...]) -> Parts:
    return decide_parts(published(), with_page)


def decide_parts(records: Sequence[Record], with_page: Collection[str] = ()) -> Parts:
    """Everything in the chapter that comes from records.

    Args:
        records: one a cell.
        with_page: notebooks that have a published page.
    """
    found, spent, single = rows(records), costs(records), rows(within(records), SINGLE)
    drawn = {model: draw(records, model) for model in dict.fromkeys(row.model for row in found)}
    figures = {f"{model.replace('/', '-')}.svg": each for model, each in drawn.items() if each is not None}
    drawings = {name: plots.svg(each.figure).decode() for name, each in figures.items()}
    for each in figures.values():
        plt.close(each.figure)
    texts = {
        "state": _state([*found, *single], spent),
        "advice": _listed(advice(found, spent, records)) or "No published record bears out any advice yet.\n",
        "budget": _by_budget(found, with_page),
        "figure": "\n".join(_figure(name, each) for name, each in figures.items()) or "No record to draw yet.\n",
        "merging": _merging(found, with_page) + _hurting(records, with_page),
        "single": _single(single, with_page),
        "nothing": _nothing(found, spent, records),
        "costs": "\n".join(_cost_table(each, with_page) for each in spent) or "No published record of times yet.\n",
        "missing": _missing(found),
        "rule": f"{RULE}\n",
        "thresholds": _thresholds(),
    }
    return Parts(texts, drawings)


def _listed(sentences: Sequence[str]) -> str:
    return "".join(f"- {sentence}\n" for sentence in sentences)


def _link(notebook: str, text: str, with_page: Collection[str]) -> str:
    """A link to the page of the numbers, as published where there is such a page."""
    return f"[{text}]({'published' if notebook in with_page else 'results'}/{notebook}.ipynb)"


def _state(found: Sequence[Row], spent: Sequence[Costs]) -> str:
    """Whose model, and whether the records are of the present code."""
    used = {r.key: r for each in (*found, *spent) for r in each.records}
    if not used:
        return "```{warning}\nNothing is published that this chapter could rest on.\n```\n"
    models = ", ".join(code(name) for name in dict.fromkeys(row.model for row in found)) or "no model"
    shapes = ", ".join(code(each.model) for each in spent)
    stale = sum(not current(record) for record in used.values())
    lines = [f"Quality was measured with {models}" + (f", time at the shape of {shapes}." if shapes else ".")]
    lines.append("Larger models and other texts may rank methods differently: measure yours.")
    if stale:
        lines.append(f"{stale} of {len(used)} records behind this page were made by other code than this version's.")
    return "```{important}\n" + " ".join(lines) + "\n```\n"


def _said(interval: Interval | Comparison) -> str:
    """A mean with its interval."""

    def shown(x: float) -> str:
        return f"{x:.3g}".replace("-", "\N{MINUS SIGN}")

    ends = "" if interval.low is None or interval.high is None else f" [{shown(interval.low)}, {shown(interval.high)}]"
    return shown(interval.mean) + ends


def _by_budget(found: Sequence[Row], with_page: Collection[str]) -> str:
    """The best method for each purpose at each budget."""
    if not found:
        return "No published record yet.\n"
    several = len({row.model for row in found}) > 1
    body = []
    for row in sorted(found, key=lambda row: (row.model, -row.share)):
        level = [s.title for s in row.standings[2:] if s.level]
        body.append(
            [
                *([code(row.model)] if several else []),
                row.budget,
                _link(row.purpose.page, row.purpose.name, with_page),
                f"**{row.best.title}**",
                _said(row.best.loss) + _answers(row),
                f"{row.runner_up.title}, {_said(row.runner_up.behind)} behind",
                ("not shown" if row.runner_up.level else "yes") + (f"; level too: {', '.join(level)}" if level else ""),
                f"{row.n} samples, {len(row.standings)} methods",
            ]
        )
    header = ["Budget", "For", "Best", "Loss, nats/token", "Runner-up", "Do they differ?", "Measured"]
    return wide(markdown_table([*(["Model"] if several else []), *header], body))


def _answers(row: Row) -> str:
    """How many answers are found, where that was measured."""
    if row.best.found is None or row.full_found is None:
        return ""
    beyond_it = "" if row.able else "; beyond the model"
    return f"; finds {percent(row.best.found)} (full cache: {percent(row.full_found)}{beyond_it})"


def _figure(name: str, drawn: Drawn) -> str:
    """A figure of the chapter."""
    return f"```{{figure}} _generated/decide/{name}\n:alt: {drawn.alt}\n:width: 100%\n\n{drawn.caption}\n```\n"


def _merging(found: Sequence[Row], with_page: Collection[str]) -> str:
    """The best method of each kind against each other."""
    words = {-1: "**helps**", 1: "**hurts**", 0: "not shown to differ"}
    by_sign: dict[int, list[list[str]]] = {sign: [] for sign in words}
    for row in found:
        outcome, merge, evict = merging_against_eviction(row), row.first("merging"), row.first("eviction")
        if row.able and outcome is not None and merge is not None and evict is not None:
            gap, sign = outcome
            where = _link(row.purpose.page, row.purpose.name, with_page)
            by_sign[sign].append([words[sign], where, row.budget, merge.title, evict.title, _said(gap)])
    total = sum(map(len, by_sign.values()))
    if not total:
        return "No published record compares the two kinds.\n"
    header = ["Merging", "For", "Budget", "Best that merges", "Best that evicts", "Merging minus evicting, nats/token"]
    counted = (
        f"Merging helps in {len(by_sign[-1])} of {total} comparisons and hurts in {len(by_sign[1])}; in "
        f"{len(by_sign[0])} the interval of the difference includes 0.\n\n"
    )
    return counted + wide(markdown_table(header, [row for own in by_sign.values() for row in own]))


def _hurting(records: Sequence[Record], with_page: Collection[str]) -> str:
    """Merges that are worse than evicting from the same slots."""
    hurt = harmful(records)
    if not hurt:
        return ""
    each = "; ".join(f"{plots.style(name).title} ({_range(values)})" for name, values in hurt.items())
    return (
        "\nSome merges are worse than no merge at all: after them the attention output is further from the full "
        f"cache's than after {_link('across/best_merge', 'evicting from the same slots', with_page)}, at every budget "
        f"measured. In brackets the share of the avoidable error removed, where 0 is eviction: {each}.\n"
    )


def _single(found: Sequence[Row], with_page: Collection[str]) -> str:
    """The fitted merge beside the best eviction of each task and of each needle, and where that is better."""
    body, gaps, better = [], [], []
    for row in found:
        own, evict, pairs = row.of(FITTED), row.first("eviction"), beside_evictions(row, FITTED)
        if own is None or evict is None:
            continue
        where = f"{row.purpose.name}, {row.budget}"
        shown = [pair for pair in pairs if pair.gap.sign() == 1]
        ahead = sum(pair.gap.mean > 0 for pair in pairs)
        link = _link(row.purpose.page, row.purpose.name, with_page)
        counts = [str(n) for n in (len(pairs), ahead, len(shown))]
        body.append([link, row.budget, evict.title, _said(difference(evict, own)), *counts])
        gaps += [pair.gap.mean for pair in pairs]
        better += [(where, pair) for pair in shown]
    if not body:
        return "No published record sets it beside an eviction.\n"
    header = ["For", "Budget", "Best eviction", "Difference", "Parts", "Leads", "Shown"]
    said = (
        f"In {sum(gap > 0 for gap in gaps)} of {len(gaps)} comparisons an eviction has the lower mean loss, by "
        f"{max(*gaps, 0.0):.2g} nats per token at most; in {len(better)} it is shown to be better, beyond the interval"
    )
    each = [f"{code(p.part)} of {where}: {p.rival.title}, by {_said(p.gap)}" for where, p in better]
    said += f" ({'; '.join(each)})." if each else "."
    said += f" Of so many looks about {CHANCE * len(gaps):.0f} would show that by chance."
    if over := [pair.theirs for _, pair in better if pair.theirs.sign() == -1]:
        losses = in_words([_said(loss) for loss in over])
        which = "That eviction has" if len(better) == 1 else f"Of these {len(better)} evictions {len(over)} have"
        said += (
            f" {which} a loss below 0 ({losses}), which is better than the full cache itself: a method that copies the "
            "full cache cannot follow there."
        )
    return f"{markdown_table(header, body)}\n{said}\n"


def _range(values: Sequence[Comparison]) -> str:
    means = sorted(c.mean for c in values)
    return f"{means[0]:.2g} to {means[-1]:.2g}".replace("-", "\N{MINUS SIGN}")


def _nothing(found: Sequence[Row], spent: Sequence[Costs], records: Sequence[Record]) -> str:
    """Purposes at budgets where even the best loses too much, tasks beyond the model, and time that is not saved."""
    paragraphs = [_too_much(found)] if found else ["No published record yet.\n"]
    unable = beyond(records)
    if unable:
        told = ", ".join(f"{code(x.task)} ({percent(x.found)} of {x.n} with {x.model})" for x in unable)
        paragraphs.append(
            f"Nothing can be said of caches where the model fails with the full cache, too, and finds {percent(ABLE)} "
            f"of the answers or fewer: {told}. These tasks give no advice on this page.\n"
        )
    for each in spent:
        if not any(c.more.sign() == -1 for c in each.methods):
            paragraphs.append(
                f"No method is shown to read a prompt of {each.length:,} tokens in less time than the full cache, at "
                f"the shape of {code(each.model)}: compressing comes on top of reading.\n"
            )
    return "\n".join(paragraphs)


def _too_much(found: Sequence[Row]) -> str:
    """Where even the best method loses more than the tolerance."""
    lines = []
    for row in sorted(found, key=lambda row: -row.best.loss.mean):
        loss = row.best.loss
        if loss.mean > TOLERANCE and row.able:
            sure = "" if loss.low is None or loss.low > TOLERANCE else ", an interval that reaches below the limit"
            lines.append(
                f"{row.purpose.name[0].upper()}{row.purpose.name[1:]}, {row.budget}: even {row.best.title}, the best "
                f"of {len(row.standings)}, loses {_said(loss)} nats per token{sure}."
            )
    if not lines:
        return f"At no budget measured does the best method lose more than {TOLERANCE:g} nats per token.\n"
    return (
        f"Keep the full cache, or a larger share of it, where even the best method loses more than {TOLERANCE:g} nats "
        "per token {bdg-success}`ours`, the tolerance of `kvrepro recommend`:\n\n" + _listed(lines)
    )


def _cost_table(spent: Costs, with_page: Collection[str]) -> str:
    """What each method costs at one shape."""
    body = [["Full cache", _said(spent.full.read), "", _token(spent.full.token), _gib(spent.full.nbytes), ""]]
    for cost in spent.methods:
        cells = [plots.style(cost.label).title, _said(cost.read), _said(cost.more), _token(cost.token)]
        body.append([*cells, _gib(cost.nbytes), _saved(spent, cost)])
    header = [
        "Method",
        f"Read {spent.length:,} tokens, s",
        "Longer than the full cache, s",
        "A token, ms",
        "Held, GiB",
        "Saves time after",
    ]
    first, second = spent.methods[:2]
    overlap = second.read.low is None or first.read.high is None or second.read.low <= first.read.high
    return (
        f"The shape of {code(spent.model)} with random weights, one text at a time, on {spent.device}, by "
        f"{_link('speed/hardware', 'these measurements', with_page)}. Methods keep {percent(spent.share)} of the "
        f"slots; a token is written over {round(spent.length * spent.share):,} slots, with the full cache over "
        f"{spent.length:,}. The last column says how many tokens must be written until shorter steps have paid for a "
        "longer reading.\n\n"
        + wide(markdown_table(header, body))
        + f"\nThe fastest to read is {plots.style(first.label).title}, then {plots.style(second.label).title}"
        f"{' (their intervals overlap)' if overlap else ''}.\n"
    )


def _saved(spent: Costs, cost: Cost) -> str:
    """When a method has saved time, in words."""
    if cost.token is None or spent.full.token is None:
        return "not measured"
    after = spent.saved_after(cost)
    if after is None:
        return "no shorter step shown"
    return f"{after:,.0f} tokens" if after else "the first token"


def _token(time: Comparison | None) -> str:
    return "not measured" if time is None else _said(time)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}"


def _missing(found: Sequence[Row]) -> str:
    """Methods that no row of a purpose has."""
    body = [[name, ", ".join(map(code, lacks)) or "none is missing"] for name, lacks in missing(found).items()]
    return markdown_table(["For", "Not measured"], body)


def _thresholds() -> str:
    """How rows, intervals and sentences are made."""
    return (
        "All rules and thresholds are this project's own. {bdg-success}`ours`\n\n"
        f"- **A row** holds the methods measured with one model on the same samples at one budget, at least "
        f"{LEAST_METHODS} of them. Where a purpose has several parts (tasks, texts), every part counts alike. A "
        "method that lacks a part, or has other samples than most, is left out.\n"
        f"- **Intervals** are {percent(LEVEL)} bootstrap percentiles over documents, drawn within each part, {DRAWS:,} "
        "draws; differences are paired, sample by sample. Times have two standard errors to each side, more where runs "
        "are few. Nothing is corrected for picking the best of several.\n"
        "- **Two methods differ** if the whole interval of their difference lies on one side of 0; else the second is "
        "*level* with the best.\n"
        "- **Advice for a purpose** names the methods that are the best, or level with it, in every row; where no "
        "method is, the best of each row.\n"
        "- **Merging or evicting**: the best method of each kind, row by row; the outcome that is more frequent beyond "
        "the interval gives the sentence. A method that merges is one that the package lists so, Attention Matching's "
        "fit among them.\n"
        "- **Part by part** the rival is the eviction with the least mean loss in that very part, of those measured on "
        "its samples, which favours evictions; intervals there are two standard errors to each side, more where "
        "samples are few.\n"
        "- **A variant** is advised where its divergence is lower, beyond the interval, at every share of the bytes.\n"
        f"- **The tolerance** is {TOLERANCE:g} nats per token: what the full cache would write has a perplexity "
        f"e^{TOLERANCE:g} times higher for such a cache.\n"
        f"- **Beyond the model** is a task of which it finds {percent(ABLE)} of the answers or fewer with the full "
        "cache.\n"
        "- **Time is saved** after the tokens that make up for a longer reading, if a step is shorter beyond the "
        "intervals; a reading counts as longer only beyond its interval.\n"
    )
