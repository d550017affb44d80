"""Needle in a haystack: a number hidden in a long text is asked for at the end (KVMerger's Fig. 5)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvrepro
from kvrepro.cache import Pass
from kvrepro.experiments.common import Bench, Variant, as_list, parse_variants
from kvrepro.records import Record, Value

PAPER = "kvmerger"

CITIES = ("Oslo", "Lisbon", "Nairobi", "Kyoto", "Toronto", "Lima", "Prague", "Cairo", "Dublin", "Hanoi", "Quito")
NEEDLE = " The special magic number for {city} is {number}."
INSTRUCTION = "Read the text and answer the question.\n\nText: "
QUESTION = "\n\nQuestion: What is the special magic number for {city} mentioned in the text?"
LEAD = "The special magic number for {city} is"
ANSWER = " {number}"
#: Where the question is when the cache is compressed: in the prompt, or after it.
QUESTIONS = ("seen", "unseen")
_MARK = "\x00"


@dataclass(frozen=True)
class Haystack:
    """One prompt with its answer, as token ids.

    Attributes:
        context: The instruction and the text with the needle, ``[1, n]``.
        question: The question and the beginning of the answer, ``[1, m]``.
        answer: The number, ``[1, a]``.
    """

    context: Tensor
    question: Tensor
    answer: Tensor

    def to(self, device: torch.device) -> Haystack:
        """The same on a device."""
        return Haystack(self.context.to(device), self.question.to(device), self.answer.to(device))


def needle(
    text: str,
    methods: str | Sequence[str],
    lengths: int | Sequence[int],
    depths: float | Sequence[float],
    budget: float,
    samples: int,
    question: str,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """How well a number hidden in a text is found, by length of the prompt and depth of the number.

    Args:
        text: Named text, the haystack.
        methods: Methods or variants.
        lengths: Tokens of the whole prompt, template included.
        depths: Places of the needle, from 0 (start) to 1 (end).
        budget: Share of the prompt that the cache may hold.
        samples: Prompts a cell, each with its own stretch of text, city and number.
        question: ``"seen"``: the question is part of the prompt that is compressed; ``"unseen"``: the text is
            compressed first and the question comes after.
        model: Model to load; one with a chat template.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        One record a method, length and depth, see :func:`_needle`.

    Raises:
        ValueError: Unknown ``question``, a depth outside [0, 1], or a text shorter than the longest prompt.
    """
    if question not in QUESTIONS:
        raise ValueError(f"question={question!r} is not valid; choose one of {list(QUESTIONS)}")
    if bad := [d for d in as_list(depths) if not 0 <= d <= 1]:
        raise ValueError(f"depths {bad} are not valid; a depth is from 0 (start of the text) to 1 (its end)")
    bench = Bench(PAPER, "needle", model, device, dtype)
    bench.windows(text, max(as_list(lengths)), samples)  # says at once when the text is too short
    jobs = []
    for length, depth, variant in product(as_list(lengths), as_list(depths), parse_variants(methods)):
        cell = bench.cell(
            "log-likelihood of the answer",
            "nats per token",
            data=text,
            method=variant,
            budget=None if variant.method == "full" else budget,
            length=length,
            depth=depth,
            samples=samples,
            question=question,
        )
        jobs.append((cell, partial(_needle, bench, text, variant, length, depth, budget, samples, question)))
    return bench.sweep(jobs)


@torch.no_grad()
def _needle(
    bench: Bench, text: str, variant: Variant, length: int, depth: float, budget: float, samples: int, question: str
) -> Value:
    """Ask for the number of each sample.

    Returns:
        The value is the mean log-likelihood per token of the number, its spread the standard error over samples.
        ``extra``: ``loglik`` [samples]; ``found`` [samples], 1 where greedy decoding gives the number; ``slots``, the
        mean number of slots that a head and layer holds at the end.
    """
    model, _ = bench.load()
    loglik, found, slots = [], [], []
    for reading in _readings(bench, text, length, depth, samples, question == "seen"):
        options = {} if variant.method == "full" else {"budget": budget}
        cache = kvrepro.make_cache(model, variant.method, **options, **variant.options)
        score, right = ask(model, cache, reading)
        loglik.append(score)
        found.append(int(right))
        slots.append(sum(float((c.cardinality > 0).sum(-1).float().mean()) for c in cache.layers) / len(cache.layers))
    values = torch.tensor(loglik, dtype=torch.float64)
    error = float(values.std() / samples**0.5) if samples > 1 else None
    extra = {"loglik": loglik, "found": found, "slots": sum(slots) / samples}
    return Value(float(values.mean()), error, samples, extra)


@dataclass(frozen=True)
class Reading:
    """A prompt read once with the full cache, to be compressed by any method.

    Attributes:
        prompt: What is compressed in one go, ``[1, n]``.
        rest: What is read after that, ``[1, m]``; m may be 0.
        answer: The number, ``[1, a]``.
        logits: The full cache's prediction after the prompt, ``[V]``.
        passes: What each layer was handed, for ``CompressedCache.replay``.
    """

    prompt: Tensor
    rest: Tensor
    answer: Tensor
    logits: Tensor
    passes: list[list[Pass]]


@lru_cache(maxsize=1)
@torch.no_grad()
def _readings(bench: Bench, text: str, length: int, depth: float, samples: int, seen: bool) -> list[Reading]:
    """The prompts of one length and depth, read once for all methods (the last ones asked for are kept)."""
    model, tokenizer = bench.load()
    found = []
    for sample, ids in enumerate(bench.windows(text, length, samples)):
        stack = make_haystack(tokenizer, ids, depth, seed=sample).to(model.device)
        prompt = torch.cat([stack.context, stack.question], dim=1) if seen else stack.context
        rest = stack.question[:, :0] if seen else stack.question
        cache = kvrepro.make_cache(model, "full")
        passes = cache.record()
        logits = kvrepro.prefill(model, prompt, cache).logits[0, -1]
        found.append(Reading(prompt, rest, stack.answer, logits, passes))
    return found


def make_haystack(tokenizer: PreTrainedTokenizerBase, ids: Tensor, depth: float, seed: int) -> Haystack:
    """A stretch of text with a needle in it, in the model's chat template.

    The needle goes to the end of the sentence before the place that ``depth`` says. City and number follow from the
    seed alone, so that every method, length and depth is asked for the same ones.

    Args:
        tokenizer: The model's tokenizer.
        ids: Token ids ``[n]`` of the text; its last ones are used, as many as give a prompt of n tokens in all.
        depth: 0 (start) to 1 (end).
        seed: Number of the sample.

    Returns:
        The prompt in parts, and the answer.

    Raises:
        ValueError: The template alone is longer than the text.
    """
    length = len(ids)
    draw = random.Random(seed)
    names = {"city": draw.choice(CITIES), "number": draw.randrange(10_000, 100_000)}
    message = [{"role": "user", "content": INSTRUCTION + _MARK + QUESTION.format(**names)}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, after = (_tokens(tokenizer, part) for part in (prompt + LEAD.format(**names)).split(_MARK))
    pin, answer = _tokens(tokenizer, NEEDLE.format(**names)), _tokens(tokenizer, ANSWER.format(**names))
    room = length - len(before) - len(after) - len(pin)
    if room < 1:
        raise ValueError(f"the template alone has {length - room} tokens: prompts of {length} are too short")
    body = ids[-room:]
    place = sentence_end(tokenizer, body, round(depth * room))
    context = torch.cat([before, body[:place], pin, body[place:]])
    return Haystack(context[None], after[None], answer[None])


def sentence_end(tokenizer: PreTrainedTokenizerBase, ids: Tensor, place: int) -> int:
    """The last place at or before ``place`` that follows a token ending in a full stop, ``?`` or ``!``; 0 if none."""
    while place > 0 and not tokenizer.decode(ids[place - 1 : place]).rstrip().endswith((".", "?", "!")):
        place -= 1
    return place


def ask(model: PreTrainedModel, cache: kvrepro.CompressedCache, reading: Reading) -> tuple[float, bool]:
    """Compress the prompt and score the answer, token by token.

    Args:
        model: The model.
        cache: An empty cache; it is compressed after the prompt, after what is read next, and at every token of the
            answer.
        reading: The prompt.

    Returns:
        Mean log-likelihood of the answer's tokens, and whether each is the most likely one: exactly then greedy
        decoding gives the answer.
    """
    if len(reading.passes) == len(cache.layers) and cache.method.replayable:
        cache.plan(reading.prompt.shape[1])
        cache.replay(reading.passes)
        logits = reading.logits
    else:  # sliding-window layers are no part of a replay, and some methods take more of the model than one pass
        logits = kvrepro.prefill(model, reading.prompt, cache).logits[0, -1]
    if reading.rest.shape[1]:
        logits = kvrepro.prefill(model, reading.rest, cache).logits[0, -1]
    scores, right = [], True
    for place, token in enumerate(reading.answer[0]):
        scores.append(float(logits.float().log_softmax(-1)[token]))
        right = right and bool(logits.argmax() == token)
        if place + 1 < reading.answer.shape[1]:
            logits = kvrepro.prefill(model, reading.answer[:, place : place + 1], cache).logits[0, -1]
    return sum(scores) / len(scores), right


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids ``[n]`` without special tokens added."""
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0].long()
