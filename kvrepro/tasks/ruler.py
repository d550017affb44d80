"""Prompts in the style of RULER (Hsieh et al., 2024): needles and chains of variables in noise, generated from a seed.

From a copy of RULER's generators: wording, noise, needles, numbers of keys, values and hops, lengths that include what
is to be written, and tokens to write; the metric is second-hand. Ours: a short list of words for keys (RULER draws from
package wonderwords), depths drawn as fractions so that a sample keeps its content at every length, no worked example
before variable tracking, and no essay haystack. So scores are not RULER's.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from kvrepro.tasks.base import Sample, Task, check_count, pick, token_ids

SUITE = "ruler"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = (
    "amber ancient brave bright calm clever cloudy crimson curious dusty eager fancy gentle golden hidden hollow icy "
    "jolly keen lively mellow misty narrow noble old plain quiet rapid rusty silent silver sleepy steady stormy sunny "
    "tall tidy vivid warm wild"
)
_NOUNS = (
    "anchor apple badge basket bridge candle canyon castle cedar clock cloud comet desert eagle engine falcon feather "
    "forest garden harbor island kettle ladder lantern marble meadow mirror monkey mountain ocean orchard pencil piano "
    "pillow planet river rocket saddle temple violin"
)
_WORDS = [f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{context}\nWhat is the special magic number for {query} mentioned in the provided text?",
    " The special magic number for {query} mentioned in the provided text is",
)
_MANY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} mentioned in the provided "
    "text?",
    " The special magic numbers for {query} mentioned in the provided text are",
)
_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assigned the value "
    "{value}, they are: ",
)


@dataclass(frozen=True)
class Needles:
    """How many needles of which kind.

    Attributes:
        keys: keys with numbers of their own.
        values: numbers a key.
        queries: keys asked for.
        distractors: the haystack is made of further needles instead of noise.
    """

    keys: int = 1
    values: int = 1
    queries: int = 1
    distractors: bool = False


#: RULER's niah_single_1, niah_multikey_1, niah_multivalue, niah_multiquery (these three with noise for essays), and
#: niah_multikey_2.
NEEDLES = {
    "niah_single": Needles(),
    "niah_multikey": Needles(keys=4),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
    "niah_distractors": Needles(distractors=True),
}
TRACKING = "variable_tracking"
NAMES = (*NEEDLES, TRACKING)
HOPS = 4


def load(name: str, tokenizer: PreTrainedTokenizerBase, length: int, samples: int = 4, seed: int = 0) -> Task:
    """A generated task.

    Args:
        name: one of `NAMES`.
        tokenizer: the model's, which counts the tokens.
        length: tokens of a prompt and of what is to be written, at most; the chat template comes on top.
        samples: prompts.
        seed: of all draws.

    Raises:
        ValueError: an unknown task, or a length with no room for the needles.
    """
    pick(NAMES, name, SUITE)
    check_count(samples)
    chosen = []
    for index in range(samples):
        draw = random.Random(f"{name}-{seed}-{index}")
        build = _tracking(draw, index) if name == TRACKING else _needles(NEEDLES[name], draw, index)
        chosen.append(_longest(build, tokenizer, length))
    return Task(SUITE, name, "share_found", f"ruler/{name}", {}, tuple(chosen))


def _longest(build: Callable[[int], Sample], tokenizer: PreTrainedTokenizerBase, length: int) -> Sample:
    """The sample with as many lines of haystack as fit."""

    def fits(lines: int) -> bool:
        """Whether that many lines do."""
        sample = build(lines)
        return len(token_ids(tokenizer, sample.prompt + sample.lead)) + sample.max_new_tokens <= length

    if not fits(1):
        raise ValueError(f"length={length} has no room for a line of haystack beside question and answer")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return build(low)


def _spread(lines: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """The lines with each needle put in at its depth, 0 (before the first line) to 1 (after the last), in order."""
    text, taken = [], 0
    for needle, depth in zip(needles, sorted(depths), strict=True):
        place = round(depth * len(lines))
        text += [*lines[taken:place], needle]
        taken = place
    return "\n".join([*text, *lines[taken:]])


def _needles(kind: Needles, draw: random.Random, index: int) -> Callable[[int], Sample]:
    """A sample by its number of lines."""
    keys = _words(draw, kind.keys)
    numbers = {key: [_number(draw) for _ in range(kind.values)] for key in keys}
    needles = [_NEEDLE.format(key=key, value=value) for key in keys for value in numbers[key]]
    draw.shuffle(needles)
    depths = [draw.random() for _ in needles]
    asked = draw.sample(keys, kind.queries)
    filler = partial(_distractors, draw.randrange(1 << 30), keys) if kind.distractors else _noise
    answers = tuple(value for key in asked for value in numbers[key])
    prompt, lead = _ONE if len(answers) == 1 else _MANY
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"

    def build(lines: int) -> Sample:
        """The sample with that many lines of haystack."""
        context = _spread(filler(lines), needles, depths)
        return Sample(
            id=str(index),
            prompt=prompt.format(context=context, query=query),
            answers=answers,
            max_new_tokens=128,
            document=str(index),
            lead=lead.format(query=query),
            target=", ".join(answers),
        )

    return build


def _tracking(draw: random.Random, index: int) -> Callable[[int], Sample]:
    """A chain VAR A = 12345, VAR B = VAR A, … by the number of lines of noise between its links."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(draw.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = str(draw.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:], strict=False))]
    depths = [draw.random() for _ in chain]

    def build(lines: int) -> Sample:
        """The sample with that many lines of haystack."""
        prompt, lead = _TRACKING
        return Sample(
            id=str(index),
            prompt=prompt.format(context=_spread(_noise(lines), chain, depths), value=value),
            answers=tuple(names),
            max_new_tokens=30,
            document=str(index),
            lead=lead.format(n=len(names), value=value),
            target=" ".join(names),
        )

    return build


def _noise(lines: int) -> list[str]:
    return [NOISE] * lines


def _distractors(seed: int, keys: Sequence[str], lines: int) -> list[str]:
    """Needles for other keys; the first lines are the same whatever their number."""
    draw = random.Random(seed)
    return [_NEEDLE.format(key=_other(draw, keys), value=_number(draw)) for _ in range(lines)]


def _other(draw: random.Random, keys: Sequence[str]) -> str:
    """A word that is none of the keys."""
    while (word := _words(draw, 1)[0]) in keys:
        pass
    return word


def _words(draw: random.Random, n: int) -> list[str]:
    """Different words of the form adjective-noun."""
    return draw.sample(_WORDS, n)


def _number(draw: random.Random) -> str:
    """Seven digits."""
    return str(draw.randrange(1_000_000, 10_000_000))
