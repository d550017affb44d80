"""The model for lm-evaluation-harness: its numbers beside the harness's own ``hf``, and its command line."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import kvrepro
from kvrepro import models
from kvrepro.adapter import cache_arguments
from kvrepro.cli import main
from kvrepro.lm_eval import CompressedLM

TASKS = ("kv_choice", "kv_text", "kv_write")
TEXT = "the old cache of keys keeps what the new queries of the book still want to know about its values"
WORDS = TEXT.split()
MAX_LENGTH = 48


def sentence(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + 5 * i * i + i) % len(WORDS)] for i in range(length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights and a tokenizer of its own, as a folder."""
    found = tmp_path_factory.mktemp("model")
    plain = Tokenizer(BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} & {*"Ġabcdefghijklmnopqrstuvwxyz"})
    trainer = trainers.BpeTrainer(vocab_size=97, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    plain.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(found)
    tiny_model(dtype=torch.float32).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over local files: choices (of several tokens and of one), texts longer than a window, and writing."""
    found = tmp_path_factory.mktemp("tasks")
    questions = [
        {"question": sentence(i, 8 + 20 * (i // 2)), "choices": [" the", " book of", " keys"], "answer": i % 3}
        for i in range(6)
    ]
    texts = [{"text": sentence(i, 5 + 40 * i)} for i in range(3)]
    scored = {
        "kv_choice": ("multiple_choice", "question", "answer", questions, {"doc_to_choice": "{{choices}}"}),
        "kv_text": ("loglikelihood_rolling", None, "text", texts, {}),
        "kv_write": (
            "generate_until",
            "question",
            "answer",
            questions,
            {"generation_kwargs": {"until": ["s"], "max_gen_toks": 12}},
        ),
    }
    metrics = {"kv_choice": "acc", "kv_text": "word_perplexity", "kv_write": "exact_match"}
    for name, (kind, asked, answer, rows, more) in scored.items():
        data = found / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(found / "cache")},
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": "" if asked is None else f"{{{{{asked}}}}}",
            "doc_to_target": f"{{{{{answer}}}}}",
            "metric_list": [{"metric": metrics[name]}],
            **more,
        }
        (found / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return found


Measure = Callable[..., dict[str, list[Any]]]


@pytest.fixture(scope="module")
def measure(folder: Path, tasks: Path) -> Measure:
    """Evaluate the tasks with a model of the harness; what it answered, in the order of the samples."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    @functools.cache
    def call(model: str, batch_size: int = 1, chat: bool = False, names: tuple[str, ...] = TASKS, **args: Any) -> Any:
        found = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": str(folder), "dtype": "float32", "max_length": MAX_LENGTH, **args},
            tasks=list(names),
            batch_size=batch_size,
            device="cpu",
            task_manager=manager,
            bootstrap_iters=0,
            apply_chat_template=chat,
        )
        samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
        return {name: [row["filtered_resps"] for row in rows] for name, rows in samples.items()}

    return call


def numbers(found: dict[str, list[Any]], name: str) -> torch.Tensor:
    """All log-likelihoods of a task, and whether each is the greedy answer."""
    flat = [x for row in found[name] for answer in row for x in (answer if isinstance(answer, tuple) else (answer,))]
    return torch.tensor([float(x) for x in flat], dtype=torch.float64)


def same(a: dict[str, list[Any]], b: dict[str, list[Any]]) -> None:
    """The same answers to rounding, and the same texts."""
    for name in set(a) - {"kv_write"}:
        torch.testing.assert_close(numbers(a, name), numbers(b, name), atol=1e-4, rtol=1e-5)
    assert a.get("kv_write") == b.get("kv_write")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_full_cache_gives_the_numbers_of_hf(measure: Measure, batch_size: int) -> None:
    expected = measure("hf")
    assert {len(rows) for rows in expected.values()} == {6, 3}
    same(measure("kvrepro", batch_size), expected)
    same(measure("kvrepro", batch_size, chunk=7), expected)


def test_chat_templates_are_those_of_hf(measure: Measure) -> None:
    names = ("kv_choice", "kv_write")
    chat = measure("kvrepro", chat=True, names=names)
    same(chat, measure("hf", chat=True, names=names))
    assert chat["kv_write"] != measure("kvrepro", names=("kv_write",))["kv_write"]


@pytest.mark.parametrize(
    "args",
    [
        {"method": "weightedkv", "budget": 8, "recent": 2},
        {"method": "h2o", "budget": 0.6, "sinks": 1, "recent": 1},
        {"method": "snapkv", "budget": 8, "window": 2, "chunk": 5},
    ],
    ids=lambda args: args["method"],
)
def test_the_batch_size_does_not_matter(measure: Measure, args: dict[str, Any]) -> None:
    alone, together = measure("kvrepro", 1, **args), measure("kvrepro", 4, **args)
    same(alone, together)
    full = measure("kvrepro")
    assert all(alone[name] != full[name] for name in TASKS)


@pytest.fixture
def model(folder: Path) -> Callable[..., CompressedLM]:
    def load(**args: Any) -> CompressedLM:
        return CompressedLM(str(folder), device="cpu", max_length=MAX_LENGTH, **args)

    return load


class Asked:
    """A request of the harness: all that a model looks at."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.task_name = "asked"


def test_a_continuation_is_scored_over_the_context_compressed_once(model: Callable[..., CompressedLM]) -> None:
    lm = model(method="weightedkv", budget=8, recent=2)
    context, target = sentence(3, 12), " the book of keys"
    (found, _), (again, _) = lm.loglikelihood([Asked(context, target)] * 2, disable_tqdm=True)
    before, ids = lm.tok_encode(context), lm.tok_encode(target)
    cache = kvrepro.make_cache(lm.model, "weightedkv", budget=8, recent=2)
    logits = lm.model(torch.tensor([before]), **cache_arguments(lm.model, cache)).logits[:, -1:]
    cache.freeze()
    rest = lm.model(torch.tensor([ids[:-1]]), **cache_arguments(lm.model, cache)).logits
    logp = torch.cat([logits, rest], dim=1)[0].log_softmax(-1)
    assert len(ids) > 3
    assert found == again == pytest.approx(float(sum(logp[i, token] for i, token in enumerate(ids))), abs=1e-4)
    best, worst = int(logits.argmax()), int(logits.argmin())
    asked = [(("", ""), before, [token]) for token in (best, worst)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(asked, disable_tqdm=True)] == [True, False]


def test_a_text_is_read_token_by_token_in_windows(model: Callable[..., CompressedLM]) -> None:
    lm = model(method="weightedkv", budget=8, recent=2)
    text = sentence(1, 70)
    ids = lm.tok_encode(text)
    assert MAX_LENGTH < len(ids) < 2 * MAX_LENGTH
    windows = [([lm.prefix_token_id, *ids[:MAX_LENGTH]], MAX_LENGTH), (ids[-MAX_LENGTH - 1 :], len(ids) - MAX_LENGTH)]
    total = 0.0
    for window, scored in windows:
        cache = kvrepro.make_cache(lm.model, "weightedkv", budget=8, recent=2)
        for i, token in enumerate(window[:-1]):
            logp = lm.model(torch.tensor([[token]]), **cache_arguments(lm.model, cache)).logits[0, -1].log_softmax(-1)
            if i + 1 >= len(window) - scored:
                total += float(logp[window[i + 1]])
        assert cache.layers[0].keys.shape[2] == 8
    assert lm.loglikelihood_rolling([Asked(text)], disable_tqdm=True) == [pytest.approx(total, abs=1e-3)]


def test_what_is_written_is_what_generate_writes(model: Callable[..., CompressedLM]) -> None:
    lm = model(method="weightedkv", budget=8, recent=2, batch_size=4)
    prompts = [sentence(i, 8 + i) for i in range(3)]
    asked = [Asked(prompt, {"until": ["zzz"], "max_gen_toks": 9}) for prompt in prompts]
    written = lm.generate_until(asked, disable_tqdm=True)
    for prompt, text in zip(prompts, written, strict=True):
        inputs = lm.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        cache = kvrepro.make_cache(lm.model, "weightedkv", budget=8, recent=2)
        out = lm.model.generate(**inputs, past_key_values=cache, max_new_tokens=9, do_sample=False)
        assert text == lm.tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    stop = written[0][2:4]
    short = lm.generate_until([Asked(prompts[0], {"until": [stop], "max_gen_toks": 9})], disable_tqdm=True)
    assert short == [written[0].split(stop)[0]]


def test_sampling_is_as_asked(model: Callable[..., CompressedLM]) -> None:
    lm = model(method="h2o", budget=8)
    asked = [Asked(sentence(0, 9), {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12, "until": ["zzz"]})]
    torch.manual_seed(0)
    first = lm.generate_until(asked, disable_tqdm=True)
    second = lm.generate_until(asked, disable_tqdm=True)
    torch.manual_seed(0)
    assert lm.generate_until(asked, disable_tqdm=True) == first != second


@pytest.mark.parametrize(
    "args, message",
    [
        ({"method": "h2o", "sigma": 3.0}, "sinks"),
        ({"method": "h3o"}, "weightedkv"),
        ({"method": "streaming_llm", "budget": 2}, "raise the budget"),
        ({"batch_size": "auto"}, "give the number of rows"),
        ({"batch_size": 0}, "give the number of rows"),
        ({"chunk": 0}, "1 or more"),
        ({"dtype": "auto"}, "bfloat16"),
    ],
)
def test_bad_arguments_say_what_is_valid(model: Callable[..., CompressedLM], args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**args)


def test_arguments_of_the_model_win_over_the_harness_s_own(folder: Path) -> None:
    harness = {"batch_size": 1, "max_batch_size": None, "device": "cuda:7"}
    given = f"pretrained={folder},method=h2o,budget=0.25,device=cpu,batch_size=3"
    lm = CompressedLM.create_from_arg_string(given, harness)
    assert (lm.batch_size, lm.device.type) == (3, "cpu")
    assert lm._new_cache().budget == 0.25
    assert lm.get_model_info()["model_sha"] == models.identity(str(folder))
    slots = CompressedLM.create_from_arg_string(given.replace("0.25", "16"), harness)._new_cache().budget
    assert slots == 16 and isinstance(slots, int)


def test_a_continuation_longer_than_the_window(model: Callable[..., CompressedLM]) -> None:
    with pytest.raises(ValueError, match=f"max_length={MAX_LENGTH}"):
        model().loglikelihood([Asked("the", sentence(0, 60))], disable_tqdm=True)


def command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of ``kvrepro lm-eval``."""
    monkeypatch.setattr(sys, "argv", ["kvrepro"])
    with pytest.raises(SystemExit) as caught:
        main(["lm-eval", *words])
    return int(caught.value.code or 0)


def test_the_command(
    folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness reads the thousands of files of its own tasks otherwise.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    given = f"pretrained={folder},method=weightedkv,budget=0.75,sinks=1,recent=1,max_length={MAX_LENGTH}"
    words = ["--model", "kvrepro", "--model_args", given, "--tasks", "kv_choice", "--include_path", str(tasks)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command([*words, "--batch_size", "4"], monkeypatch) == 0
    assert "|kv_choice|" in capsys.readouterr().out
    words[3] = f"pretrained={folder},method=weightedkv,sigma=3.0"
    assert command(words, monkeypatch) == 2
    assert "sigma" in capsys.readouterr().err


def test_help_is_the_harness_s_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(["--help"], monkeypatch) == 0
    assert "Language Model Evaluation Harness" in capsys.readouterr().out


def test_without_the_harness() -> None:
    """The package does not import it, and the command says how to get it."""
    code = """if True:
        import sys
        from kvrepro.cli import main
        assert "lm_eval" not in sys.modules
        sys.modules["lm_eval"] = None
        main(["lm-eval"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'kvrepro[lm-eval]'" in done.stderr
