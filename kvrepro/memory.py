"""Out of memory, explained: what was asked for, and which chunk or budget would fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvrepro.cache import CompressedCache

#: Share of the free memory that an estimate spends; the rest is for fragments and libraries.
_SPENT = 0.9
#: Tokens a chunk has when a budget is suggested.
_CHUNK = 512


@contextmanager
def explained(
    model: PreTrainedModel, cache: CompressedCache, rows: int, tokens: int, chunk: int | None
) -> Iterator[None]:
    """Turn running out of memory inside the block into an error that says what would fit.

    Args:
        model: the model that reads.
        cache: the cache it reads into.
        rows: texts side by side.
        tokens: tokens a row.
        chunk: tokens read at a time; None is all at once.

    Raises:
        torch.OutOfMemoryError: as before, with tokens, chunk, method, budget, the cache's bytes and a suggestion.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        room = free_bytes(model.device) + cache.nbytes
        asked = "all at once" if chunk is None or chunk >= tokens else f"in chunks of {chunk}"
        budget = "an unlimited budget" if cache.budget is None else f"budget={cache.budget}"
        raise torch.OutOfMemoryError(
            f"out of memory reading {rows} x {tokens} tokens {asked} with method {cache.method.name!r} and {budget}; "
            f"the cache held {_size(cache.nbytes)}. {_advice(model, cache, rows, tokens, chunk, room)} "
            f"({str(error).strip() or 'no details'})"
        ) from error


def slot_bytes(model: PreTrainedModel, cache: CompressedCache) -> int:
    """Bytes of one slot in all heads and layers of one row: key, value, position, cardinality, side vectors."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_key_value_heads or config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = torch.finfo(model.dtype).bits // 8
    return len(cache.layers) * heads * (2 * d * element + 8 + 4 * len(cache.method.accumulates))


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, those that PyTorch keeps for reuse included."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    with suppress(OSError):  # Linux: what can be had without swapping, caches of files included
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def rows_that_fit(model: PreTrainedModel, cache: CompressedCache, tokens: int, most: int) -> int:
    """Texts of `tokens` tokens, at most `most`, whose caches take a quarter of the free memory, or one."""
    return max(1, min(most, free_bytes(model.device) // 4 // (_slots(cache, tokens) * slot_bytes(model, cache))))


def _advice(
    model: PreTrainedModel, cache: CompressedCache, rows: int, tokens: int, chunk: int | None, room: int
) -> str:
    """Which chunk would fit this budget, or else which budget would fit, by the bytes that slots and a pass take."""
    slot, work = slot_bytes(model, cache), _pass_bytes(model)
    share = int(room * _SPENT) // rows  # bytes a row
    held = _slots(cache, tokens)
    asked = tokens if chunk is None else min(chunk, tokens)
    fits = (share - held * slot) // (slot + work)
    if fits > 0:
        return f"By an estimate {_smaller(fits, asked)} would fit: prefill(..., chunk={_round(min(fits, asked // 2))})."
    step = min(asked, _CHUNK)
    budget = (share - step * (slot + work)) // slot
    if budget > 0:
        other = "" if not cache.method.unlimited else " with a method that compresses"
        return f"By an estimate budget={_round(budget)} and chunk={step} would fit{other}: a slot takes {_size(slot)}."
    return f"By an estimate no budget fits {rows} rows: a slot takes {_size(slot)}. Read fewer rows at a time."


def _slots(cache: CompressedCache, tokens: int) -> int:
    """Mean slots a head and layer that the cache holds after `tokens` tokens."""
    if cache.budget is None or cache.method.unlimited:
        return tokens
    budget = cache.budget if isinstance(cache.budget, int) else int(cache.budget * tokens)
    return min(budget, tokens)


def _pass_bytes(model: PreTrainedModel) -> int:
    """Bytes that one token takes while it passes through a layer: the states around the widest matrix product."""
    config = model.config.get_text_config(decoder=True)
    return (3 * config.intermediate_size + 6 * config.hidden_size) * torch.finfo(model.dtype).bits // 8


def _smaller(fits: int, asked: int) -> str:
    """What to say of the chunk that fits beside the one asked for."""
    return f"a chunk of {fits} tokens" if fits < asked else "smaller chunks"


def _round(n: int) -> int:
    """The largest power of two up to n, at least 1."""
    return 1 << max(0, int(n).bit_length() - 1)


def _size(n: int) -> str:
    """Bytes for people."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"
