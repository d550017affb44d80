"""Many samples, methods and budgets fast: prompts side by side, read once with the full cache for all methods.

Prompts with the same number of tokens are read side by side, so that there is no padding and every budget is exactly
its share. Where a prompt is compressed in one shot, what each layer was handed does not depend on the method: the
prompt is read once and each method's cache is filled from that (`CompressedCache.replay`), as long as memory holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvrepro
from kvrepro.adapter import cache_arguments
from kvrepro.cache import CompressedCache, Pass
from kvrepro.experiments.common import Bench
from kvrepro.memory import free_bytes
from kvrepro.tasks.base import Task, encode, encode_reference, render
from kvrepro.tasks.metrics import METRICS
from kvrepro.tasks.run import end_tokens

#: Prompts read side by side, by device.
ROWS = {"cuda": 16}
_ROWS = 4
#: Share of the free memory that prompts already read may take.
_KEPT = 0.25


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of one task for one model.

    Attributes:
        bench: loads the model.
        task: the task.
        max_length: tokens of a prompt at most, the chat template not counted; None cuts nothing.
        rows: prompts read side by side; None is 16 on a GPU, else 4. Results do not depend on it.
    """

    bench: Bench
    task: Task
    max_length: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Group:
    """Prompts of one length, read side by side.

    Attributes:
        places: index of each prompt's sample in the task, B of them.
        ids: `[B, L]`.
        references: reference answer of each, `[a]`: its first tokens, as many as the model may write (ours).
        logits: the full cache's prediction after the prompts `[B, V]`; None where they have to be read again.
        passes: what each layer was handed, for `CompressedCache.replay`; empty where they have to be read again.
    """

    places: tuple[int, ...]
    ids: Tensor
    references: tuple[Tensor, ...]
    logits: Tensor | None = None
    passes: tuple[list[Pass], ...] = ()


@dataclass(frozen=True)
class Scored:
    """The reference answer of one sample after its compressed prompt.

    Attributes:
        loglik: mean log-likelihood of its tokens, nats per token.
        exact: whether each token is the likeliest one: exactly then greedy decoding begins with the answer.
        tokens: of the prompt.
        slots: slots that a head holds of the prompt, mean over layers.
        fallbacks: how often a head of any layer fell back to plain eviction; None for methods that do not count it.
    """

    loglik: float
    exact: bool
    tokens: int
    slots: float
    fallbacks: int | None = None


@lru_cache(maxsize=1)
def _groups(prompts: Prompts) -> list[Group]:
    """The prompts in groups, not read yet; longest first."""
    model, tokenizer = prompts.bench.load()
    rows = prompts.rows or ROWS.get(model.device.type, _ROWS)
    asked = [_tokens(tokenizer, prompts, place) for place in range(len(prompts.task.samples))]
    lengths = sorted({ids.shape[1] for ids, _ in asked}, reverse=True)
    found = []
    for length in lengths:
        same = [place for place, (ids, _) in enumerate(asked) if ids.shape[1] == length]
        for start in range(0, len(same), rows):
            places = tuple(same[start : start + rows])
            ids = torch.cat([asked[place][0] for place in places]).to(model.device)
            found.append(Group(places, ids, tuple(asked[place][1].to(model.device) for place in places)))
    return found


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, place: int) -> tuple[Tensor, Tensor]:
    """One sample's prompt `[1, L]` and reference answer `[a]`."""
    task, sample = prompts.task, prompts.task.samples[place]
    text = render(tokenizer, task, sample, prompts.max_length)
    answer = encode_reference(tokenizer, text, sample)[0]
    return encode(tokenizer, task, text), answer[: sample.max_new_tokens]


@lru_cache(maxsize=1)
@torch.no_grad()
def _readings(prompts: Prompts) -> list[Group]:
    """The groups, read once with the full cache: those that memory holds (the last task's are kept)."""
    model, _ = prompts.bench.load()
    room = _KEPT * free_bytes(model.device)
    found = []
    for group in _groups(prompts):
        if room <= 0:
            found.append(group)
            continue
        cache = kvrepro.make_cache(model, "full")
        passes = cache.record()
        logits = kvrepro.prefill(model, group.ids, cache).logits[:, -1]
        if len(passes) != len(cache.layers):  # sliding-window layers are no part of a replay
            return list(_groups(prompts))
        found.append(Group(group.places, group.ids, group.references, logits, tuple(passes)))
        notes = [note for layer in passes for note in layer]
        room -= sum(x.numel() * x.element_size() for note in notes for x in (note.keys, note.values, note.query))
    return found


def compressed(
    prompts: Prompts, new_cache: Callable[[], CompressedCache], chunk: int | None
) -> Iterator[tuple[Group, CompressedCache, Tensor]]:
    """Each group with a cache that holds its prompts, and the prediction after them `[B, V]`.

    Args:
        prompts: the prompts.
        new_cache: makes an empty cache.
        chunk: tokens read between compressions; None reads a prompt in one pass (AsymKV, which asks for the gradient of
            its chunk's loss, in chunks all the same).
    """
    model, _ = prompts.bench.load()
    for group in _readings(prompts) if chunk is None else _groups(prompts):
        cache = new_cache()
        if group.passes and cache.method.replayable:
            cache.plan(group.ids.shape[1])
            cache.replay(list(group.passes))
            yield group, cache, group.logits
        else:
            yield group, cache, kvrepro.prefill(model, group.ids, cache, chunk=chunk).logits[:, -1]


@torch.no_grad()
def score_references(
    prompts: Prompts, new_cache: Callable[[], CompressedCache], chunk: int | None = None
) -> list[Scored]:
    """The reference answers after the compressed prompts, teacher-forced: nothing is compressed while they are read.

    Args:
        prompts: the prompts.
        new_cache: makes an empty cache.
        chunk: see `compressed`.

    Returns:
        One a sample, in order.
    """
    model, _ = prompts.bench.load()
    found: dict[int, Scored] = {}
    for group, cache, first in compressed(prompts, new_cache, chunk):
        held = [float((layer.cardinality > 0).sum(-1).float().mean()) for layer in cache.compressed]
        counts = cache.fallbacks
        fallen = [None] * len(group.places) if counts is None else counts.tolist()
        cache.freeze()
        for row, scored in enumerate(_answers(model, cache, first, group.references)):
            found[group.places[row]] = Scored(*scored, group.ids.shape[1], sum(held) / len(held), fallen[row])
    return [found[place] for place in range(len(prompts.task.samples))]


def _answers(
    model: PreTrainedModel, cache: CompressedCache, first: Tensor, answers: Sequence[Tensor]
) -> Iterator[tuple[float, bool]]:
    """Log-likelihood and exactness of each row's answer `[a]`, all read in one pass; `first` `[B, V]` predicts it."""
    longest = max(len(answer) for answer in answers)
    rest = first.new_empty(len(answers), 0, first.shape[-1])
    if longest > 1:  # what stands behind a shorter answer is read, too, and does not count
        ids = torch.nn.utils.rnn.pad_sequence(list(answers), batch_first=True)[:, :-1]
        rest = model(input_ids=ids, **cache_arguments(model, cache)).logits
    for row, answer in enumerate(answers):
        logits = torch.cat([first[row : row + 1], rest[row, : len(answer) - 1]]).float()  # [a, V]
        loglik = logits.log_softmax(-1).gather(-1, answer[:, None]).double().mean()
        yield float(loglik), bool((logits.argmax(-1) == answer).all())


@torch.no_grad()
def write_answers(
    prompts: Prompts, new_cache: Callable[[], CompressedCache], chunk: int | None = None
) -> list[tuple[str, float]]:
    """What the model writes after each compressed prompt, held to its budget meanwhile, and its score in [0, 1].

    Args:
        prompts: the prompts.
        new_cache: makes an empty cache.
        chunk: see `compressed`.

    Returns:
        One a sample, in order.
    """
    model, tokenizer = prompts.bench.load()
    task = prompts.task
    stops = end_tokens(model, tokenizer, task)
    found: dict[int, tuple[str, float]] = {}
    for group, cache, logits in compressed(prompts, new_cache, chunk):
        most = max(task.samples[place].max_new_tokens for place in group.places)
        ids = write_rows(model, logits, cache, most, stops, at_least_one=task.stop_at_newline)
        for place, row in zip(group.places, ids, strict=True):
            sample = task.samples[place]
            text = str(tokenizer.decode(row[: sample.max_new_tokens], skip_special_tokens=True))
            scored = text.lstrip("\n").split("\n")[0] if task.first_line else text
            found[place] = text, METRICS[task.metric](scored, sample.answers, sample.all_classes)
    return [found[place] for place in range(len(task.samples))]


def write_rows(
    model: PreTrainedModel,
    logits: Tensor,
    cache: CompressedCache,
    max_new_tokens: int,
    stops: Sequence[int],
    *,
    at_least_one: bool = False,
) -> list[list[int]]:
    """The likeliest token, one after another, in rows side by side, each up to what ended it.

    Args:
        model: a prepared model.
        logits: `[B, V]`, the prediction after the prompts.
        cache: holds the prompts.
        max_new_tokens: tokens to write at most.
        stops: tokens that end a row; the one that did is left out.
        at_least_one: never take a stop as the first token.
    """
    logits = logits.float().clone()
    if at_least_one:
        logits[:, list(stops)] = -torch.inf
    ids = logits.argmax(-1, keepdim=True)  # [B, 1]
    ended = all(token in stops for token in ids[:, 0].tolist())
    if max_new_tokens > 1 and not ended:
        ids = kvrepro.generate(model, ids, cache, max_new_tokens - 1, eos_token_id=stops or None)
    return [_until(row, stops) for row in ids.tolist()]


def _until(row: list[int], stops: Sequence[int]) -> list[int]:
    """A row up to the first token that ends it."""
    return row[: next((place for place, token in enumerate(row) if token in stops), len(row))]
