"""The papers' models and data: the table, the download from a hub on this machine, and who reads what it leaves."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from fake_hub import TOKEN, Hub, Repo, serving
from huggingface_hub import constants
from tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kvrepro import cli, doctor, models, tasks, texts
from kvrepro.book import checks
from kvrepro.book.pages import papers_tables
from kvrepro.book.project import BookError, Project
from kvrepro.doctor import examine
from kvrepro.papers import fetch, hub, table
from kvrepro.papers.convert import CONVERTERS
from kvrepro.papers.table import Dataset, Model
from kvrepro.tasks import longbench, synthwiki, zeroscrolls

OLD, NEW = "a" * 40, "b" * 40
ROOT = Path(__file__).resolve().parent.parent
LONG = "A long line of words.\u2028And what a Unicode reader takes for another.\n" * 30
WIKI_FILE = "wikitext2/wiki.test.raw"
WIKI = " \n = First = \n \n " + "words " * 300 + "\n \n = Second = \n \n " + "others " * 300 + "\n"


# --- a small world in the formats of the real one


def parquet(rows: list[str]) -> bytes:
    buffer = io.BytesIO()
    pandas.DataFrame({"title": range(len(rows)), "text": rows}).to_parquet(buffer)
    return buffer.getvalue()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def longbench_files() -> dict[str, bytes]:
    rows = {name: [{"input": "q", "context": f"about {name}", "answers": ["yes"]}] for name in longbench.NAMES}
    rows["trec"][0]["all_classes"] = ["yes", "no"]
    return {f"data/{name}.jsonl": lines(found) for name, found in rows.items()} | {"data/lsht.jsonl": b"{}\n"}


#: Files of each dataset of the table, by the last part of their path or address.
DATA = {
    "pg19": {"test-00000-of-00001-29a571947c0b5ccc.parquet": parquet(["one " * 400, "two\r\n" * 400])},
    "proof-pile": {
        "proofpile_test.jsonl.gz": gzip.compress(
            lines(
                [
                    {"text": "too short", "meta": '{"config": "arxiv"}'},
                    {"text": LONG, "meta": '{"config": "books"}'},
                    {"text": LONG + "x", "meta": '{"config": "arxiv"}'},
                    {"text": LONG + "y", "meta": {"config": "arxiv"}},
                    {"text": LONG + "one too many", "meta": {"config": "arxiv"}},
                ]
            )
        )
    },
    "openwebtext2": {"test.json": lines([{"text": "short", "meta": {}}, {"text": LONG, "meta": {}}])},
    "wikitext-2": {
        "test-00000-of-00001.parquet": parquet([line if line.strip() else "" for line in WIKI.splitlines(True)])
    },
    "longbench": {
        "data.zip": archive(longbench_files()),
        "dataset2prompt.json": json.dumps(dict.fromkeys(longbench.NAMES, "{context} {input}")).encode(),
        "dataset2maxlen.json": json.dumps(dict.fromkeys(longbench.NAMES, 8)).encode(),
    },
    "synthwiki": {
        f"madlibs{i}.csv": f'context,question,answer\n"{"Ada, " * 300}",Who?,Ada\n"{"Bob, " * 300}",Who?,Bob\n'.encode()
        for i in (1, 2)
    },
    "qmsum": {
        "test.jsonl": lines(
            [
                {
                    "general_query_list": [{"query": "What?", "answer": "That."}],
                    "specific_query_list": [],
                    "meeting_transcripts": [{"speaker": "Ada", "content": "That."}],
                }
            ]
        )
    },
}
WEIGHTS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 60_000 for i in (1, 2)}
MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b'{"words": 1}',
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {str(i): name for i, name in enumerate(WEIGHTS)}}
    ).encode(),
    "README.md": b"not fetched",
    "consolidated.safetensors": b"not fetched " * 10_000,
    "original/params.json": b"{}",
    **WEIGHTS,
}
FETCHED = {name for name in MODEL if name not in ("README.md", "consolidated.safetensors", "original/params.json")}


def small_table(there: Hub) -> dict[str, list[dict[str, Any]]]:
    """The real table with this hub's commits, addresses, sizes and sums, and the hub filled to fit."""
    real = yaml.safe_load(table.TABLE.read_text(encoding="utf-8"))
    datasets = [row for row in real["datasets"] if row["name"] in DATA]
    for row in datasets:
        row["revision"] = OLD
        for file in row["files"]:
            data = DATA[row["name"]][(file.get("path") or file["url"]).rpartition("/")[2]]
            file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            if "url" in file:
                there.raw[f"/{row['name']}/{file['url'].rpartition('/')[2]}"] = data
                file["url"] = f"{there.url}/{row['name']}/{file['url'].rpartition('/')[2]}"
            else:
                repo = there.repos.setdefault(row["repo"], Repo(OLD, {OLD: {}}))
                repo.commits[OLD][file["path"]] = data
        row["gives"] = {WIKI_FILE: hashlib.sha256(WIKI.encode()).hexdigest()} if row["name"] == "wikitext-2" else {}
        if "min_characters" in row.get("options", {}):
            row["options"] |= {"min_characters": len(LONG), "documents": 2}
    model = next(row for row in real["models"] if row["name"] == "llama-2-7b")
    model |= {"repo": "org/tiny", "revision": OLD, "parameters": 60_000, "gated": False}
    there.repos["org/tiny"] = Repo(OLD, {OLD: dict(MODEL)})
    return {"datasets": datasets, "models": [model]}


@pytest.fixture
def there() -> Iterator[Hub]:
    with serving(Hub()) as found:
        yield found


class World:
    """The hub, the table, and the command pointed at both."""

    def __init__(
        self, there: Hub, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.hub, self.path, self.capsys = there, path, capsys
        self.table_file = path / "papers.yml"
        self.table = small_table(there)
        self.save()
        self.data = path / "data"
        monkeypatch.setattr(table, "TABLE", self.table_file)
        monkeypatch.setattr(hub, "_LARGE", 10_000)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is written at a time
        monkeypatch.setattr(constants, "ENDPOINT", there.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", there.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(path / "token"))
        monkeypatch.setenv("KVREPRO_DATA_DIR", str(self.data))
        for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(variable, raising=False)

    def save(self) -> None:
        """Write the table as it is now."""
        self.table_file.write_text(yaml.safe_dump(self.table), encoding="utf-8")
        table.entries.cache_clear()

    @property
    def tiny(self) -> Repo:
        """The model's repository."""
        return self.hub.repos["org/tiny"]

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Run ``kvrepro fetch papers`` in this process: exit code, standard output, standard error."""
        with pytest.raises(SystemExit) as caught:
            cli.main(["fetch", "papers", *words])
        out, err = self.capsys.readouterr()
        return int(caught.value.code or 0), out, err

    def states(self) -> dict[str, str]:
        """State of each entry, from --json."""
        return {entry["name"]: entry["state"] for entry in json.loads(self("--all", "--json")[1])["entries"]}

    def cached(self, name: str, commit: str = OLD) -> Path:
        """A file of the model in the hub's cache."""
        return self.path / "hub" / "models--org--tiny" / "snapshots" / commit / name


@pytest.fixture
def world(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[World]:
    yield World(there, tmp_path, monkeypatch, capsys)
    table.entries.cache_clear()


# --- what it leaves is what the readers take


def test_every_dataset_is_read_by_its_readers(world: World) -> None:
    code, out, err = world(*DATA)
    assert code == 0, err
    assert set(world.states().values()) == {"here", "missing"}  # the model is missing
    assert [len(texts.load("books").documents), texts.load("books").documents[0]] == [2, "one " * 400]
    assert texts.load("math").documents == (LONG + "x", LONG + "y")
    assert texts.load("webtext").documents == (LONG,)
    assert (world.data / "wikitext2/wiki.test.raw").read_text(encoding="utf-8") == WIKI
    assert len(texts.load("wikitext2").documents) == 2
    assert len(texts.load("synthwiki").documents) == 4
    for name in longbench.NAMES:
        (sample,) = longbench.load(name).samples
        assert sample.prompt == f"about {name} q" and sample.max_new_tokens == 8
    assert zeroscrolls.load("qmsum").samples[0].answers == ("That.",)
    assert len(synthwiki._rows("synthwiki/madlibs1.csv")[0]) == 2
    assert not (world.data / "longbench/lsht.jsonl").exists()
    assert not list(world.data.glob(".papers-*"))
    assert f"export KVREPRO_DATA_DIR={world.data}" in out


def test_the_manifest_is_what_the_tasks_check_against_and_keeps_what_others_wrote(world: World) -> None:
    world.data.mkdir()
    (world.data / tasks.base.MANIFEST).write_text("# Mine\n\n| my.txt | 3 | " + "0" * 64 + " |\n", encoding="utf-8")
    world("longbench", "pg19")
    world("qmsum")
    listed = tasks.base._listed(world.data)
    assert {"my.txt", "books/pg19_test_000.txt", "zeroscrolls_src/qmsum_test.jsonl"} <= set(listed)
    text = (world.data / tasks.base.MANIFEST).read_text(encoding="utf-8")
    assert text.startswith("# Mine\n") and text.count("## longbench") == 1
    assert f"emozilla/pg19-test@{OLD}" in text
    (world.data / "longbench/trec.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"trec.jsonl is damaged"):
        longbench.load("trec")


def test_a_second_run_fetches_nothing_and_a_damaged_file_is_made_again(world: World) -> None:
    assert world()[0] == 0
    asked = len(world.hub.sent)
    code, out, _ = world()
    assert code == 0 and "All of it is here" in out and len(world.hub.sent) == asked
    book = world.data / "books/pg19_test_001.txt"
    book.write_text(book.read_text(encoding="utf-8")[:-1] + "?", encoding="utf-8")
    (world.data / "longbench/lcc.jsonl").unlink()
    assert world.states()["pg19"] == world.states()["longbench"] == "damaged"
    assert world()[0] == 0
    assert set(world.states().values()) == {"here"}
    assert world.hub.bytes_sent("data.zip") == len(DATA["longbench"]["data.zip"])  # the archive was still in the cache


def test_files_of_others_are_never_mixed_with_ours(world: World) -> None:
    (world.data / "books").mkdir(parents=True)
    (world.data / "books/mine.txt").write_text("mine", encoding="utf-8")
    code, _, err = world("qmsum", "pg19")
    assert code == 1 and "mine.txt" in err and "--to" in err
    assert [path.name for path in world.data.rglob("*") if path.is_file()] == ["mine.txt"]
    assert not world.hub.sent


def test_a_file_with_the_expected_content_is_no_obstacle(world: World) -> None:
    (world.data / "wikitext2").mkdir(parents=True)
    (world.data / "wikitext2/wiki.test.raw").write_text(WIKI, encoding="utf-8")
    assert world("wikitext-2")[0] == 0


def test_another_recipe_makes_the_files_anew_and_removes_the_old_ones(world: World) -> None:
    world("proof-pile")
    next(row for row in world.table["datasets"] if row["name"] == "proof-pile")["options"]["documents"] = 1
    world.save()
    assert world.states()["proof-pile"] == "outdated"
    assert world("proof-pile")[0] == 0
    assert [path.name for path in (world.data / "math").iterdir()] == ["proofpile_test_000.tex"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pg19", b"no parquet", "another form"),
        ("pg19", parquet([]).replace(b"text", b"txet"), "another form"),
        ("proof-pile", gzip.compress(b'{"text": "cut'), "another form"),
        ("proof-pile", gzip.compress(lines([{"text": "x", "meta": None}])), "no document"),
        ("proof-pile", gzip.compress(b"x" * 999)[:-9], "another form"),
        ("openwebtext2", lines([{"content": "x"}]), "another form"),
        ("longbench", b"no zip", "another form"),
        ("longbench", archive({"data/trec.jsonl": b"{}"}), "another form"),
    ],
    ids=["no-parquet", "other-column", "cut-line", "short-document", "cut-file", "other-key", "no-zip", "other-files"],
)
def test_unexpected_content_is_said_and_leaves_nothing(world: World, name: str, content: bytes, said: str) -> None:
    row = next(row for row in world.table["datasets"] if row["name"] == name)
    file = row["files"][0]
    world.hub.repos[row["repo"]].commits[OLD][file["path"]] = content
    file |= {"bytes": len(content), "sha256": ""}
    world.save()
    code, _, err = world(name)
    assert code == 1 and said in err and "Traceback" not in err
    assert not list(world.data.glob(row["fills"]))


# --- the download


def test_a_model_is_fetched_at_its_commit_without_second_copies(world: World) -> None:
    code, out, err = world("llama-2-7b")
    assert code == 0, err
    assert {path for path, _, _ in world.hub.sent} == FETCHED
    assert world.cached("config.json").read_bytes() == b"{}"
    assert all(world.cached(name).read_bytes() == data for name, data in WEIGHTS.items())
    assert models._is_whole(world.cached(""))
    assert (world.path / "hub/models--org--tiny/refs/main").read_text() == OLD
    assert "HF_HUB_OFFLINE=1 make book PROFILE=paper" in out
    assert world.states()["llama-2-7b"] == "here"


def test_an_interrupted_file_goes_on_where_it_stopped(world: World) -> None:
    name = "model-00002-of-00002.safetensors"
    world.hub.breaks[name] = 25_000
    code, _, err = world("llama-2-7b")
    assert code == 1 and "run the same command again" in err
    assert not world.cached(name).exists()
    entry = json.loads(world("llama-2-7b", "--json")[1])["entries"][0]
    assert entry["state"] == "partly" and entry["missing_bytes"] < entry["download_bytes"] - 25_000
    world.hub.breaks.clear()
    assert world("llama-2-7b")[0] == 0
    assert world.cached(name).read_bytes() == WEIGHTS[name]
    assert [start for path, start, _ in world.hub.sent if path == name] == [0, 25_000]
    assert all(world.hub.bytes_sent(path) == len(MODEL[path]) for path in FETCHED)
    assert not list((world.path / "hub").rglob("*.part"))


def test_the_interrupt_key_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hub.http_get

    def press(url: str, file: Any, **options: Any) -> None:
        real(url, file, **options)
        file.truncate(20_000)
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "http_get", press)
    code, _, err = world("qmsum", "llama-2-7b")
    assert code == 130 and "goes on from there" in err
    monkeypatch.setattr(hub, "http_get", real)
    assert world("qmsum", "llama-2-7b")[0] == 0
    assert set(world.states().values()) == {"here", "missing"}


def test_a_part_with_other_bytes_is_found_and_fetched_anew(world: World) -> None:
    name = "model-00001-of-00002.safetensors"
    blob = world.path / "hub/models--org--tiny/blobs" / hashlib.sha256(WEIGHTS[name]).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.part").write_bytes(b"?" * 100)
    code, _, err = world("llama-2-7b")
    assert code == 1 and "damaged on the way" in err
    assert world("llama-2-7b")[0] == 0
    assert world.cached(name).read_bytes() == WEIGHTS[name]


def test_a_damaged_model_file_is_found_and_fetched_anew(world: World) -> None:
    world("llama-2-7b")
    name = "model-00001-of-00002.safetensors"
    blob = world.cached(name).resolve()
    blob.write_bytes(b"?" * len(WEIGHTS[name]))  # the same size
    assert world("llama-2-7b", "--dry-run")[1].count("here") >= 1
    assert "damaged" in world("llama-2-7b", "--check", "--dry-run")[1]
    assert world("llama-2-7b", "--check")[0] == 0
    assert world.cached(name).read_bytes() == WEIGHTS[name]
    world.cached(name).resolve().write_bytes(b"?")  # another size: found without --check
    assert world("llama-2-7b")[0] == 0
    assert world.cached(name).read_bytes() == WEIGHTS[name]


def test_a_damaged_download_in_the_cache_is_fetched_anew(world: World) -> None:
    world("openwebtext2")
    raw = next((world.path / "hub").glob("datasets--suolyer*/snapshots/*/test.json"))
    raw.resolve().write_bytes(b"?" * raw.stat().st_size)
    shutil.rmtree(world.data / "webtext")
    assert world("openwebtext2")[0] == 0
    assert texts.load("webtext").documents == (LONG,)


def test_content_other_than_the_tables_is_refused(world: World) -> None:
    world.hub.repos["suolyer/pile_openwebtext2"].commits[OLD]["test.json"] = lines([{"text": LONG + "!"}])
    world.hub.raw["/qmsum/test.jsonl"] = b"<html>" + b" " * (len(DATA["qmsum"]["test.jsonl"]) - 6)
    code, _, err = world("openwebtext2", "qmsum", "pg19")
    assert code == 1 and err.count("another content than the table asks for") == 2
    assert world.states() == {**world.states(), "openwebtext2": "missing", "qmsum": "missing", "pg19": "here"}


@pytest.mark.parametrize("token", ["", "hf_without_access"])
def test_a_gated_model_is_explained_before_anything_long_and_the_rest_is_fetched(
    world: World, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    world.table["models"][0]["gated"] = world.tiny.gated = True
    world.save()
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = world("llama-2-7b", "qmsum")
    assert code == 1
    assert "it is gated" in err and "https://huggingface.co/org/tiny" in err and "hf auth login" in err
    assert "Llama 2 Community License" in out  # said beforehand
    assert world.states()["qmsum"] == "here"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert world("llama-2-7b", "qmsum")[0] == 0


def test_a_model_that_became_gated_is_explained_too(world: World) -> None:
    world.tiny.gated = True
    code, _, err = world("llama-2-7b")
    assert code == 1 and "it is gated" in err and "hf auth login" in err


def test_without_a_network_it_says_so_at_once_and_lists_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world("qmsum")
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(world.hub.url, "http://127.0.0.1:9"))
    code, out, err = world()
    assert code == 1 and "cannot be reached" in err and "run the same command again" in err
    assert "To download: about" in out
    assert world.states()["qmsum"] == "here"
    assert world("qmsum")[0] == 0  # nothing to fetch, nothing asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE keeps it" in world("llama-2-7b")[2]


def test_a_full_disk_is_said_before_anything_starts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(world.path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, out, err = world()
    assert code == 1 and "0.0 GB are free" in err and "HF_HOME" in err and "--to" in err
    assert not world.hub.sent and not world.data.exists()
    assert "1000" not in out and "0.0 MB free" in out


def test_a_disk_that_fills_up_on_the_way_keeps_what_arrived(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hub.http_get

    def full(url: str, file: Any, **options: Any) -> None:
        real(url, file, **options)
        file.truncate(30_000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "http_get", full)
    code, _, err = world("llama-2-7b")
    assert code == 1 and "the disk is full" in err and "What has arrived is kept" in err
    monkeypatch.setattr(hub, "http_get", real)
    assert world("llama-2-7b")[0] == 0
    assert all(world.cached(name).read_bytes() == data for name, data in WEIGHTS.items())


# --- revisions


def test_a_branch_is_resolved_once_and_then_kept(world: World) -> None:
    world.table["models"][0]["revision"] = "main"
    world.save()
    world.hub.breaks["model-00002-of-00002.safetensors"] = 25_000
    assert world("llama-2-7b")[0] == 1
    world.hub.breaks.clear()
    world.tiny.main = NEW
    world.tiny.commits[NEW] = {**MODEL, "config.json": b'{"new": 1}'}
    code, out, err = world("llama-2-7b")
    assert code == 0, err
    assert world.cached("config.json").read_bytes() == b"{}" and not world.cached("config.json", NEW).exists()
    assert "main is now at bbbbbbb" in out and "--update" in out and "HF_HUB_OFFLINE=1" in out


def test_update_takes_the_newest_commit(world: World) -> None:
    world("llama-2-7b", "openwebtext2")
    world.tiny.main = NEW
    world.tiny.commits[NEW] = {**MODEL, "config.json": b'{"new": 1}'}
    texts_there = world.hub.repos["suolyer/pile_openwebtext2"]
    texts_there.main, texts_there.commits[NEW] = NEW, {"test.json": lines([{"text": LONG + "new"}])}
    assert world("llama-2-7b", "openwebtext2", "--update")[0] == 0
    assert world.cached("config.json", NEW).read_bytes() == b'{"new": 1}'
    assert (world.path / "hub/models--org--tiny/refs/main").read_text() == NEW
    assert world.hub.bytes_sent("model-00001-of-00002.safetensors") == 60_000  # the same file, not sent again
    assert texts.load("webtext").documents == (LONG + "new",)
    assert world("llama-2-7b", "openwebtext2")[0] == 0
    assert world.states() == {**world.states(), "llama-2-7b": "here", "openwebtext2": "here"}
    assert world("--update")[0] == 2


def test_a_commit_that_is_gone_has_a_way_out(world: World) -> None:
    for repo in (world.tiny, world.hub.repos["emozilla/pg19-test"]):
        repo.commits[NEW] = repo.commits.pop(OLD)
        repo.main = NEW
    code, _, err = world("llama-2-7b", "pg19")
    assert code == 1 and err.count("no longer has this commit") == 2 and "--update" in err
    assert world("llama-2-7b", "pg19", "--update")[0] == 0
    assert world.states() == {**world.states(), "llama-2-7b": "here", "pg19": "here"}


def test_what_is_gone_from_the_hub_or_not_what_is_read_is_said(world: World) -> None:
    del world.hub.repos["emozilla/pg19-test"]
    del world.hub.repos["suolyer/pile_openwebtext2"].commits[OLD]["test.json"]
    world.tiny.commits[OLD] = {"config.json": b"{}", "pytorch_model.bin": b"?"}
    code, _, err = world("llama-2-7b", "pg19", "openwebtext2", "qmsum")
    assert code == 1 and "no such repository" in err and "has no .safetensors files" in err
    assert "a file that the table names is not there" in err
    assert world.states()["qmsum"] == "here"


def test_a_folder_that_cannot_be_written_is_said(world: World) -> None:
    world.data.write_text("a file", encoding="utf-8")
    code, _, err = world("qmsum")
    assert code == 1 and "cannot be stored" in err and str(world.data) in err


# --- the command


def test_unknown_names_and_a_broken_lock_file_are_said(world: World) -> None:
    code, _, err = world("pg20")
    assert code == 2 and "nothing is called pg20" in err and "pg19" in err
    world("qmsum")
    (world.data / fetch.LOCK).write_text("{", encoding="utf-8")
    code, _, err = world("qmsum")
    assert code == 1 and fetch.LOCK in err


def test_two_at_once_in_one_folder_are_refused(world: World) -> None:
    with fetch.Folder(world.data).held():
        code, _, err = world("qmsum")
    assert code == 1 and "another process" in err


def test_a_run_killed_while_files_are_put_in_place_is_mended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world("longbench")
    (world.data / "longbench/lcc.jsonl").write_text("{}", encoding="utf-8")  # so that it is made again
    real, moves = Path.replace, []

    def once(path: Path, target: Path) -> Path:
        if "content" in path.parts:
            moves.append(target)
            if len(moves) == 3:
                raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", once)
    assert world("longbench")[0] == 130
    assert world("longbench")[0] == 0
    assert [longbench.load(name).samples[0].prompt for name in longbench.NAMES] == [
        f"about {name} q" for name in longbench.NAMES
    ]


def test_leftovers_of_a_killed_run_go(world: World) -> None:
    (world.data / ".papers-left").mkdir(parents=True)
    world("qmsum")
    assert not (world.data / ".papers-left").exists()


def test_the_plan_names_room_memory_and_gates(world: World) -> None:
    world.table["models"][0]["gated"] = True
    world.save()
    code, out, _ = world("--dry-run")
    assert code == 0 and not world.hub.sent and not world.data.exists()
    for said in ("To download: about", "GPU:", "Disk:", "org/tiny", "text books", str(world.data)):
        assert said in out
    found = json.loads(world("--json")[1])
    assert {entry["name"] for entry in found["entries"]} == {*DATA, "llama-2-7b"}
    assert found["disks"][0]["needed"] > 0 and found["folder"] == str(world.data)


def test_fetch_alone_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("kvrepro.assets.fetch", lambda: called.append(1))
    with pytest.raises(SystemExit) as caught:
        cli.main(["fetch"])
    assert not caught.value.code and called == [1]


def test_doctor_names_the_command(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world("qmsum")
    found = next(finding for finding in examine() if finding.name == "profile paper")
    assert "1 of 8 models and datasets" in found.detail and "kvrepro fetch papers" in found.fix
    assert world()[0] == 0
    assert "all 8 models and datasets" in doctor._papers().detail and not doctor._papers().fix
    monkeypatch.delenv("KVREPRO_DATA_DIR")
    monkeypatch.setattr(doctor, "data_folder", lambda: world.data)
    assert doctor._papers().fix == f"export KVREPRO_DATA_DIR={world.data}"
    (world.data / fetch.LOCK).write_text("{", encoding="utf-8")
    assert fetch.LOCK in doctor._papers().detail


def test_a_whole_run_through_the_environments_own_variables_and_a_model_loaded_from_it(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user has it: another process, HF_ENDPOINT and HF_HOME, then ``load_model`` with no hub to be reached."""
    letters = Tokenizer(WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="<end>"))
    letters.pre_tokenizer = Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>")
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    rows = small_table(there)
    there.repos["org/tiny"].commits[OLD] = {
        path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()
    }
    (tmp_path / "papers.yml").write_text(yaml.safe_dump(rows), encoding="utf-8")
    script = (
        "import sys, pathlib; from kvrepro.papers import table; table.TABLE = pathlib.Path(sys.argv[1]); "
        "from kvrepro.cli import main; main(['fetch', 'papers', 'llama-2-7b', 'pg19', '--to', sys.argv[2]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "papers.yml"), str(tmp_path / "data")],
        env={**os.environ, "HF_ENDPOINT": there.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/books/pg19_test_000.txt").read_text(encoding="utf-8") == "one " * 400
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded, tokenizer = models.load_model("org/tiny", device="cpu", dtype="float64")
    assert tokenizer is not None and tokenizer("a b").input_ids == [0, 1]
    ids = torch.tensor([[0, 1, 2, 1]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    models.identity.cache_clear()
    assert len(models.model_identity(loaded, "org/tiny")[1]) == 64


def test_the_profile_says_which_tasks_lack_their_data(world: World) -> None:
    given = [{"tasks": ["trec", "lcc", "zeroscrolls/qmsum", "madlibs1", "niah_single"]}]
    (problem,) = [p for p in checks.profile_problems("paper", given) if "task" in p]
    assert problem.startswith("data of the tasks lcc, madlibs1, trec, zeroscrolls/qmsum: ")
    assert not [p for p in checks.profile_problems("gpu", given) if "task" in p]
    world("longbench", "synthwiki", "qmsum")
    assert not [p for p in checks.profile_problems("paper", given) if "task" in p]
    with pytest.raises(BookError, match="kvrepro fetch papers"):
        checks.check_profile_runs("paper", [{"text": "books"}])


# --- the table


def test_the_table_is_well_formed() -> None:
    found = table.entries()
    assert len({entry.name for entry in found}) == len(found)
    for entry in found:
        assert entry.revision == "main" or hub.COMMIT.fullmatch(entry.revision)
        assert entry.checked == (entry.revision != "main")
        assert set(entry.papers) <= {"WeightedKV", "KVMerger", "KVSlimmer"}
        if isinstance(entry, Dataset):
            assert entry.convert in CONVERTERS
            assert entry.repo or all(file.url for file in entry.files)
            assert all(bool(file.path) != bool(file.url) and file.bytes > 0 for file in entry.files)
            assert all(len(file.sha256) == 64 for file in entry.files if file.url)  # the hub's have their commit
            assert (entry.read_as == "nothing yet") == (not entry.used_by)
            names = [word for word in entry.read_as.replace(";", "").split() if word in texts.names()]
            assert bool(names) == entry.read_as.startswith("text ")


@pytest.mark.parametrize("model", [e for e in table.entries() if isinstance(e, Model)], ids=lambda model: model.name)
def test_sizes_of_a_model_are_those_of_its_shape(model: Model) -> None:
    config = AutoConfig.for_model(**models.SHAPES[model.shape])
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in built.parameters()) == model.parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert config.num_hidden_layers * config.num_key_value_heads * head * 2 * 2 == model.cache_bytes


def test_the_table_and_the_paper_profile_name_the_same_models_and_texts() -> None:
    read: dict[str, set[str]] = {entry.name: set() for entry in table.entries()}
    by_model = {entry.repo: entry for entry in table.entries() if isinstance(entry, Model)}
    by_reader = {
        word: entry.name
        for entry in table.entries()
        if isinstance(entry, Dataset)
        for word in entry.read_as.replace(",", "").replace(";", "").split()
    }
    for notebook in Project(ROOT).notebooks():
        given = notebook.parameters("paper")
        names = checks._named([given], ("text", "texts", "data", "data_text", "long_text", "tasks"))
        for name in names - set(texts.EMBEDDED) - set(tasks.ruler.NAMES):
            read["longbench" if name in longbench.NAMES else by_reader[name]].add(notebook.name)
        for repo in checks._named([given], ("model", "models")):
            read[by_model[repo].name].add(notebook.name)
            sizes = [given.get(key, 0) for key in ("length", "lengths", "window", "context", "max_length")]
            longest = max(max(size) if isinstance(size, list) else size for size in sizes)
            assert longest <= by_model[repo].context, (notebook.name, longest)
    assert read == {entry.name: set(entry.used_by) for entry in table.entries()}


def test_the_books_tables_show_every_entry() -> None:
    shown = papers_tables()
    for entry in table.entries():
        assert f"`{entry.name}`" in shown
        assert entry.repo in shown
