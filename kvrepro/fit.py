"""Least-squares fits of attention: with what weights few slots carry a whole cache's mass, with what values its output.

Every KV head of every row is a problem of its own; all are solved side by side, and nothing is decided on the host.
Where there are fewer queries than slots, the fits work on the queries' products
instead of the slots' (the dual, or kernel trick), with the same solution. A system that cannot be solved gives NaN, not
an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrepro.slots import top

#: Ridges to choose from, as shares of the mean square of a slot's column of attention (ours).
RIDGES = tuple(10.0**power for power in range(-5, 1))
#: Rounds at most of the projected gradient that fits the slots' weights (ours).
ROUNDS = 30
#: Rounds in which slots are pursued, each of which takes its share of them at once (ours).
PURSUIT = 64
#: Updates of the chosen slots' weights before each round (ours).
REFIT = 3
#: Share of the carried mass that is counted while slots are pursued.
_COUNTED = 0.999
#: Errors that differ by less than this share count as equal: rounding is no reason to choose.
MARGIN = 1e-6
#: Elements of the systems that are solved side by side for several ridges, 1 GiB of float64.
_AT_ONCE = 1 << 27
#: A slot whose weight is below this has none.
_NOTHING = 1e-8


@dataclass(frozen=True)
class ValueFit:
    """Values fitted to queries.

    Attributes:
        values: ``[B, H_kv, S, d]`` in the type of P; NaN in heads whose system could not be solved.
        gain: ``[B, H_kv]`` float64, by how much the squared error on the held-out queries fell below that of the values
            that the fit started from, when the chosen ridge was fitted to the others; -inf where no ridge could be
            solved.
    """

    values: Tensor
    gain: Tensor


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Inside, a GPU rounds the float32 matrices that it multiplies to 11 significant bits, or does not; sums stay."""
    matmul = torch.backends.cuda.matmul
    name, values = "fp32_precision", ("ieee", "tf32")
    if not hasattr(matmul, name):  # before torch 2.9
        name, values = "allow_tf32", (False, True)
    before = getattr(matmul, name)
    setattr(matmul, name, values[on])
    try:
        yield
    finally:
        setattr(matmul, name, before)


def in_rows(x: Tensor) -> Tensor:
    """``[B, H_kv, G, m, ...]`` as ``[B, H_kv, m G, ...]``, a view where x is the transpose of ``[B, H_kv, m, G, ...]``.

    So is a half of the queries then, which would be copied if a query head's came one after the other.
    """
    return x.transpose(2, 3).flatten(2, 3)


def mixed(p: Tensor, values: Tensor) -> Tensor:
    """Attention ``[B, H_kv, G, m, S]`` times values ``[B, H_kv, S, d]``."""
    return (in_rows(p) @ values.to(p.dtype)).unflatten(2, (p.shape[3], p.shape[2])).transpose(2, 3)


def best_values(p: Tensor, target: Tensor, start: Tensor, ridges: Sequence[float] = RIDGES) -> Tensor:
    """Values that give queries the output they should get: ridge regression, head by head.

    min |P V - O|^2 + r |V - V_0|^2. The ridge pulls to the slots' own values, not to 0, so that a slot that no query
    looks at keeps its value (ours). r is the ridge of those offered, times the mean square of a column of P, with which
    a fit to the first half of the queries is best on the second half; then all queries are fitted to. Products of P
    with itself are formed in its own type, the systems solved in float64.

    Args:
        p: ``[B, H_kv, G, m, S]``, attention of the queries to the slots; a row of zeros with a target of 0 counts not.
        target: ``[B, H_kv, G, m, d]``, outputs over the whole cache.
        start: ``[B, H_kv, S, d]``, V_0.
        ridges: Ridges to choose from.

    Returns:
        ``[B, H_kv, S, d]`` in the type of P.
    """
    return fit_values(p, target, start, ridges).values


def fit_values(
    p: Tensor,
    target: Tensor,
    start: Tensor | None,
    ridges: Sequence[float] = RIDGES,
    *,
    filled: Tensor | None = None,
    dual: bool | None = None,
) -> ValueFit:
    """:func:`best_values`, with what they gain on the held-out queries.

    Args:
        p: See :func:`best_values`.
        target: See :func:`best_values`.
        start: See :func:`best_values`; None is 0.
        ridges: See :func:`best_values`.
        filled: ``[B, H_kv]``, slots that hold something, where some do not: columns of zeros in P. None: all do.
        dual: Solve for the queries instead of the slots; None does where they are fewer.

    Returns:
        The values and the gain.
    """
    rest = target.double()
    if start is not None:
        start = start.double()
        rest = rest - mixed(p.double(), start)
    dual = p.shape[2] * p.shape[3] < p.shape[4] if dual is None else dual
    columns = max(1, p.shape[4]) if filled is None else filled.clamp_min(1)
    change, gain = (_dual if dual else _primal)(p, rest, ridges, columns)
    return ValueFit(change if start is None else (start + change).to(p.dtype), gain)


def _halves(p: Tensor) -> tuple[slice, slice]:
    """The queries ``[B, H_kv, G, m, S]`` that are fitted to first, and those that judge."""
    half = p.shape[3] // 2
    return slice(half), slice(half, None)


def _primal(p: Tensor, rest: Tensor, ridges: Sequence[float], columns: int | Tensor) -> tuple[Tensor, Tensor]:
    """The change of the values ``[B, H, S, d]``, and what it gains ``[B, H]``, by systems of S equations.

    Args:
        p: ``[B, H, G, m, S]``, attention of the queries.
        rest: ``[B, H, G, m, d]`` float64, what their outputs lack.
        ridges: Ridges to choose from.
        columns: Number of columns of P that count, one for all or ``[B, H]``.
    """
    rows, lacks = ([in_rows(x[:, :, :, part]) for part in _halves(p)] for x in (p, rest))
    gram, judges = ((x.mT @ x).double() for x in rows)
    moment, wishes = (x.mT.double() @ y for x, y in zip(rows, lacks, strict=True))

    def missed(ridge: Tensor) -> Tensor:
        """``[R, B, H]``: the held-out error with each ridge ``[R, B, H]``, less what is the same for all."""
        change = ridge_solution(gram, moment, ridge, columns)
        return (change * (judges @ change - 2 * wishes)).sum((-2, -1))

    ridge, gain = _chosen(missed, ridges, gram)
    return ridge_solution(gram + judges, moment + wishes, ridge, columns).to(p.dtype), gain


def _dual(p: Tensor, rest: Tensor, ridges: Sequence[float], columns: int | Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_primal` by systems of as many equations as there are queries: X = P'(PP' + r)^-1 R."""
    half = p.shape[2] * (p.shape[3] // 2)  # rows of the first half
    rows, rest = in_rows(p), in_rows(rest)
    products = (rows @ rows.mT).double()
    across, first = products[:, :, half:, :half], products[:, :, :half, :half]
    lacks, wanted = rest[:, :, :half], rest[:, :, half:]

    def missed(ridge: Tensor) -> Tensor:
        """As in :func:`_primal`."""
        found = across @ ridge_solution(first, lacks, ridge, columns)  # [R, B, H, M', d]
        return (found * (found - 2 * wanted)).sum((-2, -1))

    ridge, gain = _chosen(missed, ridges, first)
    found = ridge_solution(products, rest, ridge, columns).to(p.dtype)
    with tf32(False):  # where queries attend alike, what they add up to is far smaller than each
        return rows.mT @ found, gain


def _chosen(missed: Callable[[Tensor], Tensor], ridges: Sequence[float], gram: Tensor) -> tuple[Tensor, Tensor]:
    """The ridge with the least held-out error, and minus that error, ``[B, H]`` both; what is no number never is."""
    offered = torch.stack([gram.new_full(gram.shape[:2], ridge) for ridge in ridges])  # no copy from the host
    side_by_side = max(1, _AT_ONCE // max(1, gram.numel()))
    tried = torch.cat([missed(part) for part in offered.split(side_by_side)])  # [R, B, H]
    least, index = tried.masked_fill(~tried.isfinite(), torch.inf).min(0, keepdim=True)
    return offered.gather(0, index)[0].masked_fill(least[0].isinf(), 0.0), -least[0]


def ridge_solution(gram: Tensor, moment: Tensor, ridge: Tensor, columns: int | Tensor | None = None) -> Tensor:
    """The X that minimises |P X - O|^2 + r |X|^2, by Cholesky; NaN where there is no factorisation.

    Args:
        gram: ``[..., S, S]``, P'P.
        moment: ``[..., S, d]``, P'O.
        ridge: ``[..., ]`` or with more dimensions in front, r as a share of the mean of the diagonal of P'P.
        columns: Number of P's columns that count, one for all or ``[..., ]``; None is the size of P'P. It must be given
            where ``gram`` is PP' and ``moment`` O; the solution A is then to be read as X = P'A.

    Returns:
        ``[..., S, d]``, with the dimensions of ``ridge`` in front.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # PP' and P'P have the same
    count = max(1, gram.shape[-1]) if columns is None else columns
    size = (trace / count).clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + (ridge * size)[..., None, None] * eye)
    solved = (failed == 0).to(gram.dtype)[..., None, None]
    # In two steps, since on a GPU `cholesky_solve` makes the host wait.
    half = torch.linalg.solve_triangular(factor, moment.expand(*factor.shape[:-1], -1), upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True) * (solved / solved)


def best_weights(share: Tensor, rounds: int = ROUNDS, *, dual: bool | None = None, coarse: bool = False) -> Tensor:
    """Factors on the slots' weights with which they carry the whole cache's mass: ``min |M w - 1|^2`` over w >= 0.

    Non-negative least squares by accelerated projected gradient from w = 1, which stops at the round whose result for
    the first half of the queries is best on the second half: carried to its end it gives most slots no weight (ours).
    Round 0, the weights as they are, is one of those to choose from. It runs in the type of ``share``.

    Args:
        share: ``[B, H_kv, G, m, S]``, e^logit of each slot over the sum of the whole cache's; a row of zeros counts
            not.
        rounds: Rounds at most.
        dual: Multiply by M and M' in turn instead of by M'M; None does where there are fewer queries than slots.
        coarse: On a GPU, products with M alone may be rounded to bfloat16; which round is best, M itself says.

    Returns:
        ``[B, H_kv, S]``; at least 1e-8, so that it has a logarithm.
    """
    rows, half = in_rows(share), share.shape[2] * (share.shape[3] // 2)
    dual = rows.shape[2] < rows.shape[3] if dual is None else dual
    read = _halved(rows) if dual and coarse else rows
    path = Masses.of(rows, read, dual, half).descent(rounds)  # [rounds + 1, B, H, 2, S]
    missed = (rows[:, :, half:] @ path[..., 0, :].permute(1, 2, 3, 0) - 1).square().sum(2)  # [B, H, rounds + 1]
    enough = missed <= missed.amin(-1, keepdim=True) + MARGIN * missed[..., :1]
    chosen = enough.int().argmax(-1)[None, ..., None]  # the first that is as good
    both = path[..., 1, :]
    return both.gather(0, chosen.expand(1, *both.shape[1:]))[0].clamp_min(_NOTHING)


def _halved(rows: Tensor) -> Tensor:
    """M in bfloat16 on a GPU, where products with it take as long as reading it."""
    return rows.bfloat16() if rows.is_cuda and rows.dtype == torch.float32 else rows


def pursued(share: Tensor, chosen: Tensor, candidates: Tensor, count: Tensor, *, rounds: int = PURSUIT) -> Tensor:
    """Slots that together carry the whole cache's mass: orthogonal matching pursuit of |M w - 1|^2 over w >= 0.

    In each round the weights of the slots that are chosen are fitted, from those they had (a new slot's is 1), and the
    slots are added whose columns correlate most with what the weighted columns still lack of 1, M'(1 - M w). Ours: a
    round adds ``count / rounds`` slots at once; the fit takes a few multiplicative updates, w M'1 / M'M w, and is not
    carried to its end; and of what is carried a thousandth is not counted, so that where nothing is lacking any more
    the slots with the most attention are added, and not those that rounding errors favour.

    Args:
        share: ``[B, H_kv, G, m, S]``, M: e^logit of each slot over the sum of the whole cache's; a row of zeros counts
            not.
        chosen: ``[B, H_kv, S]`` bool, slots that are chosen before the first round.
        candidates: ``[B, H_kv, S]`` bool, those that may be added.
        count: ``[B, H_kv, 1]``, how many are to be added; no more than there are.
        rounds: Rounds at most.

    Returns:
        ``[B, H_kv, S]`` bool, those that were added.
    """
    rows = in_rows(share)
    masses = Masses.of(rows, rows, dual=True)  # no product of all slots with all slots
    moment, tiny = masses.moment.squeeze(-2), torch.finfo(rows.dtype).tiny

    def carried(w: Tensor) -> Tensor:
        """M'M w."""
        return masses.product(w.unsqueeze(-2)).squeeze(-2)

    added, left = torch.zeros_like(chosen), count
    picks = (count + rounds - 1) // rounds
    weights = chosen.to(rows.dtype)
    for _ in range(rounds):
        for _ in range(REFIT):
            weights = weights * moment / carried(weights).clamp_min(tiny)
        now = torch.minimum(picks, left)
        new = top(moment - _COUNTED * carried(weights), candidates & ~chosen & ~added, now)
        added, left, weights = added | new, left - now, weights + new.to(rows.dtype)
    return added


@dataclass(frozen=True)
class Masses:
    """The least-squares problems min |M w - 1|^2 over w >= 0 of all rows M, and before it that of the first of them.

    Attributes:
        rows: ``[..., M, S]``, M, perhaps in bfloat16.
        moment: ``[..., K, S]``, M'1 of each problem; K is 2, or 1 where there is only that of all rows.
        squares: ``[..., K, S]``, the diagonal of M'M.
        gram: ``[..., K, S, S]``, M'M, or None where it costs more than M.
        first: Rows of the first problem; None where there is none.
    """

    rows: Tensor
    moment: Tensor
    squares: Tensor
    gram: Tensor | None
    first: int | None

    @classmethod
    def of(cls, rows: Tensor, read: Tensor, dual: bool, first: int | None = None) -> Masses:
        """The problems of ``rows``; ``dual`` multiplies by ``read``, the same numbers, not by the slots' products."""
        parts = [rows] if first is None else [rows[..., :first, :], rows[..., first:, :]]

        def added(found: Iterable[Tensor], dim: int) -> Tensor:
            """One of each part, as one of each problem."""
            return torch.stack(list(itertools.accumulate(found)), dim)

        moment = added((x.sum(-2) for x in parts), -2)
        if dual:
            squares = added((torch.linalg.vector_norm(x, dim=-2).square() for x in parts), -2)
            return cls(read, moment, squares, None, first)
        gram = added((x.mT @ x for x in parts), -3)
        return cls(read, moment, gram.diagonal(dim1=-2, dim2=-1), gram, first)

    def descent(self, rounds: int) -> Tensor:
        """``[rounds + 1, ..., K, S]``: the w after each round of accelerated projected gradient, w = 1 first.

        Columns are scaled to length 1. M has no negative numbers.
        """
        tiny, eps = torch.finfo(self.squares.dtype).tiny, torch.finfo(self.squares.dtype).eps
        length = self.squares.clamp_min(tiny).sqrt()
        # The largest sum of a row is above the largest eigenvalue; a head without attention has none.
        stride = 1 / (self.product(1 / length) / length).amax(-1, keepdim=True).clamp_min(eps)
        # Of w itself, whose columns are not scaled.
        stride = torch.where(self.squares > tiny, stride / self.squares, 0.0)
        now = ahead = torch.ones_like(length)
        path = [now]
        for k in range(rounds):
            now = torch.addcmul(ahead, stride, self.product(ahead) - self.moment, value=-1).clamp_min_(0)
            ahead = torch.lerp(path[-1], now, 1 + k / (k + 3))
            path.append(now)
        return torch.stack(path)

    def product(self, w: Tensor) -> Tensor:
        """M'M w of each problem, ``[..., K, S]`` as w, in the type of the rows."""
        # Lines times a matrix are several times as fast on a CPU as a matrix times columns.
        if self.gram is not None:
            return (w.unsqueeze(-2) @ self.gram).squeeze(-2)
        carried = w.to(self.rows.dtype) @ self.rows.mT  # [..., K, M]
        if self.first is not None:
            carried[..., 0, self.first :] = 0  # both problems read all rows, at once
        return carried @ self.rows
