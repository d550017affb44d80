"""The command line: what it prints, its exit codes, and its one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from book_project import make_project
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvrepro
from kvrepro import assets, cli, executors, methods
from kvrepro.cli import main
from kvrepro.compare import compare
from kvrepro.records import Cell, Store, Value

Output = tuple[int, str, str]


@pytest.fixture
def kv(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process: exit code, standard output, standard error."""

    def call(*words: str) -> Output:
        with pytest.raises(SystemExit) as caught:
            main(words)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def store(folder: Path, values: dict[int, tuple[float | None, float | None]]) -> Path:
    """A record store: value and spread by seed."""
    records = Store(folder)
    for seed, (value, spread) in values.items():
        cell = Cell(
            paper="p", experiment="e", metric="m", model="x", model_sha256="0", data="d", data_sha256="0", seed=seed
        )
        records.measure(cell, lambda value=value, spread=spread: Value(value, spread))
    return folder


class TestHelp:
    def test_every_command_explains_itself(self, kv: Any) -> None:
        code, out, _ = kv("--help")
        assert code == 0
        for command in ("methods", "run", "eval", "recommend", "build", "compare", "ledger", "doctor", "fetch"):
            assert command in out
            code, text, _ = kv(command, "--help")
            assert code == 0 and "Usage: kvrepro" in text
        for command in ("run", "build", "compare", "doctor"):
            assert "Example" in kv(command, "--help")[1]
        evaluations = ("ppl", "fidelity", "needle", "longbench", "zeroscrolls", "synthwiki", "ruler")
        listed = kv("eval", "--help")[1]
        for command in evaluations:
            assert f"  {command} " in listed
            assert f"kvrepro eval {command}" in kv("eval", command, "--help")[1].split("Example")[1]

    def test_version(self, kv: Any) -> None:
        assert kv("--version")[:2] == (0, f"kvrepro, version {kvrepro.__version__}\n")

    def test_module_is_the_command(self) -> None:
        done = subprocess.run([sys.executable, "-m", "kvrepro", "nothing"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "No such command 'nothing'" in done.stderr


class TestMethods:
    def test_list(self, kv: Any) -> None:
        code, out, _ = kv("methods")
        assert code == 0
        assert all(f"\n{name} " in out for name in methods.names())

    def test_one(self, kv: Any) -> None:
        code, out, _ = kv("methods", "kvmerger")
        assert code == 0 and "epsilon" in out and "second-hand" in out

    def test_json(self, kv: Any) -> None:
        assert [each["name"] for each in json.loads(kv("methods", "--json")[1])] == methods.names()
        one = json.loads(kv("methods", "weightedkv", "--json")[1])
        assert {option["name"] for option in one["options"]} >= {"sinks", "recent", "positions", "seed", "merge"}

    def test_unknown(self, kv: Any) -> None:
        code, out, err = kv("methods", "h3o")
        assert code == 2 and out == ""
        assert err.startswith("error: unknown method 'h3o'") and "weightedkv" in err
        assert len(err.splitlines()) == 1


class TestErrors:
    def test_debug_shows_where(self) -> None:
        with pytest.raises(ValueError, match="unknown method"):
            main(["methods", "h3o", "--debug"])

    def test_usage(self, kv: Any) -> None:
        assert kv("methods", "--nothing")[0] == 2
        assert kv("eval", "ppl", "h2o", "--budget", "0")[0] == 2
        assert kv("eval", "ppl", "h2o", "--budget", "1.5")[0] == 2
        assert kv("build", "--profile", "fast")[0] == 2

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["eval", "ppl", "h3o"], "unknown method"),
            (["eval", "ppl", "h2o", "-o", "size=3"], "has no option size"),
            (["eval", "ppl", "h2o", "-o", "size"], "name=value"),
            (["eval", "ppl", "weightedkv", "--budget", "3"], "sinks + recent + 1"),
            (["eval", "ppl", "h2o", "--text", "news"], "unknown text 'news'"),
            (["eval", "needle", "h2o", "--depth", "2"], "a depth is from 0"),
            (["eval", "ppl", "h2o", "-n", "0"], "1 or more"),
        ],
    )
    def test_bad_requests_never_load_a_model(
        self, kv: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
    ) -> None:
        monkeypatch.setattr(kvrepro, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
        code, _, err = kv(*words)
        assert code == 2
        assert message in err and "Traceback" not in err

    def test_stopping(self, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(assets, "fetch", stop)
        code, _, err = kv("fetch")
        assert code == 130 and "stopped" in err

    def test_failure(self, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise assets.AssetError("no network; try again")

        monkeypatch.setattr(assets, "fetch", fail)
        assert kv("fetch") == (1, "", "error: no network; try again\n")


class TestRunAndBuild:
    @pytest.fixture(autouse=True)
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVREPRO_ROOT", str(make_project(tmp_path / "project").root))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["run", "demo/size"], "there are demo/sizes, demo/words"),
            (["run", "demo/sizes", "sizes=3"], "has no parameter sizes; it has budgets=[64, 128], size=3"),
            (["run", "demo/sizes", "size=abc"], "size='abc' is not valid"),
            (["run", "demo/sizes", "3"], "name=value"),
            (["build", "-n", "nothing"], "unknown notebook 'nothing'"),
        ],
    )
    def test_bad_requests(self, kv: Any, words: list[str], message: str) -> None:
        code, _, err = kv(*words)
        assert code == 2
        assert message in err and len(err.splitlines()) == 1

    @pytest.mark.parametrize("words", [("run", "demo/sizes"), ("build",), ("eval", "needle", "h2o"), ("eval", "ruler")])
    def test_executors(self, kv: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
        code, _, err = kv(*words, "--executor", "dask://nowhere")
        assert code == 2 and "write local, stored, or dask://HOST:PORT" in err
        monkeypatch.setenv("KVREPRO_EXECUTOR", "ray://host:1")
        assert kv(*words)[0] == 2

    def test_a_cluster_that_is_not_there_is_noticed_before_anything_runs(
        self, kv: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(executors, "_CONNECT_S", 1)
        monkeypatch.setenv("KVREPRO_EXECUTOR", "local")  # what the option sets does not outlive the test
        code, _, err = kv("run", "demo/sizes", "--executor", "dask://127.0.0.1:1")
        assert code == 1 and "no Dask scheduler answers at tcp://127.0.0.1:1" in err and "[1/1]" not in err

    def test_workers(self, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert kv("build", "--workers", "0")[0] == 2
        code, _, err = kv("build", "--workers", "2", "--executor", "dask://host:1")
        assert code == 2 and "KVREPRO_EXECUTOR is 'dask://host:1', and 2 workers are asked for" in err
        monkeypatch.setenv("KVREPRO_EXECUTOR", "stored")
        assert kv("build", "--workers", "2")[0] == 2
        monkeypatch.setenv("KVREPRO_EXECUTOR", "local")
        monkeypatch.setitem(sys.modules, "distributed", None)
        code, _, err = kv("build", "--workers", "2")
        assert code == 1 and "pip install 'kvrepro[dask]'" in err and len(err.splitlines()) == 1

    def test_no_checkout(self, kv: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("KVREPRO_ROOT", str(tmp_path))
        code, _, err = kv("build")
        assert code == 1 and "clone it" in err


class TestCompare:
    def test_agreement_within_two_standard_errors(self, tmp_path: Path, kv: Any) -> None:
        a = store(tmp_path / "a", {0: (1.0, 0.1), 1: (2.0, None), 2: (None, None), 3: (5.0, None)})
        b = store(tmp_path / "b", {0: (1.25, 0.1), 1: (2.0 + 1e-7, None), 2: (None, None), 4: (5.0, None)})
        found = compare(a, b)
        assert [pair.agrees for pair in found.pairs] == [True, True]
        assert found.pairs[0].tolerance == pytest.approx(2 * 2**0.5 * 0.1)
        assert (len(found.only_a), len(found.only_b), len(found.without_value)) == (1, 1, 1)
        code, out, _ = kv("compare", str(a), str(b), "--all")
        assert code == 0 and "2 cells compared, 0 disagree" in out and "1 only in" in out

    def test_disagreement(self, tmp_path: Path, kv: Any) -> None:
        a, b = store(tmp_path / "a", {0: (1.0, 0.1)}), store(tmp_path / "b", {0: (1.5, 0.1)})
        code, out, _ = kv("compare", str(a), str(b))
        assert code == 1 and "DISAGREES" in out
        assert kv("compare", str(a), str(b / "p.jsonl"), "--rtol", "0.5")[0] == 0
        data = json.loads(kv("compare", str(a), str(b), "--json")[1])
        assert data["pairs"][0]["difference"] == 0.5 and not data["pairs"][0]["agrees"]

    def test_nothing_to_compare(self, tmp_path: Path, kv: Any) -> None:
        a, b = store(tmp_path / "a", {0: (1.0, None)}), store(tmp_path / "b", {1: (1.0, None)})
        assert kv("compare", str(a), str(b))[0] == 1
        code, _, err = kv("compare", str(a), str(tmp_path / "none"))
        assert code == 2 and "does not exist" in err
        (tmp_path / "empty").mkdir()
        assert "no finished record" in kv("compare", str(a), str(tmp_path / "empty"))[2]

    def test_newest_record_counts(self, tmp_path: Path) -> None:
        folder = store(tmp_path / "a", {0: (1.0, None)})
        line = (folder / "p.jsonl").read_text(encoding="utf-8")
        newer = json.loads(line)
        newer["value"]["value"], newer["provenance"]["date"] = 3.0, "2100-01-01T00:00:00+00:00"
        (folder / "q.jsonl").write_text(json.dumps(newer) + "\n", encoding="utf-8")
        assert compare(folder, folder).pairs[0].a.value.value == 3.0


class TestDoctor:
    def test_says_what_is_there(self, kv: Any) -> None:
        code, out, _ = kv("doctor", "--json")
        found = {finding["name"]: finding for finding in json.loads(out)}
        assert {"python", "torch", "memory", "disk", "gpu", "chromium", "profile quick"} <= set(found)
        assert code == (1 if any(finding["state"] == "problem" for finding in found.values()) else 0)

    def test_missing_model_is_a_problem_with_a_command(
        self, kv: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("KVREPRO_CACHE", str(tmp_path / "nothing"))
        code, out, _ = kv("doctor")
        assert code == 1
        assert "missing" in out and "-> kvrepro fetch" in out


class TestEval:
    @pytest.fixture(autouse=True)
    def loaded(
        self, embedded: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kvrepro, "load_model", lambda *a, **k: embedded)

    def test_perplexity(self, kv: Any) -> None:
        small = ("--window", "48", "-n", "2", "--chunk", "16", "--json")
        full = json.loads(kv("eval", "ppl", "full", *small)[1])
        merged = json.loads(kv("eval", "ppl", "weightedkv", "--budget", "16", "-o", "sinks=2 recent=4", *small)[1])
        assert full["stride"] == 24 and full["windows"] == 2
        assert merged["options"]["sinks"] == 2 and merged["budget"] == 16
        assert 1 < full["perplexity"] != merged["perplexity"]

    def test_fidelity(self, kv: Any) -> None:
        small = ("--context", "48", "--continuation", "8", "-n", "2", "--json")
        full = json.loads(kv("eval", "fidelity", "full", *small)[1])
        half = json.loads(kv("eval", "fidelity", "h2o", "--budget", "0.5", *small)[1])
        assert abs(full["kl"]) < 1e-4 and full["bytes"] == full["bytes_full"]
        assert half["kl"] > 0 and half["bytes"] < half["bytes_full"]

    def test_needle(self, kv: Any) -> None:
        code, out, _ = kv("eval", "needle", "h2o", "--budget", "0.5", "--length", "160", "-n", "2")
        assert code == 0
        assert "log_likelihood" in out and "found" in out

    def test_text_shorter_than_the_prompt(self, kv: Any) -> None:
        code, _, err = kv("eval", "needle", "h2o", "--length", "99999999")
        assert code == 2 and "length" in err or "tokens" in err


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(kv: Any, shell: str) -> None:
    code, out, _ = kv("completion", shell)
    assert code == 0 and "_KVREPRO_COMPLETE" in out and f"{shell}_complete" in out
    assert kv("completion", "tcsh")[0] == 2


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("kvrepro me", {"methods"}),
        ("kvrepro methods weigh", {"weightedkv"}),
        ("kvrepro eval ppl kvs", {"kvslimmer"}),
        ("kvrepro run weightedkv/p", {"weightedkv/perplexity"}),
        ("kvrepro build -n kvmerger/ne", {"kvmerger/needle"}),
        ("kvrepro build --profile s", {"smoke"}),
        ("kvrepro eval ruler --task niah_si", {"niah_single"}),
        ("kvrepro eval ruler --method tov", {"tova"}),
    ],
)
def test_the_tab_key_offers(words: str, offered: set[str]) -> None:
    """As bash asks: the words in an environment variable, the offers in lines of kind and word."""
    asked = {"_KVREPRO_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    root = Path(kvrepro.__file__).resolve().parents[1]
    command = [sys.executable, "-c", "from kvrepro.cli import main; main()"]
    done = subprocess.run(command, cwd=root, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert {line.split(",", 1)[1] for line in done.stdout.splitlines()} == offered, done.stderr


def test_the_tab_key_offers_no_notebooks_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVREPRO_ROOT", str(tmp_path))
    assert cli._notebooks() == []
