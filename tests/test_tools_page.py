"""The page "In the tools you use": its code, its task and its command are run as they are printed."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from pathlib import Path

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from kvrepro.cli import main

PAGE = Path(__file__).parents[1] / "book" / "tools.md"


def blocks(kind: str) -> list[str]:
    """The page's blocks of one kind."""
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's task and data in the folder where everything runs."""
    for kind, name in (("yaml", "capitals.yaml"), ("json", "capitals.jsonl")):
        (text,) = blocks(kind)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # The harness reads the thousands of files of its own tasks otherwise.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict = {}
    for block in blocks("python"):
        exec(block, namespace)  # the page is part of this repository
    out = capsys.readouterr().out
    assert "tokens seen, 96 slots held" in out
    held = namespace["held"]
    assert held[4] < held[8] < held[None] / 3
    assert 0 <= namespace["found"]["results"]["capitals"]["acc,none"] <= 1


def test_the_command_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [line for block in blocks("bash") for line in block.splitlines()]
    program, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert not caught.value.code
    assert "|capitals|" in capsys.readouterr().out
