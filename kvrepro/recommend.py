"""Which method for a reader's model and text: candidates measured side by side, and a verdict by a stated rule.

Divergence from the full cache, retrieval of a needle, bytes and time, all on the reader's machine. Nothing is stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvrepro import evaluate, kernels, texts
from kvrepro.cache import make_cache
from kvrepro.decode import Decoder
from kvrepro.experiments import across
from kvrepro.experiments.common import Bench, Variant, as_list, parse_variants
from kvrepro.experiments.speed import SKIPPED, Clock, seconds_of
from kvrepro.provenance import device_name
from kvrepro.records import Skip
from kvrepro.tasks import batch, ruler
from kvrepro.tasks.intervals import LEVEL, Interval, bootstrap, paired

#: Ours: the fit that shows what is possible, three evictions, the three papers' methods, and KVMerger with its |S| in
#: the logits, without which it diverges far more.
CANDIDATES = (
    "attention_matching",
    "h2o",
    "snapkv",
    "tova",
    "weightedkv",
    "kvmerger",
    "kvmerger(mass='attention')",
    "kvslimmer",
)
#: Ours, nats per token. What the full cache would write has a perplexity e^0.1 = 1.11 times higher for a cache there.
TOLERANCE = 0.1
#: Ours: costs within this share of each other count as equal.
SLACK = 0.05
#: The retrieval task, one of `kvrepro.tasks.ruler.NAMES`.
TASK = "niah_single"
#: Fewer passages or prompts give intervals that are rough, and too narrow.
FEW = 8

RULE = f"""The rule (this project's own):

1. A method is out if it retrieves worse than the one that retrieves best: the {100 * LEVEL:g} % interval of the paired
   difference of the needle answers' log-likelihood lies below 0.
2. Of the others, the one with the lowest mean divergence is the best. Those are level with it whose paired difference
   from it has an interval that reaches down to 0.
3. If the best's divergence is above the tolerance, no method helps: keep the full cache.
4. Else, of the best and those level with it and within the tolerance, take the cheapest: the least time to read the
   prompt and write the answer. Costs within {100 * SLACK:g} % count as equal; the lower divergence decides.

Intervals are bootstrap percentiles over passages or prompts, not corrected for the number of methods."""

Progress = Callable[[int, int, str], Any]


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        context: tokens that are compressed.
        continuation: tokens predicted after them, over which the divergence is a mean.
        passages: passages of the text.
        needles: prompts with a needle, about as long as the context; 0 leaves retrieval out.
        answer: tokens written after a prompt, for the cost.
        steps: tokens that are timed, after some that are not.
        repeats: times that reading and writing are timed, in turns; the fastest counts.
        tolerance: divergence above which no method helps, nats per token.
        seed: of the prompts, the draws of the methods and the bootstrap.
    """

    context: int = 384
    continuation: int = 64
    passages: int = 8
    needles: int = 8
    answer: int = 128
    steps: int = 8
    repeats: int = 2
    tolerance: float = TOLERANCE
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: one is out of range.
        """
        least = {"context": 2, "continuation": 1, "passages": 2, "needles": 0, "answer": 0, "steps": 1, "repeats": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be {value} or more")
        if self.needles == 1:
            raise ValueError("needles=1 gives no interval: ask for 2 or more, or for 0 to leave retrieval out")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance} must be above 0, nats per token")


@dataclass(frozen=True)
class Measured:
    """What was measured of one method at one budget.

    Attributes:
        label: method, with its options.
        slots: slots per KV head and layer; None for the full cache.
        nbytes: bytes held after a passage.
        kl: KL(full || compressed) of each passage, mean over its tokens, nats per token, `[passages]`.
        loglik: log-likelihood of each needle's answer, nats per token, `[needles]`.
        exact: whether greedy decoding would begin with it, `[needles]`.
        read: seconds to read a passage's context and compress it.
        token: seconds for a token written after it, the cache held to its budget.
    """

    label: str
    slots: int | None
    nbytes: int
    kl: Sequence[float]
    loglik: Sequence[float] = ()
    exact: Sequence[bool] = ()
    read: float = math.nan
    token: float = math.nan

    def cost(self, answer: int) -> float:
        """Seconds to read a prompt and write an answer of so many tokens."""
        return self.read + answer * self.token


@dataclass(frozen=True)
class Candidate:
    """A method at a budget beside the others.

    Attributes:
        measured: its numbers.
        kl: its divergence, nats per token.
        behind: its divergence minus the best's, paired by passage.
        retrieval: its log-likelihood of the needle answers minus that of the method that retrieves best, paired; None
            where retrieval was left out.
        cost: seconds to read a prompt and write an answer.
    """

    measured: Measured
    kl: Interval
    behind: Interval
    retrieval: Interval | None
    cost: float

    @property
    def label(self) -> str:
        """The method, with its options."""
        return self.measured.label

    @property
    def retrieves(self) -> bool:
        """Whether its retrieval is not shown to be worse than the best's."""
        return _retrieves(self.retrieval)

    @property
    def level(self) -> bool:
        """Whether its divergence is not shown to be higher than the best's."""
        return self.behind.low is None or self.behind.low <= 0


@dataclass(frozen=True)
class Choice:
    """What to use at one budget.

    Attributes:
        budget: as it was given: a share of the full cache's bytes, or slots.
        candidates: the methods, the lowest divergence first.
        best: label of the one with the lowest divergence among those that retrieve.
        use: label of the method to use; None: keep the full cache.
        left_out: methods that could not be measured at this budget, with the reason.
        why: the verdict in words.
    """

    budget: int | float
    candidates: tuple[Candidate, ...]
    best: str
    use: str | None
    left_out: dict[str, str]
    why: str


@dataclass(frozen=True)
class Recommendation:
    """What to use for a model and a text.

    Attributes:
        model: its name.
        text: name of the text.
        device: where it was measured.
        dtype: number format of the weights.
        setting: what was measured.
        full: the full cache: its bytes, retrieval and times.
        choices: one a budget, in the order given.
        rule: how the verdicts come about.
    """

    model: str
    text: str
    device: str
    dtype: str
    setting: Setting
    full: Measured
    choices: tuple[Choice, ...]
    rule: str = field(default=RULE, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The recommendation for a machine."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Tables and verdicts, for people."""
        s = self.setting
        needles = f"; {s.needles} prompts with a needle" if s.needles else ""
        head = (
            f"{self.model} ({self.dtype}) on {self.text}, {self.device}: {s.passages} passages of {s.context} tokens, "
            f"{s.continuation} predicted after each{needles}"
        )
        parts = [head, *(f"\n{_shown(self, choice)}" for choice in self.choices), ""]
        least = self.smallest
        if least is not None and len(self.choices) > 1:
            parts += [f"The least memory within the tolerance: {least.use} at {least.budget}.", ""]
        return "\n".join([*parts, self.rule])

    @property
    def smallest(self) -> Choice | None:
        """The choice that holds the fewest bytes; None where the full cache is to be kept at every budget."""
        used = [(c.measured.nbytes, n) for n, x in enumerate(self.choices) for c in x.candidates if c.label == x.use]
        return self.choices[min(used)[1]] if used else None


def choose(full: Measured, found: Sequence[Measured], budget: int | float, setting: Setting) -> Choice:
    """The verdict on methods measured on the same passages and prompts, by :data:`RULE`.

    Args:
        full: the full cache.
        found: the methods, at least one.
        budget: what they were measured at.
        setting: says the tolerance, the answer's length and the seed.
    """
    seed = setting.seed
    finder = max(found, key=lambda m: sum(m.loglik))
    retrieval = {m.label: _paired(finder.loglik, m.loglik, seed) if m.loglik else None for m in found}
    best = min((m for m in found if _retrieves(retrieval[m.label])), key=lambda m: sum(m.kl))
    candidates = [
        Candidate(
            measured=m,
            kl=bootstrap(m.kl, _names(m.kl), seed=seed),
            behind=_paired(best.kl, m.kl, seed),
            retrieval=retrieval[m.label],
            cost=m.cost(setting.answer),
        )
        for m in sorted(found, key=lambda m: sum(m.kl))
    ]
    top = next(c for c in candidates if c.label == best.label)
    fit = [c for c in candidates if c.retrieves and c.level and c.kl.mean <= setting.tolerance]
    use = None
    if top.kl.mean <= setting.tolerance:
        least = min(c.cost for c in fit)
        use = next(c for c in fit if c.cost <= least * (1 + SLACK))  # the lowest divergence first
    why = " ".join(_reasons(full, candidates, top, use, setting))
    return Choice(budget, tuple(candidates), top.label, use.label if use else None, {}, why)


def _names(samples: Sequence[float]) -> list[str]:
    """Passages or prompts by number: each is a document of its own."""
    return [str(i) for i in range(len(samples))]


def _paired(first: Sequence[float], second: Sequence[float], seed: int) -> Interval:
    """Second minus first over the same passages or prompts."""
    return paired(first, second, _names(first), seed=seed)


def _retrieves(difference: Interval | None) -> bool:
    """Whether a difference of log-likelihoods does not lie below 0; None is none measured."""
    return difference is None or difference.high is None or difference.high >= 0


def _reasons(
    full: Measured, candidates: Sequence[Candidate], best: Candidate, use: Candidate | None, setting: Setting
) -> Iterator[str]:
    """The verdict in sentences."""
    tolerance = f"the tolerance of {setting.tolerance:g} nats/token"
    among = "" if all(c.retrieves for c in candidates) else " of those that retrieve"
    if use is None:
        yield f"Keep the full cache: no method helps. The best{among}, {best.label}, diverges by {_said(best.kl)}"
        yield f"nats/token, above {tolerance}."
    elif use is best:
        yield f"Use {use.label}: its divergence, {_said(use.kl)} nats/token, is the lowest{among}, and none that is"
        yield f"level with it costs less by more than {100 * SLACK:g} %."
    else:
        yield f"Use {use.label}: its divergence, {_said(use.kl)} nats/token, is level with the best's ({best.label},"
        yield f"{_said(best.kl)}; difference {_said(use.behind)}), and it costs less: {use.cost:.3g} s against"
        yield f"{best.cost:.3g} s to read a prompt and write {setting.answer} tokens."
    judged = use or best
    if judged.kl.low is not None and judged.kl.low <= setting.tolerance < (judged.kl.high or 0):
        yield f"Its interval reaches across {tolerance}: more passages would decide."
    yield from _retrieval(full, candidates, use, setting)
    if use is not None:
        yield from _gain(full, use, setting)
    if setting.passages < FEW or 0 < setting.needles < FEW:
        yield f"With fewer than {FEW} passages or prompts the intervals are rough, and too narrow."


def _retrieval(
    full: Measured, candidates: Sequence[Candidate], use: Candidate | None, setting: Setting
) -> Iterator[str]:
    """What retrieval says, in sentences."""
    if not full.loglik:
        yield "Retrieval was not measured: the divergence is a mean over all tokens, and blind to one lost fact."
        return
    out = [c.label for c in candidates if not c.retrieves]
    if out:
        yield f"Out, because they retrieve worse than the best: {', '.join(out)} (without needles the divergence"
        yield "decides alone)."
    if not any(full.exact):
        yield "The model finds no needle with the full cache either, so retrieval says little here."
        return
    if use is None:
        return
    change = _paired(full.loglik, use.measured.loglik, setting.seed)
    if not _retrieves(change):
        yield f"It retrieves worse than the full cache: log-likelihood of the answers {_said(change)} nats/token,"
        yield f"{sum(use.measured.exact)} of {len(full.exact)} found against {sum(full.exact)}."


def _gain(full: Measured, use: Candidate, setting: Setting) -> Iterator[str]:
    """What the method saves, in sentences."""
    yield f"It holds {100 * use.measured.nbytes / full.nbytes:.1f} % of the full cache's bytes."
    whole = full.cost(setting.answer)
    if use.cost > whole * (1 - SLACK):
        yield f"It saves memory, not time, at this length: {use.cost:.3g} s against the full cache's {whole:.3g} s."


def _said(interval: Interval) -> str:
    """A mean with its interval."""
    ends = "" if interval.low is None else f" [{interval.low:.3g}, {interval.high:.3g}]"
    return f"{interval.mean:.3g}{ends}"


def _shown(found: Recommendation, choice: Choice) -> str:
    """One budget's table and verdict."""
    s = found.setting
    given = f"{choice.budget:.4g} of the full cache's bytes" if isinstance(choice.budget, float) else ""
    given = given or f"{choice.budget} slots, so bytes differ"
    header = ["method", "slots", "MB held", "KL, nats/token", "minus the best's"]
    header += ["found", "log-likelihood minus the best finder's"] if s.needles else []
    header += ["read, s", "ms/token"]
    rows = [header, _row(found.full, s.needles)]
    rows += [_row(c.measured, s.needles, c) for c in choice.candidates]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"not measured: {label}: {reason}" for label, reason in choice.left_out.items()]
    return "\n".join([f"Budget: {given}", *lines, "", choice.why])


def _row(m: Measured, needles: int, c: Candidate | None = None) -> list[str]:
    """One line of the table; without a candidate, the full cache's."""
    row = [m.label, "all" if m.slots is None else str(m.slots), f"{m.nbytes / 1e6:.3g}"]
    row += [_said(c.kl), _said(c.behind)] if c else ["0", ""]
    if needles:
        row += [f"{sum(m.exact)}/{len(m.exact)}", _said(c.retrieval) if c and c.retrieval else ""]
    return [*row, f"{m.read:.3g}", f"{1000 * m.token:.3g}"]


# --- measuring


def recommend(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    budget: int | float | Sequence[int | float] = 0.25,
    *,
    text: str | texts.Text | Tensor = "essays",
    methods: str | Sequence[str] = CANDIDATES,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> Recommendation:
    """Measure methods on a model and a text, and say which to use.

    Each passage is read once with the full cache and handed to every method; its continuation is predicted, teacher-
    forced, from what the method kept (:func:`kvrepro.fidelity`). At a share, methods hold equal bytes, side vectors and
    observation windows included, so their numbers of slots differ. The needles are RULER-style
    (:mod:`kvrepro.tasks.ruler`); the question is part of the prompt that is compressed. Times are of one prompt alone.

    Args:
        model: a prepared model, see :func:`kvrepro.load_model`.
        tokenizer: its tokenizer; not needed for a text of token ids without needles.
        budget: a share (float) of the bytes that transformers' own full cache holds of the context, or slots (int) per
            KV head and layer, sinks and recent included; or several. Sliding-window layers are left as they are, and
            a share is one of the other layers' bytes.
        text: a named text, the path of a text file (UTF-8), a `Text`, or token ids
            `[passages, context + continuation]`.
        methods: methods or variants, as ``"kvmerger(sigma=5.0)"``.
        setting: sizes, tolerance and seed.
        progress: called as ``progress(done, total, what)`` before each step, and once at the end.

    Returns:
        The numbers and, by :data:`RULE`, a verdict for each budget.

    Raises:
        ValueError: an unknown method, option or text, a bad size, a text that is too short, or a budget at which no
            method can be measured.
    """
    setting = setting or Setting()
    budgets = as_list(budget)
    variants = parse_variants(methods)
    check(budgets, variants, setting)
    if tokenizer is None and (setting.needles or not isinstance(text, Tensor)):
        raise ValueError("a tokenizer is needed, but for a text of token ids with needles=0")
    with torch.no_grad(), _released(), kernels.on(model.device):  # the clock's events are the current device's
        work = _Work(model, tokenizer, _passages(text, tokenizer, setting), budgets, variants, setting, progress)
        full, found, left_out = work.run()
    choices = []
    for each in budgets:
        own = [found[key] for key in found if key[0] == each]
        if not own:
            reasons = "; ".join(f"{label}: {reason}" for (size, label), reason in left_out.items() if size == each)
            raise ValueError(f"no method can be measured at a budget of {each}: {reasons}")
        unable = {label: reason for (size, label), reason in left_out.items() if size == each}
        choices.append(dataclasses.replace(choose(full, own, each, setting), left_out=unable))
    return Recommendation(
        model=str(model.config.name_or_path or type(model).__name__),
        text=text if isinstance(text, str) else text.name if isinstance(text, texts.Text) else "token ids",
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        setting=setting,
        full=full,
        choices=tuple(choices),
    )


def check(budgets: Sequence[int | float], variants: Sequence[Variant], setting: Setting) -> None:
    """What can be wrong before a model is loaded.

    Raises:
        ValueError: a budget or a method that cannot be compared.
    """
    if not budgets or not variants:
        raise ValueError("give at least one budget and one method")
    for budget in budgets:
        if not (0 < budget < 1 if isinstance(budget, float) else 0 < budget < setting.context):
            raise ValueError(
                f"a budget of {budget} saves nothing or keeps nothing: give a share between 0 and 1, or slots between "
                f"0 and the context of {setting.context} tokens"
            )
    if len(set(budgets)) < len(budgets):
        raise ValueError(f"budgets given twice: {', '.join(map(str, budgets))}")
    if any(variant.method == "full" for variant in variants):
        raise ValueError("the full cache is what methods are compared with: leave it out of the methods")


def read_text(name: str) -> texts.Text:
    """A named text, or a text file.

    Raises:
        ValueError: it is neither, or the file is no UTF-8 text.
    """
    if name in texts.names():
        return texts.load(name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a text file nor one of {', '.join(texts.names())}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    digest = hashlib.sha256(content.encode()).hexdigest()
    return texts.Text(path.name, (content,), digest, str(path), "the reader's own")


def _passages(text: str | texts.Text | Tensor, tokenizer: PreTrainedTokenizerBase | None, setting: Setting) -> Tensor:
    """Token ids `[passages, context + continuation]`.

    Raises:
        ValueError: too short a text, or too few token ids.
    """
    length = setting.context + setting.continuation
    if not isinstance(text, Tensor):
        source = read_text(text) if isinstance(text, str) else text
        return texts.tokens(source, tokenizer, length, setting.passages)
    if text.dim() != 2 or len(text) < setting.passages or text.shape[1] < length:
        raise ValueError(
            f"token ids of shape {tuple(text.shape)} are not {setting.passages} passages of {length} tokens"
        )
    return text[: setting.passages, :length]


@contextmanager
def _released() -> Iterator[None]:
    """Let go of the prompts that `kvrepro.tasks.batch` keeps for a next call: they hold the model and its states."""
    try:
        yield
    finally:
        batch._groups.cache_clear()
        batch._readings.cache_clear()


@dataclass(frozen=True)
class _Given(Bench):
    """A model that is loaded already, for what asks a bench for one."""

    pair: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer."""
        return self.pair


Key = tuple[int | float, str]


@dataclass
class _Work:
    """All measurements of one call; `cells` are the budgets and methods that can still be measured."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    ids: Tensor
    budgets: Sequence[int | float]
    variants: Sequence[Variant]
    setting: Setting
    progress: Progress | None

    def __post_init__(self) -> None:
        """Nothing is measured yet."""
        s = self.setting
        self.cells = [(budget, variant) for budget in self.budgets for variant in self.variants]
        self.slots: dict[Key, int] = {}
        self.left_out: dict[Key, str] = {}
        self.total = (s.passages + s.needles + s.repeats) * (1 + len(self.cells))
        self.done = 0

    def run(self) -> tuple[Measured, dict[Key, Measured], dict[Key, str]]:
        """The full cache, the methods, and why some are missing."""
        full_bytes, kl, nbytes = self._divergences()
        retrieved = self._retrieval() if self.setting.needles else {}
        times = self._times()
        nothing: tuple[list[float], list[bool]] = ([], [])
        full = Measured("full", None, full_bytes, [0.0] * len(self.ids), *retrieved.get(None, nothing), *times[None])
        found = {
            key: Measured(key[1], self.slots[key], nbytes[key], kl[key], *retrieved.get(key, nothing), *times[key])
            for key in (self._key(*cell) for cell in self.cells)
        }
        self._say("")
        return full, found, self.left_out

    @staticmethod
    def _key(budget: int | float, variant: Variant) -> Key:
        return budget, variant.label

    def _options(self, variant: Variant) -> dict[str, Any]:
        return {"seed": self.setting.seed, **variant.options}

    def _say(self, what: str, steps: int = 1) -> None:
        """Report what runs now and how many steps it is; the steps before are done."""
        if self.progress is not None:
            self.progress(self.done if what else self.total, self.total, what)
        self.done += steps

    def _leave_out(self, cell: tuple[int | float, Variant], reason: Exception) -> None:
        self.left_out[self._key(*cell)] = str(reason)
        self.cells.remove(cell)

    def _divergences(self) -> tuple[int, dict[Key, list[float]], dict[Key, int]]:
        """Bytes of the full cache; by budget and method the divergence of each passage, and the bytes held."""
        sizes = {"context": self.setting.context, "continuation": self.setting.continuation}
        kl: dict[Key, list[float]] = {}
        nbytes: dict[Key, int] = {}
        full_bytes = 0
        for number, passage in enumerate(self.ids.split(1), start=1):
            where = f"passage {number} of {len(self.ids)}"
            self._say(f"{where}: full cache")
            reference = evaluate.full_reference(self.model, passage, **sizes)
            full_bytes = _full_bytes(reference)
            for cell in list(self.cells):
                budget, variant = cell
                key = self._key(*cell)
                self._say(f"{where}: {variant.label}")
                try:
                    if key not in self.slots:
                        self.slots[key] = self._slots_of(budget, variant, reference)
                    found = evaluate.fidelity(
                        self.model,
                        passage,
                        variant.method,
                        self.slots[key],
                        reference=reference,
                        **sizes,
                        **self._options(variant),
                    )
                    _check_bytes(found.nbytes, budget, reference)
                except (ValueError, Skip) as error:  # the budget leaves this method no room
                    self._leave_out(cell, error)
                    continue
                kl.setdefault(key, []).append(float(found.kl.double().mean()))
                nbytes[key] = found.nbytes
        return full_bytes, kl, nbytes

    def _slots_of(self, budget: int | float, variant: Variant, reference: evaluate.Reference) -> int:
        """The slots that a budget pays for."""
        if isinstance(budget, int):
            return budget
        target = math.floor(budget * _layer_bytes(reference))
        return across.largest_budget(self.model, variant.method, variant.options, reference, target)

    def _retrieval(self) -> dict[Key | None, tuple[list[float], list[bool]]]:
        """Log-likelihood and exactness of each needle's answer, by budget and method; None is the full cache."""
        s = self.setting
        room = 128  # RULER's room for the answer, which its lengths include
        task = ruler.load(TASK, self.tokenizer, s.context + room, s.needles, s.seed)
        prompts = batch.Prompts(_Given("recommend", TASK, pair=(self.model, self.tokenizer)), task)
        found: dict[Key | None, tuple[list[float], list[bool]]] = {}
        full = (None, Variant("full"))
        for budget, variant in [full, *self.cells]:
            key = None if budget is None else self._key(budget, variant)
            self._say(f"needles: {variant.label}", s.needles)
            slots = None if key is None else self.slots[key]
            new_cache = partial(make_cache, self.model, variant.method, slots, **self._options(variant))
            scored = batch.score_references(prompts, new_cache)
            found[key] = [x.loglik for x in scored], [x.exact for x in scored]
        return found

    def _times(self) -> dict[Key | None, tuple[float, float]]:
        """Seconds to read a context and to write a token, by budget and method; None is the full cache."""
        ids = self.ids[:1, : self.setting.context].to(self.model.device)
        found: dict[Key | None, list[tuple[float, float]]] = {}
        for _ in range(self.setting.repeats):  # in turns, so that what else the machine does slows all
            for budget, variant in [(None, Variant("full")), *self.cells]:
                key = None if budget is None else self._key(budget, variant)
                self._say(f"time: {variant.label}")
                slots = None if key is None else self.slots[key]
                cache = make_cache(self.model, variant.method, slots, **self._options(variant))
                read = seconds_of(partial(evaluate.prefill, self.model, ids, cache), self.model.device)
                found.setdefault(key, []).append((read, _token_seconds(self.model, cache, self.setting.steps)))
        return {key: (min(read for read, _ in each), min(token for _, token in each)) for key, each in found.items()}


def _check_bytes(nbytes: int, budget: int | float, reference: evaluate.Reference) -> None:
    """Make sure that a method keeps to a share; with sliding-window layers, whose bytes count, too, it is not checked.

    Raises:
        Skip: it holds more.
    """
    if isinstance(budget, float) and reference.replayable and nbytes > budget * _layer_bytes(reference):
        raise Skip(f"holds {nbytes:,} bytes at least, more than {budget:g} of {_layer_bytes(reference):,}")


def _layer_bytes(reference: evaluate.Reference) -> int:
    """Bytes of keys and values in the layers that are compressed."""
    notes = [note for layer in reference.passes for note in layer]
    return sum(x.numel() * x.element_size() for note in notes for x in (note.keys, note.values))


def _full_bytes(reference: evaluate.Reference) -> int:
    """Bytes of transformers' own full cache; with sliding-window layers those of ours, whose positions count, too."""
    return _layer_bytes(reference) if reference.replayable else reference.nbytes


def _token_seconds(model: PreTrainedModel, cache: Any, steps: int) -> float:
    """Mean seconds of a decoding step after a prompt, those aside that warm up."""
    skipped = SKIPPED.get(model.device.type, 2)
    clock = Clock(model.device)
    token = torch.zeros(1, dtype=torch.long, device=model.device)
    with Decoder(model, cache, room=skipped + steps) as decoder:

        def body() -> None:
            """Read one token, take the likeliest next one."""
            token.copy_(decoder.logits(token).argmax(dim=-1))

        decoder.run(body, skipped + steps, progress=clock.mark)
        return float(clock.seconds()[skipped - 1 :].mean())
