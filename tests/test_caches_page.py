"""The page "What a KV cache costs": its code on layers with a sliding window, run as printed on a tiny such model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tokens

import kvrepro

PAGE = Path(__file__).parents[1] / "book" / "caches.md"


def held(lines: list[str]) -> list[list[int]]:
    """Bytes of the layers that see all and of the others, a line."""
    return [[int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", line)] for line in lines]


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Full layers grow with the text until they are held to a budget; windows do not."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    model = kvrepro.prepare(tiny_model("gemma3", dtype=torch.float32))
    exec(code, {"kvrepro": kvrepro, "model": model, "ids": tokens(1, 4096)})  # the page is part of this repository
    found = held(capsys.readouterr().out.splitlines())
    slot = 2 * 2 * 2 * 8 * 4 + 2 * 2 * 8  # full layers, heads, key and value, d, float32; position and cardinality
    window = 7 * 2 * 2 * 8 * 4  # tokens before the present one, heads, key and value, d, float32
    mass = 256 * 2 * 2 * 4
    assert [seen for seen, _ in found] == [1024 * slot, 256 * slot + mass, 4096 * slot, 256 * slot + mass]
    assert {windows for _, windows in found} == {window}


def test_the_printed_bytes_are_those_of_the_models_sizes() -> None:
    """Gemma 3 270M: three layers that see all, fifteen with a window of 512, one KV head of 256, float32."""
    page = PAGE.read_text(encoding="utf-8")
    (lines,) = re.findall(r"```text\n(\d+ full.*?)\n```", page, re.DOTALL)
    number, windows = 2 * 256 * 4, 15 * 511 * 2 * 256 * 4
    full, h2o = (lambda tokens: 3 * tokens * (number + 8)), 3 * 256 * (number + 8 + 4)
    assert held(lines.splitlines()) == [[n, windows] for n in (full(1024), h2o, full(4096), h2o)]
    shares = [full(n) / (full(n) + windows) for n in (1024, 4096)]
    smaller = [(full(n) - h2o) / (full(n) + windows) for n in (1024, 4096)]
    assert [f"{100 * x:.0f} %" for x in (*shares, *smaller)] == re.findall(
        r"\d+ %", page[page.index("three layers that") :]
    )[:4]
