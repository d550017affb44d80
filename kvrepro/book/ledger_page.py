"""The ledger's page: every claim of the papers with its verdict, written by the build."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvrepro.book.pages import BADGES, code, markdown_table, wide
from kvrepro.ledger import PAPERS, Claim, Entry, counts, ledger
from kvrepro.rules import CONTRADICTED, FACTOR, NOT_REPRODUCED, NOT_RUN, REPRODUCED, RULES, SAME, VERDICTS

_COLOURS = {
    REPRODUCED: "success",
    SAME: "info",
    NOT_REPRODUCED: "warning",
    CONTRADICTED: "danger",
    NOT_RUN: "muted",
}
#: More comparisons than this are shown by their lowest and highest.
_SHOWN = 5
_OTHER_CODE = "{bdg-secondary-line}`other code`"

_INTRO = """# The ledger

What the three papers claim, claim by claim, and what the published records of this project say about it.
The build writes this page from `kvrepro/data/claims.yml`, which has no field for a verdict, and from the records in
`results/published/`: a verdict is what [a rule](#the-rules) makes of the records, and nobody's opinion.
`kvrepro ledger` prints the same in a shell, `kvrepro ledger --json` with the key, commit and device of every record.
"""

_RULES = """## The rules

**Intervals.** Numbers of ours stand with their interval in square brackets: two standard errors to each side, more
where the samples are few (the 95 % quantile of Student's t: 4.3 standard errors for three samples, 2.8 for five).
A claim is decided only where the whole interval lies on one side. There is no correction for many comparisons.
Behind a rule's name stands what it asks: *below 0* means that the numbers are claimed to be negative.
Limits and factors are this project's choices. {bdg-success}`ours`

**Which records.** An entry names the cells that it is judged by. Records of different models are never mixed: those of
the paper's own model are judged where there are any. Of several records of one cell, one of the present code counts, or
else the newest. A record counts once it is in `results/published/`. A method that draws at random counts with the mean
over the seeds that it was measured with, sample by sample; the entry says of how many. {bdg-success}`ours`

"""


def ledger_page(entries: Sequence[Entry] | None = None, published: Collection[str] = ()) -> str:
    """The page.

    Args:
        entries: claims with their verdicts; the package's own by default.
        published: notebooks that have a published page.
    """
    entries = ledger() if entries is None else entries
    parts = [_INTRO, _whose_model(entries), "## Summary\n", _summary(entries), _state(entries)]
    for paper in PAPERS:
        rows = [_row(entry, entry.claim.page in published) for entry in entries if entry.claim.paper == paper]
        header = ["Claim", "Paper", "Here", "Verdict, by rule"]
        parts += [f"## {paper}\n", wide(markdown_table(header, rows), "ledger")]
    return "\n".join([*parts, _RULES + _rules()])


def _whose_model(entries: Sequence[Entry]) -> str:
    judged = [entry for entry in entries if entry.verdict != NOT_RUN]
    own = sum(entry.own_model for entry in judged)
    cells = [record.cell for entry in judged for record in entry.judged.records if record.cell.model != "none"]
    shapes = {cell.model for cell in cells if cell.data == "random tokens"}
    models = [
        code(name) + (" (the shape, with random weights)" if name in shapes else "")
        for name in sorted({cell.model for cell in cells})
    ]
    return (
        "```{admonition} Verdicts on which model\n:class: important\n"
        f"{own} of the {len(judged)} verdicts come from a paper's own model. They come from {', '.join(models)}; the "
        "embedded model, SmolLM2-135M-Instruct, is far smaller than the papers' and reads other texts. A verdict says "
        "what was found on the model and texts beside it. *Contradicted* means that there the effect goes the other "
        "way; it does not say that a paper's table is wrong.\n```\n"
    )


def _summary(entries: Sequence[Entry]) -> str:
    rows = []
    for paper in (*PAPERS, "all"):
        part = [entry for entry in entries if paper in (entry.claim.paper, "all")]
        found = counts(part)
        rows.append([paper, *(str(found[verdict]) for verdict in VERDICTS), str(len(part))])
    note = (
        "Entries overlap: several judge parts of one table, or two readings of one sentence, by the same records. The "
        "counts are a table of contents, not a score.\n"
    )
    return wide(markdown_table(["Paper", *VERDICTS, "claims"], rows), "summary") + note


def _state(entries: Sequence[Entry]) -> str:
    judged = [entry for entry in entries if entry.verdict != NOT_RUN]
    stale = sum(bool(entry.stale) for entry in judged)
    if not stale:
        return "\nAll verdicts rest on records made by the code of this version.\n"
    return (
        f"\n```{{warning}}\n{stale} of {len(judged)} verdicts rest on records made by other code than this version's. "
        f"They are marked {_OTHER_CODE}: the numbers stand as they were measured, and the present code may "
        "give others.\n```\n"
    )


def _row(entry: Entry, published: bool) -> list[str]:
    claim = entry.claim
    about = f"{claim.text}<br>{claim.where} {{bdg-{BADGES[claim.source]}}}`{claim.source}`"
    if claim.caveat:
        about += f"<br>*Differs:* {claim.caveat}"
    return [about + _folded(entry, published), _paper(claim), _here(entry), _verdict(entry)]


def _folded(entry: Entry, published: bool) -> str:
    """What few readers want to see: the command, the pages and the records."""
    claim, records = entry.claim, entry.judged.records
    command = code(claim.command) if claim.command else "no command yet"
    lines = [f"With the paper's own model: {command}"]
    if claim.page:
        page = f"[Measured on this page](results/{claim.page}.ipynb)"
        lines.append(page + (f", [as published](published/{claim.page}.ipynb)" if published else ""))
    if records:
        commits = ", ".join(sorted({(record.provenance.get("commit") or "none")[:8] for record in records}))
        devices = ", ".join(sorted({str(record.provenance.get("device")) for record in records}))
        lines.append(f"{len(records)} record{'s' * (len(records) != 1)}: {devices}, commit {commits}")
    return f"<details><summary>command and records</summary>{'<br>'.join(lines)}</details>"


def _paper(claim: Claim) -> str:
    values, effect = claim.paper_values, claim.paper_effect
    if effect is None:
        return ""
    unit = " %" if claim.effect == "percent" or "%" in str(dict(claim.numbers[0]).get("metric", "")) else ""
    number = f"{effect:+.3g}{unit}".replace("-", "\N{MINUS SIGN}")
    if claim.effect == "value":
        return number
    return f"{values[0]:g} against {values[1]:g}<br>{number}"


def _here(entry: Entry) -> str:
    found = entry.judged.comparisons
    if not found:
        return entry.reason
    shown = list(found)
    lines = []
    if len(found) > _SHOWN:
        shown = [min(found, key=lambda c: c.mean), max(found, key=lambda c: c.mean)]
        lines.append(f"{len(found)} numbers, the lowest and the highest:")
    lines += [f"{c.name}: {c}" for c in shown]
    return "<br>".join([*lines, *([entry.judged.note] if entry.judged.note else []), _measured(entry)])


def _measured(entry: Entry) -> str:
    """Model and texts, and the number of samples."""
    texts = dict.fromkeys(record.cell.data for record in entry.judged.records)
    models = [model for model in entry.models if model != "none"]
    samples = " or ".join(str(n) for n in sorted({c.n for c in entry.judged.comparisons}))
    return f"*{', '.join([*models, *texts])}; n = {samples}*"


def _verdict(entry: Entry) -> str:
    lines = [f"{{bdg-{_COLOURS[entry.verdict]}}}`{entry.verdict}`"]
    if entry.stale:
        lines.append(_OTHER_CODE)
    if entry.claim.rule:
        lines.append(_asked(entry.claim))
    return "<br>".join(lines)


def _asked(claim: Claim) -> str:
    """The rule and what it asks of the numbers."""
    name = str(claim.rule["name"])
    given = {**(RULES[name].judge.__kwdefaults__ or {}), **claim.rule}
    asks = f"[{name.replace('_', ' ')}](#{name.replace('_', '-')})"
    if "direction" in given:
        asks += f": {'below' if given['direction'] == 'lower' else 'above'} 0"
    if "limit" in given:
        asks += f": limit {given['limit']:g}"
    if name == "near":
        asks += f": within a factor of {given['factor']:g}" + (f" of {given['target']:g}" if given["target"] else "")
    return asks


def _rules() -> str:
    return "\n".join(
        f"### {name.replace('_', ' ')}\n\n{rule.text.format(factor=FACTOR)}\n" for name, rule in RULES.items()
    )
