"""The kernels of whole prompts in Triton's interpreter, against their twins and against float64."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrepro import attention, kernels, methods
from kvrepro.attention import Step
from kvrepro.methods.attention_matching import _shares
from kvrepro.methods.pairs import Choice, greedy_pairs
from kvrepro.rope import Rotation
from kvrepro.slots import Slots, compact, partition

prefill = pytest.importorskip("kvrepro.kernels.prefill")
pairs_kernel = pytest.importorskip("kvrepro.kernels.pairs")

pytestmark = pytest.mark.usefixtures("mended_interpreter")

#: Head size, query heads a KV head, queries, slots, cap.
SHAPES = [(64, 1, 37, 90, None), (128, 8, 70, 70, 2.0), (256, 3, 5, 200, None), (16, 2, 33, 33, None)]


def problem(
    d: int, group: int, n: int, size: int, *, cap: float | None = None, ragged: bool = False, merged: bool = False
) -> tuple[Step, Slots]:
    """A pass of n queries over `size` slots in float64; the first row has empty slots in front where `ragged`."""
    b, h = 2, 2
    gaps = torch.rand(b, h, 3 * size).argsort(dim=2)[..., :size].sort(dim=2).values if merged else None
    positions = torch.arange(size).expand(b, h, size).clone() if gaps is None else gaps
    positions[..., size - n :] = 3 * size + torch.arange(n)
    cardinality = torch.randint(1, 4, (b, h, size)) if merged else torch.ones(b, h, size, dtype=torch.int64)
    empty = torch.zeros(b, h, size, dtype=torch.bool)
    if ragged:
        empty[0, :, : size - n + 2] = True  # two of the new tokens are padding as well
    queried = positions[:, 0, size - n :].masked_fill(empty[:, 0, size - n :], -1)
    slots = Slots(
        keys=torch.randn(b, h, size, d, dtype=torch.float64),
        values=torch.randn(b, h, size, d, dtype=torch.float64),
        positions=positions.masked_fill(empty, -1).int(),
        cardinality=cardinality.masked_fill(empty, 0).int(),
        dense=not merged,
        ragged=ragged,
    )
    step = Step(
        queries=torch.randn(b, h, group, n, d, dtype=torch.float64),
        query_positions=queried.int(),
        scale=d**-0.5,
        softcap=cap,
        positions="cache" if merged else "original",
        cardinality_bias=merged,
        rotation=Rotation(100.0 ** -(torch.arange(0, d, 2) / d)),
    )
    return step, slots


def cast(step: Step, slots: Slots, dtype: torch.dtype) -> tuple[Step, Slots]:
    """The same in another type."""
    return (
        dataclasses.replace(step, queries=step.queries.to(dtype)),
        dataclasses.replace(slots, keys=slots.keys.to(dtype), values=slots.values.to(dtype)),
    )


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels take what lies on the CPU, and give them memory full of NaN to write into."""
    monkeypatch.setattr(kernels, "covers", lambda *tensors: tensors[0].dtype != torch.float64)
    monkeypatch.setattr(attention, "_cudnn", lambda *tensors, causal: False)
    empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *shape: int, **how: Any) -> Tensor:
        """`new_empty`, full of NaN."""
        x = empty(self, *shape, **how)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def no_worse(ours: Tensor, twin: Tensor, truth: Tensor, dtype: torch.dtype, units: float = 1.0) -> None:
    """Our error is at most twice the twin's at the same precision, and some units in the last place."""
    assert torch.isfinite(ours).all()
    grain = units * torch.finfo(dtype).eps * float(truth.norm())
    assert float((ours - truth).norm()) <= 2 * float((twin - truth).norm()) + grain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("ragged", "merged"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("d", "group", "n", "size", "cap"), SHAPES)
def test_output_and_statistics(
    d: int,
    group: int,
    n: int,
    size: int,
    cap: float | None,
    ragged: bool,
    merged: bool,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    torch.manual_seed(d + n)
    low = cast(*problem(d, group, n, size, cap=cap, ragged=ragged, merged=merged), dtype)
    exact = cast(*low, torch.float64)
    want, found = attention.attend(*exact, ("mass", "last"))
    theirs, their_found = attention.attend(*low, ("mass", "last"))
    request.getfixturevalue("interpreted")
    ours, our_found = attention.attend(*low, ("mass", "last"))
    plain, _ = attention.attend(*low, ())
    real = (low[0].query_positions >= 0)[:, None, None, :, None]
    assert ours.dtype == dtype and ours.shape == want.shape
    for out in (ours, plain):
        no_worse(out.double() * real, theirs.double() * real, want * real, dtype)
    for name in ("mass", "last"):
        assert our_found[name].dtype == torch.float32
        # The twin's error is another on each kind of CPU: on one, 5e-7 beside the interpreter's 1.3e-6.
        no_worse(our_found[name].double(), their_found[name].double(), found[name], torch.float32, units=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_rotation(d: int, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Turned as by the twin, near and far; a key that is not moved keeps its bits."""
    keys = torch.randn(2, 3, 40, d).to(dtype)
    shift = torch.randint(-90, 90, (2, 3, 40), dtype=torch.int32)
    shift[..., :9] = 0
    shift[..., 30:] *= 1000
    rotation = Rotation(10000.0 ** -(torch.arange(0, d, 2) / d))
    truth = Rotation(rotation.inv_freq.double()).rotate(keys.double(), shift)
    twin = rotation.rotate(keys, shift)
    request.getfixturevalue("interpreted")
    ours = rotation.rotate(keys, shift)
    assert torch.equal(ours[:, :, :9], keys[:, :, :9])
    no_worse(ours.double(), twin.double(), truth, dtype)


@pytest.mark.parametrize("size", [5, 90, 300])
@pytest.mark.parametrize("positions", ["cache", "cardinality"])
@pytest.mark.parametrize("ragged", [False, True])
def test_shifts_to_places_in_the_cache(
    size: int, positions: str, ragged: bool, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By how much each key is turned, from running sums that go on from block to block."""
    from kvrepro.kernels import rotation

    monkeypatch.setattr(rotation, "SCAN", 64)
    step, slots = cast(*problem(64, 2, 4, size, ragged=ragged, merged=True), torch.float32)
    step = dataclasses.replace(step, positions=positions)
    ours = step.shift(slots)
    monkeypatch.setattr(kernels, "covers", lambda *tensors: False)
    assert torch.equal(ours.long(), step.shift(slots).long())


@pytest.mark.parametrize("first", [0, 3, 36])
def test_column_sums_over_a_range_of_queries(first: int, interpreted: None) -> None:
    step, slots = cast(*problem(64, 2, 37, 90), torch.float32)
    seen = attention.view(step, slots)
    ((_, p),) = cast(step, slots, torch.float64)[0].blocks(cast(step, slots, torch.float64)[1])
    torch.testing.assert_close(seen.column_sums(first).double(), p[:, :, :, first:].sum(3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("d", "group", "n", "size", "cap"), SHAPES)
def test_queries_behind_all_slots_see_them_all(
    d: int, group: int, n: int, size: int, cap: float | None, ragged: bool, power: int, request: pytest.FixtureRequest
) -> None:
    """As reference queries do; attention to a power has its own sums."""
    torch.manual_seed(d + n)
    step, slots = cast(*problem(d, group, n, size, cap=cap, ragged=ragged, merged=True), torch.float32)
    places = step.query_positions.masked_fill(step.query_positions >= 0, 4 * size)
    step = dataclasses.replace(step, query_positions=places, behind=True)
    want = attention.observe(*cast(step, slots, torch.float64), power)
    request.getfixturevalue("interpreted")
    found = attention.observe(step, slots, power)
    for name in ("mass", "output", "lse"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(want, name), rtol=1e-4, atol=1e-5)
    assert bool((found.lse.isinf() == (places < 0)[:, None, None]).all())
    answers = attention.observe(step, slots, power=None)
    assert answers.mass is None and torch.equal(answers.output, found.output) and torch.equal(answers.lse, found.lse)
    masses = attention.observe(step, slots, power, output=False)
    assert masses.output is None
    for name in ("mass", "lse"):
        torch.testing.assert_close(getattr(masses, name).double(), getattr(want, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("n", "size"), [(7, 130), (37, 90)])
def test_slots_in_parts_are_attended_to_as_a_whole(
    n: int, size: int, ragged: bool, behind: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few queries over many slots: a part may hold empty slots alone, or none that a query sees."""
    monkeypatch.setitem(prefill.CONFIG, "least", 16)
    step, slots = cast(*problem(64, 2, n, size, ragged=ragged, merged=True), torch.float32)
    if behind:
        places = step.query_positions.masked_fill(step.query_positions >= 0, 4 * size)
        step = dataclasses.replace(step, query_positions=places, behind=True)
    assert prefill.splits(step.queries.flatten(1, 2), size) > 4
    want = attention.observe(*cast(step, slots, torch.float64), 2)
    request.getfixturevalue("interpreted")
    found = attention.observe(step, slots, 2)
    for name in ("mass", "output", "lse"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(want, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("d", "group", "n", "size", "cap"), SHAPES)
def test_shares_of_a_mass_that_is_given(
    d: int, group: int, n: int, size: int, cap: float | None, ragged: bool, dtype: torch.dtype, interpreted: None
) -> None:
    """Of all slots' mass those that are left get no more than there is; a query that counts not gives nothing."""
    torch.manual_seed(d + n)
    step, slots = cast(*problem(d, group, n, size, cap=cap, ragged=ragged, merged=True), dtype)
    places = step.query_positions.masked_fill(step.query_positions >= 0, 4 * size)
    step = dataclasses.replace(step, query_positions=places, behind=True, positions="original")
    exact, wide = cast(step, slots, torch.float64)
    lse = attention.observe(exact, wide, power=None).lse
    left, rest = (compact(x, x.valid & (torch.arange(size) % 3 > 0), size // 2) for x in (slots, wide))
    ours, want = _shares(step, lse.float(), left), _shares(exact, lse, rest)
    assert ours.shape == want.shape == (2, 2, group, n, size // 2) and ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), want, rtol=1e-2 if dtype == torch.float16 else 1e-4, atol=1e-6)
    assert bool((ours.sum(-1) < 1).all())
    assert bool((ours.sum(-1) == 0).logical_or(lse.isfinite()).all())


@pytest.mark.parametrize("unlike", ["", "few", "biased", "ragged", "softcap"])
def test_cudnn_is_asked_for_what_it_can(
    unlike: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries see all slots by it if nothing is added to the logits and they are not few, else by the kernel.

    Either way they see the same. What it is asked is answered here in PyTorch, a query head at a time.
    """
    cap = 2.0 if unlike == "softcap" else None
    step, slots = cast(*problem(64, 2, 7, 30, cap=cap, ragged=unlike == "ragged"), torch.float32)
    slots = dataclasses.replace(slots, dense=unlike != "biased", stats={"bias": torch.rand(2, 2, 30)})
    places = step.query_positions.masked_fill(step.query_positions >= 0, 1000)
    step = dataclasses.replace(step, query_positions=places, behind=True)
    want = attention.observe(*cast(step, slots, torch.float64))
    called = []

    def cudnn(
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: None,
        lse: bool,
        dropout: float,
        causal: bool,
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        called.append((bias, lse, dropout, causal))
        logits = scale * queries @ keys.repeat_interleave(2, dim=1).mT
        return logits.softmax(-1) @ values.repeat_interleave(2, dim=1), logits.logsumexp(-1)

    request.getfixturevalue("interpreted")
    monkeypatch.setitem(prefill.CONFIG, "least", 8 if unlike == "few" else 1024)
    monkeypatch.setattr(attention, "_cudnn", lambda *tensors, causal: not causal)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn, raising=False)
    found = attention.observe(step, slots)
    assert called == ([] if unlike else [(None, True, 0.0, False)])
    for name in ("mass", "output", "lse"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(want, name), rtol=1e-4, atol=1e-5)


def chosen_at(left: list[list[int]], size: int) -> Choice:
    """The pairs whose left ends are given, for each row."""
    chosen = torch.zeros(len(left), 1, size - 1, dtype=torch.bool)
    for row, places in enumerate(left):
        chosen[row, 0, places] = True
    counts = chosen.sum(dim=2, keepdim=True)
    same = int(counts.min()) == int(counts.max())
    order = partition(torch.nn.functional.pad(chosen, (0, 1)))[0]
    return Choice(chosen, order, len(left[0]) if same else counts, int(counts.max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("d", "group", "n", "size", "cap"), SHAPES[:3])
@pytest.mark.parametrize("uneven", [False, True])
def test_shares_are_the_closed_form(
    d: int, group: int, n: int, size: int, cap: float | None, dtype: torch.dtype, uneven: bool, interpreted: None
) -> None:
    """From the output as the pass returned it; queries may stand before some of the pairs, rows differ in number."""
    torch.manual_seed(d + n)
    step, slots = cast(*problem(d, group, n, size, cap=cap, merged=True), dtype)
    left = torch.rand(2, size - 1).argsort(dim=1)[:, :7].sort(dim=1).values.tolist()
    choice = chosen_at([left[0], left[1][:4]] if uneven else left, size)
    seen = attention.observe(step, slots)
    ours = methods.create("kvslimmer").weigh(slots, step, seen, choice)
    exact, wide = cast(step, slots, torch.float64)
    truth = dataclasses.replace(
        seen, mass=seen.mass.double(), output=seen.output.double(), lse=attention.observe(exact, wide).lse, view=None
    )
    want = methods.create("kvslimmer").weigh(wide, exact, truth, choice)
    pick = choice.chosen.expand(-1, 2, -1)
    # |v - o| is a small difference of large squares where v is nearly o.
    torch.testing.assert_close(ours.squeeze(-1)[pick].double(), want.squeeze(-1)[pick], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("ragged", [False, True])
def test_scores_of_pairs(ragged: bool, request: pytest.FixtureRequest) -> None:
    """What merging costs, by place and cardinality; the ends are forbidden wherever a row begins."""
    _, slots = cast(*problem(64, 2, 16, 300, merged=True), torch.float32)
    if ragged:
        slots = emptied(slots, [0, 37])
    mass = torch.rand(2, 2, 300).masked_fill(~slots.valid, 0)
    for variant in ("paper", "released"):
        method = methods.create("kvslimmer", sinks=3, recent=20, variant=variant)
        want = method.scores(dataclasses.replace(slots, keys=slots.keys.double()), 100, mass)
        with request.getfixturevalue("monkeypatch").context() as patch:
            patch.setattr(kernels, "covers", lambda *tensors: tensors[0].dtype != torch.float64)
            ours = method.scores(slots, 100, mass)
        assert int(torch.isfinite(want).sum()) == 2 * (300 - 3 - 20 - 1) - 37 * ragged
        torch.testing.assert_close(ours, want)


def emptied(slots: Slots, empty: list[int]) -> Slots:
    """The slots with the first ones of each row empty, and one cardinality for all heads, as in a real cache."""
    gone = torch.arange(slots.size) < torch.tensor(empty)[:, None, None]
    tokens = slots.cardinality[:, :1].expand_as(slots.cardinality)
    return dataclasses.replace(
        slots,
        positions=slots.positions.masked_fill(gone, -1),
        cardinality=tokens.masked_fill(gone, 0).contiguous(),
        ragged=any(empty),
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("label", ["kvslimmer", "kvslimmer-released", "asymkv", "overlapping"])
def test_pairs_merge_as_in_the_twin(label: str, ragged: bool, request: pytest.FixtureRequest) -> None:
    """Several rounds through all kernels, the judges' own tokens among the merged: the same slots and contents."""
    options = {
        "kvslimmer": {},
        "kvslimmer-released": {"variant": "released"},
        "asymkv": {"fisher": "forward"},
        "overlapping": {"overlap": "released"},
    }[label]
    name = "asymkv" if label == "asymkv" else "kvslimmer"
    method = methods.create(name, sinks=2, recent=8, queries=12, **options)
    torch.manual_seed(len(label) + ragged)
    step, slots = cast(*problem(64, 2, 16, 64, ragged=False, merged=True), torch.float32)
    step = dataclasses.replace(step, positions="cardinality")
    slots = emptied(slots, [0, 20 if ragged else 0])
    stats = {k: torch.rand(2, 2, 64) for k in method.accumulates}
    slots = dataclasses.replace(slots, stats={k: x.masked_fill(~slots.valid, 0) for k, x in stats.items()})
    want = method.compress(slots, 24, step)
    request.getfixturevalue("interpreted")
    ours = method.compress(slots, 24, step)
    assert torch.equal(ours.positions, want.positions) and torch.equal(ours.cardinality, want.cardinality)
    if "overlap" not in options:
        assert torch.equal(ours.cardinality.sum(dim=2), slots.cardinality.sum(dim=2)) or label.endswith("released")
    valid = want.valid.unsqueeze(-1)
    for field in ("keys", "values"):
        a, b = (getattr(x, field) * valid for x in (ours, want))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("tile", [16, 4096])
@pytest.mark.parametrize("pairs", [1, 2, 15, 48, 101])
def test_greedy_pairs_is_its_twin(pairs: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, forbidden pairs, and runs that go on from one tile to the next."""
    monkeypatch.setattr(pairs_kernel, "GREEDY_TILE", tile)
    for score in (torch.rand(2, 3, pairs), torch.randint(0, 4, (2, 3, pairs)).float()):
        score[torch.rand(score.shape) < 0.1] = torch.inf
        assert torch.equal(pairs_kernel.greedy(score), greedy_pairs(score))


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter does not look at types; the compiler does, and needs no GPU."""
    script = tmp_path / "launch.py"
    script.write_text(
        "import torch\n"
        "from kvrepro.kernels import merging, pairs, prefill, rotation\n"
        "from kvrepro.attention import View\n"
        "from kvrepro.methods.pairs import Choice\n"
        "from kvrepro.slots import Slots\n"
        "q, k = torch.randn(1, 8, 200, 128).bfloat16(), torch.randn(1, 2, 300, 128).bfloat16()\n"
        "for bias, cap in ((None, None), (torch.zeros(1, 2, 300), 2.0)):\n"
        "    out, lse = prefill.attend(q, k, k, bias, 0.1, cap)\n"
        "    prefill.column_sums(q, k, lse, bias, 0.1, cap, power=2)\n"
        "    for queries in (q, q[:, :, :32]):\n"
        "        prefill.log_sum_exp(queries, k, bias, 0.1, cap, 300)\n"
        "    prefill.shares(q.view(1, 2, 4, 200, 128), k, lse, bias, 0.1, cap)\n"
        "prefill.attend(q[:, :, :32], *2 * [torch.randn(1, 2, 9000, 128).bfloat16()], None, 0.1, None, 9000)\n"
        "ones = torch.ones(1, 2, 300, dtype=torch.int32)\n"
        "slots, mass = Slots(k, k, ones, ones), torch.rand(1, 2, 300)\n"
        "pairs.scores(mass, slots, 4, 8, 650.0, True)\n"
        "pairs.greedy(torch.rand(1, 1, 299))\n"
        "rotation.shift(ones, ones, True)\n"
        "score = torch.rand(1, 2, 40000)\n"
        "for size in (300, 20000, 40000):\n"
        "    merging.partition(merging.top(score[..., :size], score[..., :size] > 0.2, 100))\n"
        "    merging.top(score[..., :size], score[..., :size] > 0.2, 100, score[..., :size] > 0.8)\n"
        "merging.by_token(score[..., :300].contiguous(), ones)\n"
        "order = torch.arange(300).expand(1, 1, -1)\n"
        "for count in (100, torch.full((1, 1, 1), 90)):\n"
        "    choice = Choice(ones[:, :1, 1:] > 0, order, count, 100)\n"
        "    view = View(q, k, k, bias, out, lse, 0.1, None, k, 100)\n"
        "    share = pairs.shares(view, ones, ones[:, 0, :200], mass, choice)\n"
        "    for share in (share.unsqueeze(-1), torch.rand(1, 2, 299, 128)):\n"
        "        pairs.merge(slots, mass, choice, share, 5, torch.rand(64))\n",
        encoding="utf-8",
    )
    compile_script(script, launches=46)


def test_decoding_compiles_for_a_gpu(tmp_path: Path) -> None:
    """Both launches of a step, for the rules that merge."""
    script = tmp_path / "launch.py"
    script.write_text(
        "import torch\n"
        "from kvrepro import static\n"
        "from kvrepro.kernels import decode\n"
        "from kvrepro.methods.base import StepRule\n"
        "from kvrepro.slots import Slots\n"
        "k, ones = torch.randn(1, 2, 300, 128).bfloat16(), torch.ones(1, 2, 300, dtype=torch.int32)\n"
        "slots = Slots(k, k, ones, ones, {name: ones.float() for name in ('mass', 'count', 'last')})\n"
        "following = StepRule('age', merge='next', sinks=4, recent=296, targets=16, seed=-1, stream=1)\n"
        "last = StepRule('last', sinks=1)\n"
        "joining = StepRule('mean', merge='right')\n"
        "for rule, names in ((joining, ('mass', 'count')), (following, ('mass',)), (last, ('last',))):\n"
        "    fixed = static.freeze_shape(slots, 300, rule, ones[0, :1, 0], names, None, layer=1)\n"
        "    q = torch.randn(1, 2, 4, 128).bfloat16()\n"
        "    for window in (None, (torch.randn(1, 2, 4, 16, 128).bfloat16(), torch.zeros(1, dtype=torch.int64))):\n"
        "        decode.step(fixed, q, k[:, :, 0], k[:, :, 0], 0.1, None, window)\n",
        encoding="utf-8",
    )
    compile_script(script, launches=12)


def compile_script(script: Path, launches: int) -> None:
    """Compile the launches of a script for compute capability 9.0, in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "compile_kernels.py"), str(script)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "HOME": str(script.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"compiled {launches} launches" in done.stdout
