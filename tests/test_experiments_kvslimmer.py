"""KVSlimmer's experiments: what they compute, on inputs whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvrepro.experiments import curvature, kvslimmer
from kvrepro.experiments.common import Bench
from kvrepro.experiments.memory import peak_bytes
from kvrepro.methods.kvslimmer import merge_share, second_derivatives
from kvrepro.records import Skip, Value
from tests.tiny import VOCABULARY, tiny_model

MEGABYTE = 10**6


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (1, n), generator=torch.Generator().manual_seed(seed))


def test_peak_bytes_counts_what_lives_at_one_time() -> None:
    weight = torch.zeros(MEGABYTE // 4, requires_grad=True)

    def forward() -> Tensor:
        x = weight
        for _ in range(8):
            x = torch.tanh(x)
        return x

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward().sum(), weight)

    with torch.no_grad():
        assert peak_bytes(forward, torch.device("cpu"))[1] == 2 * MEGABYTE
    assert 8 * MEGABYTE <= peak_bytes(backward, torch.device("cpu"))[1] <= 10 * MEGABYTE + 100


def test_modes_of_a_known_matrix() -> None:
    x = torch.randn(1, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rank, curves = kvslimmer._modes(torch.eye(8), x)
    assert rank == pytest.approx(1.0)
    assert torch.allclose(curves[0], torch.ones_like(curves[0]))
    assert curves[1, -1] == pytest.approx(1.0)
    inner = (x[0, 1:] * x[0, :-1]).sum(-1).mean() / x[0].square().sum(-1).mean()
    assert curves[2, -1] == pytest.approx(float(inner))
    one = torch.zeros(8, 8)
    one[0, 0] = 3.0
    assert kvslimmer._modes(one, x)[0] == pytest.approx(1 / 8)


def test_projection_inputs_reproduce_the_projections() -> None:
    model, ids = tiny_model(), tokens(10)
    found = kvslimmer.projection_inputs(model, ids)
    assert len(found) == 3
    module, x = found[0]
    seen: list[Tensor] = []
    handle = module.v_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    model(ids)
    handle.remove()
    assert torch.allclose(x @ module.v_proj.weight.double().T, seen[0].double())


def test_projection_inputs_refuses_a_fused_projection() -> None:
    with pytest.raises(ValueError, match="q_proj"):
        kvslimmer.projection_inputs(tiny_model("phi3"), tokens(4))


def test_loss_gradient_is_that_of_the_output_projections_input() -> None:
    model, ids, layer = tiny_model(), tokens(10), 1
    captured, gradient = curvature.loss_gradient(model, ids, layer)
    direction = torch.randn(gradient.shape, dtype=gradient.dtype, generator=torch.Generator().manual_seed(0))
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(shifted_loss(model, ids, layer, step * direction), step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4)
    assert not captured.queries.requires_grad


def shifted_loss(model: nn.Module, ids: Tensor, layer: int, shift: Tensor) -> Tensor:
    """The loss with a layer's attention output moved by ``shift`` [1, H, L, d], differentiable by it."""

    def move(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0] + shift.transpose(1, 2).flatten(2),)

    handle = model.base_model.layers[layer].self_attn.o_proj.register_forward_pre_hook(move)
    with sdpa_kernel(SDPBackend.MATH):
        loss = curvature._loss(model, ids)
    handle.remove()
    return loss


def test_the_two_terms_make_the_whole_second_derivative() -> None:
    model, ids, layer = tiny_model(), tokens(12), 1
    draws = curvature._hessian_draws(model, ids, layer, seed=0, draws=4)
    captured, _ = curvature.loss_gradient(model, ids, layer)
    alpha, values = curvature.attention_rows(captured, 6)
    picks = torch.multinomial(alpha[..., :6].flatten(), 4, generator=torch.Generator().manual_seed(0))
    for pick, (kept, left, weight) in zip(picks.tolist(), draws, strict=True):
        head, rest = divmod(pick, 36)
        query, token = divmod(rest, 6)
        assert weight == pytest.approx(float(alpha[head, query, token]))
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        mark = torch.zeros_like(alpha[head, query])
        mark[token] = 1
        rows = torch.stack([(alpha[head, query].log() + step * mark).softmax(-1), alpha[head, query]]) @ values[head]
        place = torch.zeros_like(captured.outputs)
        place[0, head, 6 + query] = 1
        loss = shifted_loss(model, ids, layer, place.detach() * (rows[0] - rows[1]))
        (slope,) = torch.autograd.grad(loss, step, create_graph=True)
        (second,) = torch.autograd.grad(slope, step)
        assert kept + left == pytest.approx(float(second), rel=1e-4, abs=1e-9)


def test_the_last_query_is_not_drawn_and_the_other_draws_stay() -> None:
    """Its output is in no term of the loss, so both terms are 0 and their share 0/0."""
    model, ids, half, seed = tiny_model(), tokens(8), 4, 0
    captured, gradient = curvature.loss_gradient(model, ids, 1)
    assert gradient[:, :, -1].count_nonzero() == 0
    alpha, _ = curvature.attention_rows(captured, half)
    picks = torch.multinomial(alpha[..., :half].flatten(), 8, generator=torch.Generator().manual_seed(seed))
    earlier = picks[picks // half % half < half - 1]
    assert 0 < len(earlier) < 8  # the seed draws the last query too
    draws = curvature._hessian_draws(model, ids, 1, seed)
    assert len(draws) == 8
    assert all(kept != 0 and left != 0 for kept, left, _ in draws)
    weights = [weight for _, _, weight in draws]
    assert weights[: len(earlier)] == pytest.approx(alpha[..., :half].flatten()[earlier].tolist())


def hessian_of(monkeypatch: pytest.MonkeyPatch, draws: list[tuple[float, float, float]]) -> Value:
    """The record's value for one window with these draws."""
    monkeypatch.setattr(Bench, "load", lambda _: (tiny_model(), None))
    monkeypatch.setattr(Bench, "windows", lambda *_: tokens(8))
    monkeypatch.setattr(curvature, "_hessian_draws", lambda *_, **__: draws)
    return curvature._hessian(Bench("kvslimmer", "closed_form"), "essays", 1, 8, 1)


def test_draws_without_a_share_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [(3.0, 1.0, 0.2), (1.0, 1.0, 0.3), (0.0, 2.0, 0.5)]  # 1/4, 1/2, 1
    found = hessian_of(monkeypatch, [(0.0, 0.0, 1.0), *shares, (0.0, -0.0, 1.0)]).plain()
    assert (found.value, found.n, found.extra["undefined"]) == (0.5, 3, 2)
    assert len(found.extra["kept"]) == len(found.extra["alpha"]) == 5
    assert hessian_of(monkeypatch, shares).extra["undefined"] == 0
    with pytest.raises(Skip, match="both terms .* are 0 in all 2 draws at layer 1"):
        hessian_of(monkeypatch, [(0.0, 0.0, 1.0)] * 2)


def test_cosines_match_a_loop() -> None:
    model, ids = tiny_model(), tokens(12)
    captured, gradient = curvature.loss_gradient(model, ids, 1)
    found = curvature._cosines(captured, gradient, pairs=2)  # pairs (0, 1) and (4, 5), queries 6 … 11
    alpha, values = curvature.attention_rows(captured, 6)
    head, query, left = 2, 3, 4
    a, v = alpha[head, query], values[head]
    o, error = a @ v, gradient[0, head, 6 + query]
    c11 = a[left] * (1 - 2 * a[left]) * (v[left] - o)
    c22 = a[left + 1] * (1 - 2 * a[left + 1]) * (v[left + 1] - o)
    c12 = -a[left] * a[left + 1] * (v[left] + v[left + 1] - 2 * o)
    expected = [torch.nn.functional.cosine_similarity(error, c, dim=0) for c in (c11, c22, c12)]
    assert torch.allclose(found[head, query * 2 + 1], torch.stack(expected), atol=1e-4)


def test_attention_rows_are_causal_and_sum_to_one() -> None:
    captured, _ = curvature.loss_gradient(tiny_model(), tokens(9), 0)
    alpha, values = curvature.attention_rows(captured, 4)
    assert torch.allclose(alpha.sum(-1), torch.ones_like(alpha[..., 0]))
    assert all(float(alpha[:, row, 5 + row :].sum()) == 0 for row in range(5))
    assert torch.allclose(alpha @ values, captured.outputs[0, :, 4:].detach(), atol=1e-8)


def test_closed_form_is_exact_and_its_weights_leave_the_unit_interval() -> None:
    assert curvature._autograd_error(5).value < 1e-10
    alpha = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    values = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = alpha @ values
    share = curvature.raw_share(alpha[:2], values[:2], output)
    assert not 0 <= share <= 1
    n11, n22, n12 = (c[0].norm() for c in second_derivatives(alpha, values, output))
    assert 0 <= merge_share(n11, n22, n12, alpha[0], alpha[1]) <= 1


def test_alignment_refuses_more_pairs_than_there_are() -> None:
    with pytest.raises(ValueError, match="pairs"):
        curvature.alignment("essays", 2, 32, 1, 40, model="smollm2-135m")
