"""The model ``kvrepro`` for lm-evaluation-harness: its tasks, read through compressed caches.

Importing this module registers the model, so ``lm_eval.simple_evaluate(model="kvrepro", ...)`` finds it afterwards. The
command ``lm_eval`` looks for no models outside its own package; ``kvrepro lm-eval`` is the same command with this one.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import kvrepro
from kvrepro import methods, models
from kvrepro.adapter import cache_arguments, cache_keyword
from kvrepro.evaluate import score

logger = logging.getLogger(__name__)

#: A request for a log-likelihood: (context, continuation), and the tokens of each.
Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("kvrepro")
class CompressedLM(HFLM):
    """A model with a compressed cache. Tokens, chat template and stop strings are as in the harness's own ``hf``.

    * Log-likelihoods: the context is read into an empty cache; the continuation is scored over it, teacher-forced, and
      nothing is compressed meanwhile.
    * Perplexity of a text (``loglikelihood_rolling``): windows of `max_length` tokens, each from an empty cache, which
      is held to its budget while the window is read.
    * Generation: ``model.generate`` with an empty cache, held to its budget while prompt and answer are read.
    """

    def __init__(
        self,
        pretrained: str = models.DEFAULT,
        method: str = "full",
        budget: int | float | None = None,
        *,
        chunk: int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: embedded, a hub id or a folder, see `kvrepro.load_model`.
            method: one of `kvrepro.methods.names()`.
            budget: slots per KV head and layer; a float is a share of the context, window or prompt.
            chunk: tokens read between compressions; None reads contexts and prompts in one pass, and texts whose
                perplexity is asked for token by token.
            max_length: tokens read at most; None is what the model was made for. Longer contexts lose their beginning.
            batch_size: rows side by side, 1 or more. Results do not depend on it, rounding aside.
            device: device, or None (or ``cuda:0``, the command's default) for a GPU where there is one.
            dtype: name of a torch dtype, or None for bfloat16 on a GPU, else float32.
            **options: the method's options.

        Raises:
            ValueError: an unknown method or option, a budget that leaves no room, a batch size that is no number.
        """
        methods.create(method, **options)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"batch_size={batch_size} is not valid; give the number of rows that are read side by side"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk} is not valid; give 1 or more tokens")
        if device == "cuda:0" and not torch.cuda.is_available():  # what the command asks for where nobody said anything
            logger.warning("no GPU here: the model goes to the CPU")
            device = None
        model, tokenizer = kvrepro.load_model(pretrained, device=device, dtype=dtype)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
        )
        self._name = pretrained
        self._method, self._budget, self._options, self._chunk = method, budget, options, chunk
        self._new_cache()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CompressedLM:
        """The model of ``--model_args``, which may also name what the harness has options for, such as the device."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(given | arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> CompressedLM:
        """As `create_from_arg_obj`, from ``"method=h2o,budget=256"``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _new_cache(self) -> kvrepro.CompressedCache:
        return kvrepro.make_cache(self.model, self._method, self._budget, **self._options)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model; the hash is that of kvrepro's records."""
        return super().get_model_info() | {"model_sha": models.model_identity(self.model, self._name)[1]}

    # --- log-likelihoods

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would begin with it."""
        cut = [(self._context(context, target), target) for _, context, target in requests]
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for places in self._batches([context for context, _ in cut]):
                answers = self._score([cut[place] for place in places])
                for place, answer in zip(places, answers, strict=True):
                    found[place] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                bar.update(len(places))
        return [found[place] for place in range(len(requests))]

    def _context(self, context: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
        """The context, cut on the left so that what is read of both has `max_length` tokens.

        Raises:
            ValueError: the continuation alone is longer.
        """
        room = self.max_length + 1 - len(target)
        if room < 1:
            raise ValueError(f"a continuation of {len(target)} tokens is longer than max_length={self.max_length}")
        return tuple(context[-room:])

    def _batches(self, contexts: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Places of contexts that are read side by side: of one length, so that a budget that is a share is the same.

        The longest come first, so that memory fails early; equal ones are neighbours.
        """
        order = sorted(range(len(contexts)), key=lambda place: (-len(contexts[place]), contexts[place]))
        for _, same in groupby(order, key=lambda place: len(contexts[place])):
            places = list(same)
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size]

    def _score(self, pairs: Sequence[tuple[tuple[int, ...], list[int]]]) -> Iterator[tuple[float, bool]]:
        """The answers for contexts of one length and their continuations; a context that comes twice is read once."""
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        rows = self._tensor([contexts.index(context) for context, _ in pairs])  # [R]
        targets = [self._tensor(target) for _, target in pairs]
        cache = self._new_cache()
        first = kvrepro.prefill(self.model, self._tensor(contexts), cache, chunk=self._chunk).logits[:, -1:]
        cache.freeze()
        cache.batch_select_indices(rows)
        logits = first[rows]  # [R, 1, V]
        read = pad_sequence(targets, batch_first=True)[:, :-1]  # what stands behind a shorter one does not count
        if read.shape[1]:
            rest = self.model(input_ids=read, **cache_arguments(self.model, cache)).logits
            logits = torch.cat([logits, rest], dim=1)
        for row, target in zip(logits, targets, strict=True):
            own = row[: len(target)].float().log_softmax(-1)  # [a, V]
            total = own.gather(-1, target[:, None]).double().sum()
            yield float(total), bool((own.argmax(-1) == target).all())

    def _tensor(self, ids: Iterable[Any]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.long, device=self.device)

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, by the harness's windows: each token is predicted once."""
        shapes = defaultdict(list)
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                context, target = make_disjoint_window(window)
                shapes[len(context), len(target)].append((place, context + target))
        totals = [0.0] * len(requests)
        for (_, scored), rows in tqdm(shapes.items(), disable=disable_tqdm, desc="Running windows of each length"):
            for start in range(0, len(rows), self.batch_size):
                places, windows = zip(*rows[start : start + self.batch_size], strict=True)
                nll = score(self.model, self._tensor(windows), self._new_cache(), scored, self._chunk or 1, None)
                for place, total in zip(places, nll.double().sum(dim=1).tolist(), strict=True):
                    totals[place] -= total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """Prompts `[B, L]`, padded on the left, and what the model writes after them, padded on the right."""
        lengths = attention_mask.sum(dim=1)
        # Padding would count in a share of the prompt and shift the chunks: then only equal lengths go side by side.
        alone = self._chunk is not None or isinstance(self._budget, float)
        out = pad(context, (0, max_length - context.shape[1]), value=self.tokenizer.pad_token_id)
        end = 0
        for longest in lengths.unique().tolist() if alone else [context.shape[1]]:
            rows = (lengths == longest if alone else lengths > 0).nonzero()[:, 0]
            cut = context.shape[1] - longest
            ids, mask = context[rows, cut:], attention_mask[rows, cut:]
            cache = self._new_cache()
            cache.plan(longest)
            if self._chunk is not None and longest > 1:
                kvrepro.prefill(self.model, ids[:, :-1], cache, chunk=self._chunk)
            through = {cache_keyword(self.model): cache}
            written = super()._model_generate(ids, max_length - cut, stop, attention_mask=mask, **through, **kwargs)
            out[rows, cut : cut + written.shape[1]] = written
            end = max(end, cut + written.shape[1])
        return out[:, :end]


def main(arguments: Sequence[str]) -> None:
    """Run the harness's own command line.

    Args:
        arguments: as of ``lm_eval``, such as ``["--model", "kvrepro", "--tasks", "lambada_openai"]``.
    """
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
