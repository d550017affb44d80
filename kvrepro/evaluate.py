"""Reading text through a compressed cache: prompts in chunks, perplexity, and fidelity to the full cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvrepro.adapter import cache_arguments, cache_keyword
from kvrepro.attention import Step
from kvrepro.cache import CompressedCache, CompressedLayer, GradientProbe, Pass, SecondReading, make_cache
from kvrepro.fixed import RepeatedChunk, repeats
from kvrepro.memory import explained, rows_that_fit

#: AsymKV reads prompts in chunks of 512 tokens (its code).
_GRADIENT_CHUNK = 512
#: Chunks still to come that make it worth capturing one.
_WORTH = 4
#: Logits held at once while perplexity reads many tokens in one pass, in elements.
_LOGITS = 1 << 26


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: CompressedCache,
    *,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
    keep_logits: int = 1,
) -> CausalLMOutputWithPast:
    """Read a prompt into a cache, in chunks: no layer ever holds more than budget + chunk slots.

    Some methods take more of the model than one pass, for each chunk that overflows the budget: AsymKV with its loss
    gradient a forward and a backward pass before the chunk is read, Attention Matching with `queries="repeat"` a
    forward pass after it. Until that pass has come to a layer, the layer holds its slots, the chunk and its queries.

    Args:
        model: the model the cache was made for.
        input_ids: `[B, L]`.
        cache: from `make_cache`.
        attention_mask: `[B, L]`, 0 marks padding on the left.
        chunk: tokens read at a time; None reads all at once (AsymKV with its loss gradient: at most 512, or a quarter
            of the budget).
        keep_logits: logits to return for the last tokens of each chunk; 0 is all of them.

    Returns:
        The model's output for the last chunk; `logits` `[B, keep_logits, V]`.

    Raises:
        ValueError: chunk below 1, an empty prompt, or a budget that leaves no room.
        torch.OutOfMemoryError: with what was asked for, and what would fit.
    """
    length = input_ids.shape[1]
    if length == 0 or (chunk is not None and chunk < 1):
        raise ValueError(
            f"nothing to read: {length} tokens in chunks of {chunk}; give at least one token and chunk >= 1"
        )
    if cache.get_seq_length() == 0:
        cache.plan(length)
    by_loss = _by_loss(cache) and cache.compressed[0].budget is not None
    size = min(length if chunk is None else chunk, _longest_pass(cache, length))
    before = cache.get_seq_length()

    def read(part: Tensor, seen: dict[str, Tensor]) -> CausalLMOutputWithPast:
        """Read one chunk."""
        if by_loss:
            _compress_by_loss(model, part, cache, seen)
        with torch.no_grad():
            return model(input_ids=part, logits_to_keep=keep_logits, **cache_arguments(model, cache), **seen)

    output, graph, full = None, None, False
    with explained(model, cache, input_ids.shape[0], length, chunk):
        for start in range(0, length, size):
            part = input_ids[:, start : start + size]
            if full and graph is None and start + _WORTH * size <= length and attention_mask is None:
                graph = RepeatedChunk(cache, lambda ids, places: read(ids, {"position_ids": places}).logits, part)
            if graph is not None and part.shape[1] == size:
                output = CausalLMOutputWithPast(logits=graph(part), **{cache_keyword(model): cache})
                continue
            full = repeats(model, cache, size)
            seen = _masked(cache, attention_mask, before, start, start + part.shape[1])
            if not _reads_twice(cache, part.shape[1]):
                output = read(part, seen)
            else:
                with cache.postponing() as waiting:
                    output = read(part, seen)
                _read_again(model, part, cache, waiting, seen)
            full = full and repeats(model, cache, size)
    return output


def _masked(
    cache: CompressedCache, attention_mask: Tensor | None, before: int, start: int, stop: int
) -> dict[str, Tensor]:
    """What the model must know of padding to read the tokens from `start` to `stop`: mask and position ids.

    Padding is not counted, as in `model.generate`: decoding goes on from each row's own length. `before` tokens were
    read by earlier calls.
    """
    if attention_mask is None:
        return {}
    counted = attention_mask[:, start:stop].long().cumsum(dim=1)
    rows = cache.compressed[0].row_tokens
    places = counted - 1 if rows is None else counted - 1 + rows[:, None]
    mask = torch.nn.functional.pad(attention_mask[:, :stop], (before, 0), value=1)
    return {"attention_mask": mask, "position_ids": places.clamp_min(0)}


def _by_loss(cache: CompressedCache) -> bool:
    """Whether the method asks for the loss's gradient."""
    return getattr(cache.method, "fisher", None) == "loss"


def _longest_pass(cache: CompressedCache, length: int) -> int:
    """The most of `length` tokens that one pass may read: all, but where the loss's gradient is asked for."""
    budget = cache.compressed[0].budget
    if not _by_loss(cache) or budget is None:
        return length
    return max(1, min(_GRADIENT_CHUNK, budget // 4, budget - cache.method.sinks_of(budget) - 1))


def _compress_by_loss(model: PreTrainedModel, part: Tensor, cache: CompressedCache, seen: dict[str, Tensor]) -> None:
    """AsymKV: take the gradient of the chunk's loss by the cached keys, and merge the past so that the chunk fits."""
    mask = seen.get("attention_mask")
    layers = cache.compressed
    n = part.shape[1]
    if layers[0].slots is None or layers[0].slots.size + n <= layers[0].budget or n < 2:
        return
    probes = [GradientProbe() for _ in layers]
    with cache.probing(probes), torch.enable_grad():
        logits = model(input_ids=part, **cache_arguments(model, cache), **seen).logits
        target = part[:, 1:] if mask is None else part[:, 1:].masked_fill(mask[:, -n + 1 :] == 0, -100)
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten())
        gradients = torch.autograd.grad(loss, [probe.leaf for probe in probes])
    for layer, probe, gradient in zip(layers, probes, gradients, strict=True):
        probe.compress(layer, gradient)


def _reads_twice(cache: CompressedCache, arrived: int) -> bool:
    """Whether a layer that `arrived` tokens overflow waits for a second reading."""
    return any(layer.active and layer.method.reads_twice(arrived, layer.budget) for layer in cache.compressed)


@torch.no_grad()
def _read_again(
    model: PreTrainedModel,
    part: Tensor,
    cache: CompressedCache,
    waiting: list[tuple[CompressedLayer, Step]],
    seen: dict[str, Tensor],
) -> None:
    """Read a chunk a second time, behind itself, storing nothing; the layers that waited for it compress.

    Args:
        model: the model.
        part: `[B, n]`, the chunk.
        cache: the cache, which holds the chunk.
        waiting: the layers that wait, with the pass that made them overflow; nothing is read if there are none.
        seen: what the model was told of padding for the first reading.

    Raises:
        ValueError: padding in a model with sliding-window layers, where it would stand between the two readings.
    """
    if not waiting:
        return
    again, n = {}, part.shape[1]
    if seen:
        mask, places = seen["attention_mask"], seen["position_ids"]
        tokens = mask[:, -n:].sum(dim=1, keepdim=True)
        if len(cache.compressed) != len(cache.layers) and bool((tokens < n).any()):
            raise ValueError(
                f"{cache.method.name} reads this prompt twice, and a padded row's padding would push its first reading "
                "out of the sliding windows of the second: read prompts of one length, or one at a time"
            )
        again = {"attention_mask": torch.cat([mask, mask[:, -n:]], dim=1), "position_ids": places + tokens}
    firsts = dict(waiting)
    waiting.clear()
    with cache.probing([SecondReading(firsts.pop(layer, None)) for layer in cache.compressed]):
        model(input_ids=part, logits_to_keep=1, **cache_arguments(model, cache), **again)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text read through a cache.

    Attributes:
        ppl: exp of the mean negative log-likelihood.
        nll: `[B, windows, scored]` float32, nats per token.
        positions: `[windows, scored]` int64, index of each scored token in its text.
    """

    ppl: float
    nll: Tensor
    positions: Tensor


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: str,
    budget: int | float | None = None,
    *,
    window: int,
    stride: int,
    chunk: int = 1,
    batch_size: int | None = None,
    progress: Callable[[int], Any] | None = None,
    **options: Any,
) -> Perplexity:
    """Sliding-window perplexity (WeightedKV's protocol; the fresh cache and what is scored are our reading of it).

    The text is cut into windows of `window` tokens that start `stride` apart; each is read from an empty cache, and
    its last `stride` tokens are scored.

    Args:
        model: a prepared model.
        input_ids: `[T]`, or `[B, T]` for B texts; the windows of all texts are read side by side.
        method: one of `kvrepro.methods.names()`.
        budget: slots per KV head and layer, a share of the window, or None.
        window: tokens a window.
        stride: tokens scored a window; the paper uses window / 2.
        chunk: tokens read between compressions; 1 is exact to the token.
        batch_size: windows read side by side; None is 32, or 128 on a GPU, or what memory holds.
        progress: called with the number of tokens read after each step.
        **options: the method's options.

    Returns:
        Perplexity with its per-token negative log-likelihoods.

    Raises:
        ValueError: a text shorter than the window, or a stride outside [1, window).
    """
    texts = input_ids.view(1, -1) if input_ids.dim() == 1 else input_ids
    if batch_size is None:
        batch_size = _default_batch(model, make_cache(model, method, budget, **options), window)
    if not 1 <= stride < window or chunk < 1 or batch_size < 1:
        raise ValueError(f"stride={stride} must be in [1, window={window}); chunk and batch_size at least 1")
    if texts.shape[1] < window:
        raise ValueError(f"the text has {texts.shape[1]} tokens, fewer than the window of {window}; shorten the window")
    windows = texts.unfold(1, window, stride)  # [B, n, window]
    scored = [
        score(model, batch, make_cache(model, method, budget, **options), stride, chunk, progress)
        for batch in windows.flatten(0, 1).split(batch_size)
    ]
    nll = torch.cat(scored).view(*windows.shape[:2], stride)
    positions = torch.arange(windows.shape[1])[:, None] * stride + torch.arange(window - stride, window)
    return Perplexity(float(nll.double().mean().exp()), nll, positions)


def _default_batch(model: PreTrainedModel, cache: CompressedCache, window: int) -> int:
    """Windows read side by side: enough that reading the weights no longer counts."""
    return rows_that_fit(model, cache, window, 128 if model.device.type == "cuda" else 32)


def score(
    model: PreTrainedModel,
    batch: Tensor,
    cache: CompressedCache,
    scored: int,
    chunk: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """Negative log-likelihoods of the last tokens of each row, read through a cache.

    Args:
        model: a prepared model.
        batch: `[B, W]`.
        cache: an empty one, from `make_cache`.
        scored: tokens to score, fewer than `W`.
        chunk: tokens read between compressions; 1 is exact to the token.
        progress: called with the number of tokens read after each step.

    Returns:
        `[B, scored]` float32, nats, on the CPU.
    """
    batch = batch.to(model.device)
    width = batch.shape[1]
    first = width - scored - 1  # the first position whose prediction counts
    cache.plan(width)
    whole = _before_compression(cache, width - 1) if chunk == 1 else width - 1
    if chunk == 1:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        chunk = max(1, _LOGITS // (len(batch) * vocabulary))
    cuts = _cuts(first, whole, min(chunk, _longest_pass(cache, width)))
    nll = []
    for start, stop in cuts:
        counts = start >= first
        logits = prefill(model, batch[:, start:stop], cache, keep_logits=0 if counts else 1).logits
        if counts:
            nll.append(_nll(logits, batch[:, start + 1 : stop + 1]))
        if progress is not None:
            progress((stop - start) * batch.shape[0])
    if whole < width - 1:
        steps = _step_through(model, batch[:, whole:], cache, progress)
        nll.append(steps[:, max(0, first - whole) :])
    return torch.cat(nll, dim=1).cpu()


def _before_compression(cache: CompressedCache, length: int) -> int:
    """Tokens that can be read in one pass with the same result as token by token: as many as fit the budget."""
    budgets = [layer.budget for layer in cache.compressed if layer.budget is not None]
    if not budgets:
        return length
    return 1 if cache.method.counts_passes else min(length, *budgets)


def _step_through(
    model: PreTrainedModel, batch: Tensor, cache: CompressedCache, progress: Callable[[int], Any] | None
) -> Tensor:
    """`[B, n - 1]`: negative log-likelihoods of the tokens after the first of `batch` `[B, n]`, read one by one."""
    from kvrepro.decode import Decoder  # decoding reads its prompts with this module

    batch = batch.contiguous()
    rows, steps = batch.shape[0], batch.shape[1] - 1
    nll = torch.zeros(rows, steps, device=batch.device)
    index = torch.zeros(1, dtype=torch.long, device=batch.device)
    with Decoder(model, cache, room=steps) as decoder:

        def body() -> None:
            """Read one token a row, score the next."""
            logits = decoder.logits(batch.index_select(1, index).squeeze(1))
            target = batch.index_select(1, index + 1)
            nll.index_copy_(1, index, _nll(logits[:, None], target))
            index.add_(1)

        decoder.run(body, steps, progress=None if progress is None else lambda: progress(rows))
    return nll


def _cuts(first: int, end: int, chunk: int) -> list[tuple[int, int]]:
    """Chunks that cover [0, end) with a cut at `first`, so that scored and unscored tokens never share one."""
    starts = [*range(0, min(first, end), chunk), *range(first, end, chunk)]
    return list(zip(starts, [*starts[1:], end], strict=True))


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    """`[B, n]` float32 from logits `[B, n, V]` and tokens `[B, n]`."""
    flat = cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    return flat.view(target.shape)


@dataclass(frozen=True)
class Fidelity:
    """How far a compressed cache's predictions are from the full cache's.

    Attributes:
        kl: `[B, n]` float32, KL(full || compressed) per token in nats.
        nll: `[B, n]` float32, negative log-likelihood with the compressed cache.
        nll_full: `[B, n]` float32, the same with the full cache.
        nbytes: bytes of the compressed cache after the context.
        nbytes_full: bytes of the full cache after the context.
        fallbacks: `[B]` int64, how often a head of any layer fell back to plain eviction while the context was read;
            None for methods that do not count it.
        rooms: `[B, layers, H_kv]` int32, the slots that each head may hold after the context; None where all have the
            budget.
    """

    kl: Tensor
    nll: Tensor
    nll_full: Tensor
    nbytes: int
    nbytes_full: int
    fallbacks: Tensor | None = None
    rooms: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """A text read once with the full cache, so that many methods and budgets can be compared with it.

    Attributes:
        logits: `[B, n, V]`, the full cache's predictions of the continuation.
        nbytes: bytes of the full cache after the context.
        passes: what each layer was handed while the context was read (queries, keys, values).
        replayable: all layers are compressed ones, so that `passes` can stand for running the model.
    """

    logits: Tensor
    nbytes: int
    passes: list[list[Pass]]
    replayable: bool


@torch.no_grad()
def fidelity(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: str,
    budget: int | float | None = None,
    *,
    context: int,
    continuation: int,
    chunk: int | None = None,
    reference: Reference | None = None,
    **options: Any,
) -> Fidelity:
    """Compress a context once, then predict its continuation, teacher-forced, beside the full cache.

    The continuation is read in one pass over the compressed context (nothing is compressed during it), as in the
    comparisons of prompt compression.

    Args:
        model: a prepared model.
        input_ids: `[B, T]` with T >= context + continuation.
        method: one of `kvrepro.methods.names()`.
        budget: slots per KV head and layer, a share of the context, or None.
        context: tokens that are compressed.
        continuation: tokens that are predicted.
        chunk: tokens of the context read at a time; None is all at once.
        reference: what `full_reference` returned for the same text, to read the full cache once.
        **options: the method's options.

    Returns:
        KL divergence and negative log-likelihoods per token.

    Raises:
        ValueError: a text shorter than context + continuation.
    """
    ids = _passage(model, input_ids, context, continuation)
    cache = make_cache(model, method, budget, **options)
    if reference is None:
        reference = full_reference(model, input_ids, context=context, continuation=continuation)
    first = None
    if chunk is None and reference.replayable and cache.method.replayable:
        cache.plan(context)
        cache.replay(reference.passes)
    else:
        first = prefill(model, ids[:, :context], cache, chunk=chunk).logits
    return continued(model, ids, cache, reference, first)


@torch.no_grad()
def continued(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: CompressedCache,
    reference: Reference,
    first: Tensor | None = None,
) -> Fidelity:
    """`fidelity` of a cache that has read the context: predict the continuation from it, teacher-forced.

    Args:
        model: a prepared model.
        input_ids: `[B, context + continuation]`.
        cache: what has read the context, quantised or not; the continuation is appended and nothing more compressed.
        reference: what `full_reference` returned for the same text.
        first: `[B, 1, V]`, the prediction after the context; None is the full cache's, as after a replay.

    Raises:
        ValueError: the cache has read another number of tokens than the reference's context.
    """
    ids, full, context = input_ids.to(model.device), reference.logits, cache.compressed[0].seen
    if context + full.shape[1] != ids.shape[1]:
        raise ValueError(
            f"the cache has read {context} of {ids.shape[1]} tokens, and the reference predicts the last "
            f"{full.shape[1]}: read both with the same context and continuation"
        )
    nbytes, fallbacks = cache.nbytes, cache.fallbacks
    rooms = [layer.rooms for layer in cache.compressed if layer.rooms is not None]
    logits = _continue(model, ids, cache, full[:, :1] if first is None else first, context)
    p, q = log_softmax(full.float(), dim=-1), log_softmax(logits.float(), dim=-1)
    return Fidelity(
        kl=kl_div(q, p, reduction="none", log_target=True).sum(-1).cpu(),
        nll=_nll(logits, ids[:, context:]).cpu(),
        nll_full=_nll(full, ids[:, context:]).cpu(),
        nbytes=nbytes,
        nbytes_full=reference.nbytes,
        fallbacks=fallbacks,
        rooms=torch.stack([x.cpu() for x in rooms], dim=1) if rooms else None,
    )


@torch.no_grad()
def full_reference(model: PreTrainedModel, input_ids: Tensor, *, context: int, continuation: int) -> Reference:
    """Read context and continuation with the full cache, for `fidelity`.

    Args:
        model: a prepared model.
        input_ids: `[B, T]` with T >= context + continuation.
        context: tokens that will be compressed.
        continuation: tokens that will be predicted.
    """
    ids = _passage(model, input_ids, context, continuation)
    cache = make_cache(model, "full")
    passes = cache.record()
    first = prefill(model, ids[:, :context], cache).logits
    for layer in cache.compressed:
        layer.record = None
    nbytes = cache.nbytes
    return Reference(_continue(model, ids, cache, first, context), nbytes, passes, len(passes) == len(cache.layers))


def _passage(model: PreTrainedModel, input_ids: Tensor, context: int, continuation: int) -> Tensor:
    """The first context + continuation tokens, on the model's device.

    Raises:
        ValueError: the text is shorter.
    """
    need = context + continuation
    if context < 2 or continuation < 1 or input_ids.shape[1] < need:
        raise ValueError(
            f"the text has {input_ids.shape[1]} tokens; context={context} and continuation={continuation} need {need}"
        )
    return input_ids[:, :need].to(model.device)


def _continue(model: PreTrainedModel, ids: Tensor, cache: CompressedCache, first: Tensor, context: int) -> Tensor:
    """Logits `[B, T - context, V]` for the tokens after the context; `first` `[B, 1, V]` predicts the first of them."""
    cache.freeze()
    if ids.shape[1] == context + 1:
        return first
    rest = model(input_ids=ids[:, context:-1], **cache_arguments(model, cache)).logits
    return torch.cat([first, rest], dim=1)
