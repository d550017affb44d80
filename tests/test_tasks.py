"""Tasks: metrics worked out by hand, prompts and cuts, files that are missing or damaged, generators, and a run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvrepro
from kvrepro.cli import main
from kvrepro.experiments.common import Bench
from kvrepro.tasks import intervals, longbench, metrics, ruler, synthwiki, zeroscrolls
from kvrepro.tasks.base import Sample, Task, cut, encode, encode_reference, render
from kvrepro.tasks.run import Reading, compare, end_tokens, log_likelihood, run, write

PROMPTS = {name: f"Read.\n\n{{context}}\n\nAnswer {name}: {{input}}\nAnswer:" for name in longbench.NAMES}


class Letters:
    """A tokenizer of one token a character: printable ASCII is 1 to 95, a newline 96, so that tiny models know all."""

    eos_token_id = None

    def __init__(self, template: bool = False) -> None:
        self.chat_template = "[user]" if template else None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[96 if letter == "\n" else ord(letter) - 31 for letter in text])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join("\n" if i == 96 else chr(int(i) + 31) for i in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        return f"[user]{messages[0]['content']}[model]"


def sample(prompt: str = "0123456789", **fields: Any) -> Sample:
    return Sample(**{"id": "0", "prompt": prompt, "answers": ("7",), "max_new_tokens": 3, **fields})


def task(*samples: Sample, **fields: Any) -> Task:
    return Task(
        **{"suite": "toy", "name": "toy", "metric": "qa_f1", "data": "toy", "files": {}, **fields}, samples=samples
    )


# --- metrics


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        # {cat, sat, on, mat} against {cat, on, mat}: P = 3/4, R = 1, F = 2 · 3/4 / (7/4)
        ("The cat sat on the mat.", "a cat on a mat", 6 / 7),
        # {yes, yes} against {yes}: P = 1/2, R = 1
        ("Yes, yes!", "yes", 2 / 3),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("the", "the", 0.0),  # an article alone is nothing
    ],
)
def test_qa_f1(prediction: str, answer: str, score: float) -> None:
    assert metrics.qa_f1(prediction, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        # Longest common subsequences: (the cat ran, the cat sat) "the cat", (the cat ran, the dog) "the",
        # (a dog, the dog) "dog": U = {the, cat, dog}; P = 3 of {the, cat, sat, dog}, R = 3 of {the, cat, ran, a, dog}:
        # F = 2 · 3/4 · 3/5 / (3/4 + 3/5)
        ("the cat sat. the dog", "the cat ran. a dog", 2 / 3),
        ("a a a", "a", 1.0),  # different words only
        ("a", "a a a", 1.0),
        # "b a" in "a b": one of both, P = R = 1/2
        ("a b", "b a", 1 / 2),
        ("Cat", "cat", 0.0),  # nothing is lower-cased
        ("", "cat", 0.0),
        (".", "cat", 0.0),
    ],
)
def test_rouge_l(prediction: str, answer: str, score: float) -> None:
    assert metrics.rouge_l(prediction, answer) == pytest.approx(score, abs=1e-7)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Date or Number", "Date", 1 / 2),
        ("Date", "Date", 1.0),
        ("Other location", "Other location", 1.0),  # "location" is a part of the answer
        ("Other location", "location", 1 / 2),  # "Other location" is no part of it
        ("Food", "Date", 0.0),
        ("nothing", "Date", 0.0),
    ],
)
def test_classification(prediction: str, answer: str, score: float) -> None:
    assert metrics.classification(prediction, answer, ["Date", "location", "Number", "Other location", "Food"]) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("Paragraph 3", 1.0), ("3 or 4", 1 / 2), ("13", 0.0), ("Paragraph", 0.0), ("3, 3, 1", 2 / 3)],
)
def test_numbers(prediction: str, score: float) -> None:
    assert metrics.retrieval(prediction, "Paragraph 3") == pytest.approx(score)
    assert metrics.count(prediction, "3") == pytest.approx(score)


def test_retrieval_needs_a_paragraph() -> None:
    with pytest.raises(ValueError, match="should be of the form 'Paragraph 3'"):
        metrics.retrieval("3", "three")


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("\n# first\n`code`\nx = 1\ny", "x = 2", 0.8),  # "x = 1": 2 · 4 of 5 + 5 characters
        ("abc", "abd", 0.67),  # 2 · 2 / 6, in whole per cent
        ("x", "x", 1.0),
        ("// only a comment", "x", 0.0),
        ("", "x", 0.0),
    ],
)
def test_code_similarity(prediction: str, answer: str, score: float) -> None:
    assert metrics.code_similarity(prediction, answer) == pytest.approx(score)


def test_rouge_geometric() -> None:
    # Words: 2 of 3 on both sides, 2/3. Pairs: "the cat", 1 of 2, 1/2. Longest common subsequence: 2 of 3, 2/3.
    assert metrics.rouge_geometric("The cat sat!", "the cat ran") == pytest.approx((2 / 3 * 1 / 2 * 2 / 3) ** (1 / 3))
    assert metrics.rouge_geometric("the cat ran", "The cat, ran.") == pytest.approx(1.0)
    assert metrics.rouge_geometric("cat", "cat") == 0.0  # no pairs
    assert metrics.rouge_geometric("", "cat") == 0.0


def test_contains_and_share_found() -> None:
    assert metrics.contains('It is "Wayne\n Gretzky".', "wayne gretzky") == 1.0
    assert metrics.contains("Kirabos friend", "Kirabo's") == 1.0
    assert metrics.contains("Wayne", "wayne gretzky") == 0.0
    assert metrics.share_found("12 and abc", ["12", "ABC", "13"]) == pytest.approx(2 / 3)


def test_the_best_answer_counts() -> None:
    assert metrics.METRICS["qa_f1"]("five", ["5", "five"], ()) == 1.0
    assert metrics.METRICS["classification"]("Date", ["Food", "Date"], ["Food", "Date"]) == 1.0
    assert metrics.METRICS["share_found"]("5", ["5", "five"], ()) == 1 / 2
    assert set(longbench.METRIC.values()) <= set(metrics.METRICS)


# --- intervals


def test_interval_of_equal_values_is_a_point_and_of_one_document_none() -> None:
    assert intervals.bootstrap([2.0] * 5, list("abcde")) == intervals.Interval(2.0, 2.0, 2.0)
    assert intervals.bootstrap([1.0, 3.0], ["a", "a"]) == intervals.Interval(2.0, None, None)
    with pytest.raises(ValueError, match="0 values of 1 samples"):
        intervals.bootstrap([], ["a"])


@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_interval_holds_the_mean_and_is_the_seed_s(values: list[float], seed: int) -> None:
    documents = [str(i) for i in range(len(values))]
    found = intervals.bootstrap(values, documents, seed=seed, draws=400)
    assert found == intervals.bootstrap(values, documents, seed=seed, draws=400)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    moved = intervals.bootstrap([value + 3 for value in values], documents, seed=seed, draws=400)
    assert (moved.low, moved.high) == (pytest.approx(found.low + 3), pytest.approx(found.high + 3))


def test_intervals_shrink_with_documents_not_with_samples_of_them() -> None:
    draw = random.Random(0)
    few = [draw.gauss(0, 1) for _ in range(10)]
    many = [draw.gauss(0, 1) for _ in range(1000)]
    width = lambda found: found.high - found.low  # noqa: E731
    base = width(intervals.bootstrap(few, [str(i) for i in range(10)]))
    assert width(intervals.bootstrap(many, [str(i) for i in range(1000)])) < base / 4
    assert width(intervals.bootstrap(few * 20, [str(i) for i in range(10)] * 20)) == pytest.approx(base)


def test_interval_is_the_normal_one_for_many_documents() -> None:
    # 200 zeros and 200 ones: standard error 0.5 / sqrt(400) = 0.025, so 0.5 ± 1.96 · 0.025
    found = intervals.bootstrap([0.0, 1.0] * 200, [str(i) for i in range(400)])
    assert (found.low, found.high) == (pytest.approx(0.451, abs=0.004), pytest.approx(0.549, abs=0.004))


def test_pairing_removes_what_both_share() -> None:
    documents = [str(i) for i in range(20)]
    first = [float(i) for i in range(20)]
    found = intervals.paired(first, [value + 0.5 for value in first], documents)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


# --- prompts


@pytest.mark.parametrize(("length", "kept"), [(4, "0189"), (5, "0189"), (10, "0123456789"), (9, "01236789")])
def test_cut_in_the_middle(length: int, kept: str) -> None:
    assert cut(Letters(), sample(), length) == kept  # type: ignore[arg-type]


def test_cut_before_the_query() -> None:
    asked = sample("document, long. Query?", query_at=16, separator="[...] ")
    assert cut(Letters(), asked, 22) == "document, long. Query?"  # type: ignore[arg-type]
    assert cut(Letters(), asked, 20) == "document[...] Query?"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the query alone has 12 tokens"):
        cut(Letters(), asked, 12)  # type: ignore[arg-type]


def test_chat_template_only_where_the_task_wants_it() -> None:
    asked = sample("Hi", lead=" Answer:")
    for template, chat, text in [(True, True, "[user]Hi[model]"), (True, False, "Hi"), (False, True, "Hi")]:
        assert render(Letters(template), task(asked, chat=chat), asked) == f"{text} Answer:"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "answer", "read"), [("A:", "7", " 7"), ("A: ", "7", "7"), ("A:\n", "7", "7"), ("A:", " 7", " 7")]
)
def test_reference_answer_follows_a_space(before: str, answer: str, read: str) -> None:
    ids = encode_reference(Letters(), before, sample(answers=(answer,)))  # type: ignore[arg-type]
    assert Letters().decode(ids[0]) == read


def test_no_token_is_written_twice_by_the_chat_template(
    embedded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    tokenizer = embedded[1]
    asked = sample("What is it?")
    ids = encode(tokenizer, task(asked), render(tokenizer, task(asked), asked))[0].tolist()
    assert ids == tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is it?"}], add_generation_prompt=True, return_dict=False
    )


def test_special_tokens_are_added_where_no_template_writes_them() -> None:
    class Starting(Letters):
        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[0] * add_special_tokens + super().__call__(text).input_ids)

    asked = sample()
    for template, chat, first in [(True, True, 1), (True, False, 0), (False, True, 0)]:
        tokenizer: Any = Starting(template)
        assert (encode(tokenizer, task(asked, chat=chat), " ")[0, 0] == 0) == (first == 0)


# --- files


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with small files of each format."""
    root = tmp_path / "data"
    (root / "longbench_mini/config").mkdir(parents=True)
    (root / "longbench_mini/config/dataset2prompt.json").write_text(json.dumps(PROMPTS))
    (root / "longbench_mini/config/dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(PROMPTS, 4)))
    rows = [{"_id": f"q{i}", "context": "long " * 8, "input": f"Who {i}?", "answers": ["me"]} for i in range(3)]
    for name in longbench.NAMES:
        more = {"all_classes": ["me", "you"] if name == "trec" else None}
        text = "".join(json.dumps({**row, **more}) + "\n" for row in rows)
        (root / f"longbench_mini/{name}.jsonl").write_text(text)
    (root / "synthwiki").mkdir()
    lines = [f'"Person {i} lives in town {i}.","Where does {i} live?",town {i} | city {i}' for i in range(9)]
    (root / "synthwiki/madlibs1.csv").write_text("context,question,answer\n" + "\n".join(lines) + "\n")
    (root / "zeroscrolls_src").mkdir()
    query = {"query": "Who spoke?", "answer": "Ann."}
    meeting = {
        "general_query_list": [query],
        "specific_query_list": [{**query, "query": "Why?"}],
        "meeting_transcripts": [{"speaker": "Ann", "content": "Hello."}, {"speaker": "Bob", "content": "Bye."}],
    }
    (root / zeroscrolls.FILE).write_text(f"{json.dumps(meeting)}\n{json.dumps(meeting)}\n")
    monkeypatch.setenv("KVREPRO_DATA_DIR", str(root))
    return root


def test_longbench_task(data: Path) -> None:
    found = longbench.load("qasper", 2)
    assert [each.id for each in found.samples] == ["q0", "q1"]
    assert found.samples[0].prompt == f"Read.\n\n{'long ' * 8}\n\nAnswer qasper: Who 0?\nAnswer:"
    assert (found.samples[0].max_new_tokens, found.metric, found.data) == (4, "qa_f1", "longbench_mini/qasper")
    assert found.chat and not found.first_line and not found.stop_at_newline
    assert longbench.load("trec").samples[0].all_classes == ("me", "you")
    assert longbench.load("samsum").stop_at_newline and longbench.load("triviaqa").first_line
    assert [name for name in longbench.NAMES if not longbench.load(name).chat] == [
        "trec",
        "triviaqa",
        "samsum",
        "lcc",
        "repobench-p",
    ]
    before = found.sha256
    (data / "longbench_mini/config/dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(PROMPTS, 5)))
    assert longbench.load("qasper").sha256 != before


def test_the_whole_benchmark_comes_before_the_small_one(data: Path) -> None:
    (data / "longbench_mini").rename(data / "longbench")
    assert longbench.load("qasper").data == "longbench/qasper"


QASPER = "longbench_mini/qasper.jsonl"
CONFIG = "longbench_mini/config/dataset2"
COLUMNS = "one JSON object a line with input (a string), context (a string), answers (a list)"


def _text(name: str, text: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda root: (root / QASPER).unlink(), [f"{QASPER} is missing; it should be {COLUMNS}"]),
        (_text(QASPER, '{"input": "a"'), [f"{QASPER} is damaged: line 1 is no JSON ", f"; it should be {COLUMNS}"]),
        (_text(QASPER, '{"input": "a", "answers": []}'), [f"{QASPER} is damaged: line 1 lacks context (a string); it"]),
        (_text(QASPER, "[]"), [f"{QASPER} is damaged: line 1 lacks input (a string), context", COLUMNS]),
        (
            _text(QASPER, '{"input": "", "context": "", "answers": []}'),
            [f"{QASPER} is damaged: sample 1 has no answer"],
        ),
        (lambda root: (root / QASPER).write_bytes(b"\xff"), [f"{QASPER} is damaged: byte 0 is not UTF-8", COLUMNS]),
        (_text(f"{CONFIG}prompt.json", "{}"), [f"{CONFIG}prompt.json is damaged: no such entry for qasper"]),
        (
            _text(f"{CONFIG}maxlen.json", '{"qasper": "x"}'),
            [f"{CONFIG}maxlen.json is damaged: no such entry for qasper; it should be one"],
        ),
        (
            _text(f"{CONFIG}prompt.json", '{"qasper": "{question}"}'),
            [f"{CONFIG}prompt.json is damaged: the prompt of qasper asks for 'question'; it should be prompts with"],
        ),
        (
            _text(f"{CONFIG}maxlen.json", "{"),
            [f"{CONFIG}maxlen.json", "from a task's name to a whole number of tokens"],
        ),
        (
            _text("MANIFEST.md", f"| {QASPER} | 5 | {'0' * 64} |\n"),
            [f"{QASPER} is damaged: ", "MANIFEST.md says 5 bytes with sha256 0000", COLUMNS],
        ),
    ],
)
def test_missing_and_damaged_longbench(data: Path, damage: Callable[[Path], Any], parts: list[str]) -> None:
    damage(data)
    with pytest.raises(ValueError) as caught:
        longbench.load("qasper")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("load", "name", "text", "message"),
    [
        (zeroscrolls.load, zeroscrolls.FILE, "{}", "qmsum_test.jsonl is damaged: line 1 lacks general_query_list"),
        (
            zeroscrolls.load,
            zeroscrolls.FILE,
            '{"general_query_list": [{"query": "a"}], "specific_query_list": [], "meeting_transcripts": []}',
            "lacks 'answer'; it should be QMSum's: queries with query and answer",
        ),
        (
            partial(synthwiki.load, "madlibs1", Letters(), 99),
            "synthwiki/madlibs1.csv",
            "context,a\n",
            "it should be a CSV",
        ),
        (
            partial(synthwiki.load, "madlibs1", Letters(), 99),
            "synthwiki/madlibs1.csv",
            "context,question,answer\nonly\n",
            "line 2 lacks a column; it should be a CSV",
        ),
    ],
)
def test_damaged_others(data: Path, load: Callable[[], Task], name: str, text: str, message: str) -> None:
    (data / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load()
    (data / name).unlink()
    with pytest.raises(ValueError, match=f"{Path(name).name} is missing; it should be"):
        load()


def test_no_folder_and_unknown_task() -> None:
    with pytest.raises(ValueError, match="KVREPRO_DATA_DIR names, which is not set"):
        longbench.load("qasper")
    with pytest.raises(ValueError, match="longbench has no task 'quasper'; tasks are narrativeqa, qasper"):
        longbench.load("quasper")


def test_zeroscrolls_takes_queries_from_all_meetings_in_turn(data: Path) -> None:
    found = zeroscrolls.load()
    assert [each.id for each in found.samples] == ["0-0", "1-0", "0-1", "1-1"]
    assert [each.document for each in found.samples] == ["0", "1", "0", "1"]
    first = found.samples[0]
    assert "Transcript:\nAnn: Hello.\nBob: Bye.\n\nQuery:\nWho spoke?\n\nAnswer:\n" in first.prompt
    short = cut(Letters(), first, len(first.prompt) - 1)  # type: ignore[arg-type]
    assert short.endswith("... [The rest of the transcript is omitted]\n\nQuery:\nWho spoke?\n\nAnswer:\n")
    assert len(short) == len(first.prompt) - 1


def test_synthwiki_puts_the_biography_among_others(data: Path) -> None:
    load = partial(synthwiki.load, "madlibs1", Letters())
    found = load(100, seed=3)
    assert len(found.samples) == 9
    for each in found.samples:
        assert each.prompt.count("DOCUMENT: ") == 4  # of 25 letters each
        assert f"Person {each.id} lives in town {each.id}." in each.prompt
        assert f"### Question\nWhere does {each.id} live?" in each.prompt
        assert each.answers == (f"town {each.id}", f"city {each.id}")
    assert found == load(100, seed=3)
    assert [each.id for each in load(100, 4, seed=3).samples] == [each.id for each in found.samples[:4]]
    assert load(100, seed=4).sha256 != found.sha256
    with pytest.raises(ValueError, match="no room for one biography of about 25 tokens"):
        load(10)


# --- generators


@pytest.mark.parametrize("name", ruler.NAMES)
def test_generators_fill_the_length_and_follow_the_seed(name: str) -> None:
    load = partial(ruler.load, name, Letters())
    found = load(2000, 3, seed=1)
    assert found == load(2000, 3, seed=1)
    assert found.sha256 != load(2000, 3, seed=2).sha256
    assert len({each.prompt for each in found.samples}) == 3
    for short, long in zip(found.samples, load(3000, 3, seed=1).samples, strict=True):
        assert short.answers == long.answers  # the length changes nothing else
        assert 2000 - 100 < len(short.prompt) + len(short.lead) + short.max_new_tokens <= 2000
        assert all(short.prompt.count(answer) >= 1 for answer in short.answers)
        assert metrics.share_found(short.reference, short.answers) == 1.0
    with pytest.raises(ValueError, match="length=100 has no room"):
        load(100)


def test_needles() -> None:
    counts = {"niah_single": (1, 1), "niah_multikey": (4, 1), "niah_multivalue": (4, 4), "niah_multiquery": (4, 4)}
    for name, (needles, answers) in counts.items():
        found = ruler.load(name, Letters(), 3000, 1).samples[0]  # type: ignore[arg-type]
        lines = found.prompt.split("\n")[1:-1]
        hidden = [line for line in lines if line != ruler.NOISE]
        assert (len(hidden), len(found.answers)) == (needles, answers)
        assert all(line.startswith("One of the special magic numbers for ") for line in hidden)
    distracted = ruler.load("niah_distractors", Letters(), 3000, 1).samples[0]  # type: ignore[arg-type]
    key = distracted.lead.removeprefix(" The special magic number for ").split(" ")[0]
    (line,) = [line for line in distracted.prompt.split("\n")[1:-1] if f" {key} " in line]
    assert line.endswith(f": {distracted.answers[0]}.")
    assert ruler.NOISE not in distracted.prompt


@given(depths=st.lists(st.floats(0, 1), min_size=1, max_size=5), lines=st.integers(1, 20))
def test_needles_are_at_their_depths(depths: list[float], lines: int) -> None:
    needles = [f"needle {i}" for i in range(len(depths))]
    text = ruler._spread(["straw"] * lines, needles, depths).split("\n")
    assert [line for line in text if line != "straw"] == needles
    for i, depth in enumerate(sorted(depths)):
        assert text[: text.index(f"needle {i}")].count("straw") == round(depth * lines)


def test_variables_form_one_chain() -> None:
    found = ruler.load(ruler.TRACKING, Letters(), 3000, 1).samples[0]  # type: ignore[arg-type]
    links = [line.split() for line in found.prompt.split("\n") if line.startswith("VAR ")]
    value = found.lead.split(" the value ")[1].split(",")[0]
    assert links[0] == ["VAR", found.answers[0], "=", value]
    for before, after, link in zip(found.answers, found.answers[1:], links[1:], strict=False):
        assert link == ["VAR", after, "=", "VAR", before]
    assert len(links) == len(found.answers) == ruler.HOPS + 1


# --- running


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The tiny model, which reads and writes letters, in place of the embedded one."""
    model = kvrepro.prepare(tiny_model(dtype=torch.float32))
    monkeypatch.setattr(Bench, "load", lambda self: (model, Letters()))
    return model


@torch.no_grad()
def test_log_likelihood_and_writing_are_the_model_s_own(tiny: PreTrainedModel) -> None:
    prompt, answer = torch.arange(1, 41)[None], torch.tensor([[7, 9, 11]])
    full = partial(kvrepro.make_cache, tiny, "full")
    logits = tiny(input_ids=torch.cat([prompt, answer], dim=1)).logits[:, 39:-1].log_softmax(-1)
    expected = float(logits.gather(-1, answer[..., None]).mean())
    assert log_likelihood(tiny, prompt, answer, full()) == pytest.approx(expected, abs=1e-5)
    written = kvrepro.generate(tiny, prompt, full(), 12)[0, 40:].tolist()
    assert write(tiny, prompt, full(), 12, []) == written
    assert write(tiny, prompt, full(), 1, []) == written[:1]
    assert write(tiny, prompt, full(), 12, [written[0]]) == []
    stop = next(token for token in written if token != written[0])
    assert write(tiny, prompt, full(), 12, [stop]) == written[: written.index(stop)]
    assert write(tiny, prompt, full(), 12, [written[0]], at_least_one=True)[:1] not in ([], written[:1])
    merged = partial(kvrepro.make_cache, tiny, "h2o", budget=16)
    assert write(tiny, prompt, merged(), 12, []) == kvrepro.generate(tiny, prompt, merged(), 12)[0, 40:].tolist()


@pytest.mark.parametrize("chunk", [None, 16])
def test_log_likelihood_is_over_the_prompt_compressed_once(tiny: PreTrainedModel, chunk: int | None) -> None:
    ids = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    found = kvrepro.fidelity(tiny, ids, "h2o", 20, context=48, continuation=12, chunk=chunk)
    with torch.no_grad():
        mean = log_likelihood(tiny, ids[:, :48], ids[:, 48:], kvrepro.make_cache(tiny, "h2o", budget=20), chunk)
    assert mean == pytest.approx(-float(found.nll.double().mean()), abs=1e-5)
    assert mean != pytest.approx(-float(found.nll_full.double().mean()), abs=1e-2)


@pytest.mark.parametrize(("first_line", "score"), [(True, 1.0), (False, 2 / 3)])  # {7} or {7, no} against {7}
def test_first_line_is_scored(
    tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, first_line: bool, score: float
) -> None:
    monkeypatch.setattr("kvrepro.tasks.run.write", lambda *a, **k: Letters()("\n\n7\nno").input_ids)
    asked = task(sample(), first_line=first_line)
    (record,) = run([asked], "full", None)
    assert record.value.value == pytest.approx(100 * score)
    assert record.value.extra["texts"] == ["\n\n7\nno"]


def test_end_tokens(tiny: PreTrainedModel) -> None:
    assert end_tokens(tiny, Letters(), task(sample())) == []  # type: ignore[arg-type]
    assert end_tokens(tiny, Letters(), task(sample(), stop_at_newline=True)) == [96]  # type: ignore[arg-type]


def test_run_records_each_sample_and_compares_methods(data: Path, tiny: PreTrainedModel) -> None:
    tasks = [longbench.load("qasper"), longbench.load("trec", 2)]
    records = run(tasks, ["full", "h2o", "kvmerger(sigma=5.0)"], 0.5, reading=Reading(max_length=60))
    assert [record.status for record in records] == ["ok"] * 6
    first, other = records[:2]
    assert first.cell.budget is None and other.cell.budget == 0.5
    assert other.cell.data_sha256 == tasks[0].sha256 and other.cell.params["task"] == "qasper"
    extra = other.value.extra
    assert other.value.n == len(extra["scores"]) == len(extra["loglik"]) == 3
    assert extra["ids"] == ["q0", "q1", "q2"] and extra["tokens"] == [60, 60, 60]
    assert all(value < 0 for value in extra["loglik"]) and all(len(text) == 4 for text in extra["texts"])
    assert other.value.value == pytest.approx(100 * sum(extra["scores"]) / 3)
    assert extra["loglik"] != first.value.extra["loglik"]
    found = compare(first, other)
    differences = [b - a for a, b in zip(first.value.extra["loglik"], extra["loglik"], strict=True)]
    assert found.loglik.mean == pytest.approx(sum(differences) / 3)
    assert compare(first, first).loglik == intervals.Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no samples in common"):
        compare(first, records[3])
    again = run(tasks, ["full", "h2o"], 0.5, reading=Reading(max_length=60))
    assert [record.key for record in again[:2]] == [record.key for record in records[:2]]


def test_task_without_samples_is_skipped_with_the_reason(data: Path, tiny: PreTrainedModel) -> None:
    (data / QASPER).write_text("\n")
    empty, full = run([longbench.load("qasper"), longbench.load("trec", 1)], "full", None)
    assert (empty.status, empty.reason) == ("skipped", "longbench_mini/qasper has no samples")
    assert empty.value.value is None and full.status == "ok"
    with pytest.raises(ValueError, match="no samples in common"):
        compare(empty, empty)


def test_every_suite_runs(data: Path, tiny: PreTrainedModel) -> None:
    letters: Any = Letters()
    short = replace(zeroscrolls.load(samples=1), samples=(replace(zeroscrolls.load().samples[0], max_new_tokens=3),))
    tasks = [short, synthwiki.load("madlibs1", letters, 60, 1), ruler.load("niah_single", letters, 800, 1)]
    records = run(tasks, "weightedkv", 40, reading=Reading(chunk=64))
    assert [(record.cell.experiment, record.status) for record in records] == [
        ("zeroscrolls", "ok"),
        ("synthwiki", "ok"),
        ("ruler", "ok"),
    ]


# --- command


@pytest.fixture
def kv(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["eval", *words])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_command(data: Path, tiny: PreTrainedModel, kv: Callable[..., tuple[int, str, str]]) -> None:
    (data / "longbench_mini/lcc.jsonl").write_text("")
    tasks = ("--task", "qasper", "--task", "lcc", "--task", "trec")
    words = ("longbench", *tasks, "--method", "full", "--method", "h2o", "--budget", "0.5", "--max-length", "60")
    code, out, err = kv(*words)
    assert code == 0, err
    assert "lcc                    full                     skipped: longbench_mini/lcc has no samples" in out
    assert "qasper: h2o - full: score " in out and "lcc: " not in out
    assert "mean of 2 tasks: full " in out
    found = json.loads(kv(*words, "--json")[1])
    assert [row["status"] for row in found["results"]] == ["ok", "ok", "skipped", "skipped", "ok", "ok"]
    assert found["means"]["h2o"]["tasks"] == 2
    assert [row["task"] for row in found["differences"]] == ["qasper", "trec"]
    code, out, _ = kv("ruler", "--method", "full", "--length", "480", "-n", "1")
    assert code == 0 and out.startswith("niah_single") and "n=1" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("longbench", "--task", "quasper"), "longbench has no task 'quasper'"),
        (("longbench", "--max-length", "1"), "max_length=1 2 or more"),
        (("longbench", "--method", "h3o"), "unknown method 'h3o'"),
        (("ruler", "--method", "weightedkv", "--budget", "3"), "sinks + recent + 1"),
        (("ruler", "-n", "0"), "samples=0 must be 1 or more"),
        (("ruler", "--length", "20"), "length=20 has no room"),
        (("ruler", "--chunk", "0"), "chunk=0 must be 1 or more"),
        (("zeroscrolls",), "KVREPRO_DATA_DIR"),
        (("synthwiki",), "KVREPRO_DATA_DIR"),
    ],
)
def test_bad_requests_never_load_a_model(
    kv: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(Bench, "load", lambda self: pytest.fail("the model was loaded"))
    code, _, err = kv(*words, *(() if "--method" in words else ("--method", "h2o")))
    assert code == 2
    assert message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("suite", ["longbench", "zeroscrolls", "synthwiki", "ruler"])
def test_help_has_an_example(kv: Callable[..., tuple[int, str, str]], suite: str) -> None:
    code, out, _ = kv(suite, "--help")
    assert code == 0 and f"Example:\n    kvrepro eval {suite} --" in out


@pytest.mark.timeout(120)
def test_embedded_model_finds_a_needle_and_a_small_cache_lowers_its_log_likelihood(
    embedded: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "load", lambda self: embedded)
    found = ruler.load("niah_single", embedded[1], 320, 1)
    short = replace(found, samples=tuple(replace(each, max_new_tokens=8) for each in found.samples))
    full, small = run([short], ["full", "streaming_llm"], 32)
    assert full.value.value == 100.0 and found.samples[0].answers[0] in full.value.extra["texts"][0]
    assert full.value.extra["loglik"][0] > -0.5 > small.value.extra["loglik"][0]
