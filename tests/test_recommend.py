"""What to use for a reader's model: the rule on numbers made by hand, the measurements on tiny models, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tasks import Letters
from tiny import tiny_model, tokens
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvrepro
from kvrepro import cli_recommend
from kvrepro.cli import main
from kvrepro.recommend import Measured, Setting, check, choose, parse_variants, read_text

SETTING = Setting(needles=8, answer=100)
KL = [0.02, 0.03, 0.02, 0.04, 0.03, 0.02, 0.03, 0.03]
FULL = Measured("full", None, 1000, [0.0] * 8, [-0.1] * 8, [True] * 8, read=1.0, token=0.01)


def measured(label: str, more: float = 0.0, lost: float = 0.0, read: float = 1.0, **fields: Any) -> Measured:
    """A method that diverges by so much more, loses so much log-likelihood, and takes so long to read."""
    loglik = [-0.1 - lost - 0.01 * (i % 2) for i in range(8)]
    given = {"nbytes": 250, "loglik": loglik, "exact": [lost < 1] * 8, "token": 0.01, **fields}
    return Measured(label, 64, kl=[x + more for x in KL], read=read, **given)


class TestRule:
    def test_the_lowest_divergence_is_used(self) -> None:
        choice = choose(FULL, [measured("h2o", 0.05), measured("snapkv")], 0.25, SETTING)
        assert (choice.best, choice.use) == ("snapkv", "snapkv")
        assert [c.label for c in choice.candidates] == ["snapkv", "h2o"]
        assert choice.candidates[1].behind.mean == pytest.approx(0.05)
        assert "holds 25.0 % of the full cache's bytes" in choice.why

    def test_a_method_that_is_level_and_cheaper_is_used(self) -> None:
        noisy = Measured("h2o", 64, 250, [x + (-1) ** i * 0.01 + 0.001 for i, x in enumerate(KL)], (), (), 0.5, 0.01)
        slow = Measured("snapkv", 64, 250, KL, (), (), 1.0, 0.01)
        choice = choose(Measured("full", None, 1000, [0.0] * 8, (), (), 1.0, 0.01), [slow, noisy], 0.25, SETTING)
        assert (choice.best, choice.use) == ("snapkv", "h2o")
        assert "1.5 s against 2 s" in choice.why and "Retrieval was not measured" in choice.why

    def test_costs_that_are_almost_equal_leave_it_to_the_divergence(self) -> None:
        choice = choose(FULL, [measured("h2o", 0.0001, read=0.95), measured("snapkv", read=1.0)], 0.25, SETTING)
        assert choice.use == "snapkv"  # 1.95 s and 2 s

    def test_who_loses_the_needle_is_out(self) -> None:
        choice = choose(FULL, [measured("h2o", lost=2.0), measured("snapkv", 0.02)], 0.25, SETTING)
        assert choice.use == "snapkv" and not choice.candidates[0].retrieves
        assert "is the lowest of those that retrieve" in choice.why
        assert "Out, because they retrieve worse than the best: h2o (" in choice.why

    def test_what_even_the_best_loses_is_said(self) -> None:
        choice = choose(FULL, [measured("h2o", lost=2.0)], 0.25, SETTING)
        assert choice.use == "h2o"
        assert "retrieves worse than the full cache" in choice.why and "0 of 8 found against 8" in choice.why

    def test_no_method_helps_above_the_tolerance(self) -> None:
        choice = choose(FULL, [measured("h2o", 0.5), measured("snapkv", 0.3)], 0.25, SETTING)
        assert choice.use is None and choice.best == "snapkv"
        assert choice.why.startswith("Keep the full cache: no method helps. The best, snapkv, diverges by 0.327")
        assert choose(FULL, [measured("snapkv", 0.3)], 0.25, Setting(tolerance=0.5)).use == "snapkv"

    def test_an_interval_across_the_tolerance_is_said(self) -> None:
        choice = choose(FULL, [measured("h2o")], 0.25, Setting(tolerance=0.028))
        assert choice.use == "h2o" and "more passages would decide" in choice.why

    def test_memory_without_time_is_said(self) -> None:
        assert "saves memory, not time" in choose(FULL, [measured("h2o")], 0.25, SETTING).why
        assert "saves memory" not in choose(FULL, [measured("h2o", read=0.1)], 0.25, SETTING).why

    def test_a_model_that_finds_nothing_makes_retrieval_say_little(self) -> None:
        blind = Measured("full", None, 1000, [0.0] * 8, [-5.0] * 8, [False] * 8, 1.0, 0.01)
        assert "finds no needle with the full cache either" in choose(blind, [measured("h2o")], 0.25, SETTING).why


class TestMeasuring:
    SMALL = Setting(context=48, continuation=8, passages=3, needles=0, steps=2, repeats=1, tolerance=9.0)

    def test_numbers_are_those_of_fidelity_at_equal_bytes(self) -> None:
        model = kvrepro.prepare(tiny_model(dtype=torch.float32))
        ids = tokens(3, 56)
        told = []
        found = kvrepro.recommend(
            model,
            None,
            0.5,
            text=ids,
            methods=["h2o", "snapkv"],
            setting=self.SMALL,
            progress=lambda *x: told.append(x),
        )
        (choice,) = found.choices
        assert found.full.nbytes == 3 * 2 * 2 * 48 * 8 * 4  # layers, heads, keys and values, tokens, d, bytes
        for candidate in choice.candidates:
            m = candidate.measured
            assert 0.4 * found.full.nbytes < m.nbytes <= 0.5 * found.full.nbytes
            own = kvrepro.fidelity(model, ids[:1], m.label, m.slots, context=48, continuation=8)
            assert m.kl[0] == pytest.approx(float(own.kl.mean()), rel=1e-4) and m.nbytes == own.nbytes
            assert m.read > 0 and m.token > 0
        slots = {c.label: c.measured.slots for c in choice.candidates}
        assert slots["snapkv"] < slots["h2o"]  # its window of queries takes bytes
        assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
        assert told[-1][:2] == (12, 12)  # (3 passages + 1 timing) x (full cache + 2 methods)
        assert json.loads(json.dumps(found.as_dict()))["choices"][0]["use"] in slots
        assert all(part in str(found) for part in ("0.5 of the full cache's bytes", "h2o", found.rule))

    def test_several_budgets_and_the_least_memory(self) -> None:
        model = kvrepro.prepare(tiny_model(dtype=torch.float32))
        found = kvrepro.recommend(model, None, [0.5, 16], text=tokens(3, 56), methods="h2o", setting=self.SMALL)
        assert [choice.budget for choice in found.choices] == [0.5, 16]
        assert found.choices[1].candidates[0].measured.slots == 16
        assert found.smallest is found.choices[1]
        assert "16 slots, so bytes differ" in str(found) and "h2o at 16" in str(found)

    def test_sliding_window_layers_stay(self) -> None:
        model = kvrepro.prepare(tiny_model("gemma2", dtype=torch.float32))
        found = kvrepro.recommend(model, None, 0.5, text=tokens(3, 56), methods="h2o", setting=self.SMALL)
        (candidate,) = found.choices[0].candidates
        assert candidate.measured.slots < 24 and candidate.measured.nbytes < found.full.nbytes

    def test_a_method_without_room_is_left_out_with_the_reason(self) -> None:
        model = kvrepro.prepare(tiny_model(dtype=torch.float32))
        given = {"text": tokens(3, 56), "setting": self.SMALL}
        found = kvrepro.recommend(model, None, 4, methods=["random", "streaming_llm"], **given)
        (choice,) = found.choices
        assert [c.label for c in choice.candidates] == ["random"]
        assert "sinks" in choice.left_out["streaming_llm"] and "not measured: streaming_llm" in str(found)
        with pytest.raises(ValueError, match="no method can be measured at a budget of 4: streaming_llm"):
            kvrepro.recommend(model, None, 4, methods="streaming_llm", **given)

    def test_a_method_that_cannot_keep_to_the_share_is_left_out(self) -> None:
        model = kvrepro.prepare(tiny_model(dtype=torch.float32))
        given = {"text": tokens(3, 56), "setting": self.SMALL, "methods": "random"}
        with pytest.raises(ValueError, match="bytes at least, more than 0.01 of"):
            kvrepro.recommend(model, None, 0.01, **given)

    def test_needles(self) -> None:
        model = kvrepro.prepare(tiny_model(dtype=torch.float32))
        setting = Setting(context=800, continuation=4, passages=2, needles=2, steps=1, repeats=1, tolerance=9.0)
        found = kvrepro.recommend(model, Letters(), 0.5, text=tokens(2, 804), methods="tova", setting=setting)
        (candidate,) = found.choices[0].candidates
        assert len(found.full.loglik) == len(candidate.measured.loglik) == 2
        assert candidate.retrieval.mean == 0  # the best is itself
        assert "0/2" in str(found) and "finds no needle" in found.choices[0].why

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"text": tokens(2, 56)}, "not 3 passages of 56 tokens"),
            ({"text": "essays"}, "a tokenizer is needed"),
            ({"setting": Setting(needles=4)}, "a tokenizer is needed"),
        ],
    )
    def test_errors(self, given: dict[str, Any], message: str) -> None:
        given = {"text": tokens(3, 56), "setting": self.SMALL, **given}
        with pytest.raises(ValueError, match=message):
            kvrepro.recommend(tiny_model(), None, 0.5, methods="h2o", **given)


@pytest.mark.parametrize(
    ("budgets", "methods", "message"),
    [
        ([1.0], "h2o", "saves nothing or keeps nothing"),
        ([384], "h2o", "saves nothing or keeps nothing"),
        ([0.25, 0.25], "h2o", "given twice"),
        ([], "h2o", "at least one budget"),
        ([0.25], "full", "leave it out"),
    ],
)
def test_what_cannot_be_compared(budgets: list[float], methods: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(budgets, parse_variants(methods), Setting())


@pytest.mark.parametrize("size", [{"passages": 1}, {"needles": 1}, {"tolerance": 0.0}, {"context": 1}, {"repeats": 0}])
def test_sizes_out_of_range(size: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(size))):
        Setting(**size)


def test_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Some notes.", encoding="utf-8")
    text = read_text(str(path))
    assert (text.name, text.documents) == ("notes.txt", ("Some notes.",))
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not a text in UTF-8"):
        read_text(str(path))
    with pytest.raises(ValueError, match="neither a text file nor one of essays"):
        read_text(str(tmp_path / "nothing"))


class TestCommand:
    def call(self, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["recommend", *words])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    def test_on_the_embedded_model(
        self,
        embedded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(kvrepro, "load_model", lambda *_, **__: embedded)
        path = tmp_path / "notes.txt"
        path.write_text("The cache holds keys and values of all tokens read so far. " * 40, encoding="utf-8")
        sizes = "--context 160 --continuation 8 -n 2 --needles 2 --repeats 1 --answer 4 --budget 0.5 --tolerance 5"
        words = [*sizes.split(), "--text", str(path), "--method", "h2o", "--method", "snapkv(window=4)", "--json"]
        code, out, err = self.call(capsys, *words)
        assert code == 0 and "2 methods at 1 budget" in err
        found = json.loads(out)
        (choice,) = found["choices"]
        assert found["model"] == "smollm2-135m" and found["text"] == "notes.txt"
        assert choice["use"] in ("h2o", "snapkv(window=4)")
        assert {c["measured"]["label"] for c in choice["candidates"]} == {"h2o", "snapkv(window=4)"}
        assert len(found["full"]["loglik"]) == 2 and found["full"]["loglik"][0] > -1  # it copies the number

    def test_bad_usage_is_told_before_a_model_is_loaded(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(kvrepro, "load_model", lambda *_, **__: pytest.fail("loaded"))
        for words, message in (
            (["--method", "nothing"], "unknown method 'nothing'"),
            (["--text", "nowhere.txt"], "neither a text file"),
            (["--budget", "1.0"], "saves nothing"),
            (["-n", "1"], "passages=1 must be 2 or more"),
        ):
            code, _, err = self.call(capsys, *words)
            assert code == 2 and message in err

    def test_stopping_says_that_nothing_is_kept(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stopped(*_: Any, **given: Any) -> None:
            given["progress"](0, 3, "passage 1 of 2: full cache")
            raise KeyboardInterrupt

        monkeypatch.setattr(kvrepro, "load_model", lambda *_, **__: (None, None))
        monkeypatch.setattr(kvrepro, "recommend", stopped)
        code, _, err = self.call(capsys)
        assert code == 130 and "nothing is kept" in err

    def test_candidates_are_methods(self) -> None:
        labels = [variant.method for variant in parse_variants(cli_recommend.CANDIDATES)]
        assert (
            {"attention_matching", "weightedkv", "kvmerger", "kvslimmer"} <= set(labels) <= set(kvrepro.methods.names())
        )
