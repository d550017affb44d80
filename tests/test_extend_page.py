"""The page on extending: its method, its usage and its oracle are run as they are printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvrepro import methods
from kvrepro.slots import Slots

PAGE = Path(__file__).parents[1] / "book" / "extend.md"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    """The page's Python blocks: the method's file, its use, its oracle."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def least_change(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's file as a module; its method is forgotten afterwards."""
    (tmp_path / "least_change.py").write_text(blocks[0], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = dict(methods._METHODS)
    import least_change

    yield least_change
    del sys.modules["least_change"]
    methods._METHODS.clear()
    methods._METHODS.update(known)


def random_slots(size: int) -> Slots:
    """Slots `[2, 2, size, 4]` with accumulated attention and counts."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, size, 4, generator=generator) for _ in range(2))
    positions = torch.arange(size, dtype=torch.int32).expand(2, 2, size).contiguous()
    mass = torch.rand(2, 2, size, generator=generator)
    count = torch.arange(size, 0, -1).float().expand(2, 2, size)
    return Slots(keys, values, positions, torch.ones_like(positions), {"mass": mass, "count": count})


def test_the_method_equals_the_oracle_beside_it(blocks: list[str], least_change: ModuleType) -> None:
    namespace: dict = {}
    exec(blocks[2], namespace)  # the page is part of this repository
    slots = random_slots(20)
    kept = least_change.LeastChange(sinks=2, recent=3).compress(slots, 10, None)
    for row in range(2):
        for head in range(2):
            expected = namespace["least_change_keeps"](
                slots.stats["mass"][row, head].tolist(),
                slots.stats["count"][row, head].tolist(),
                slots.values[row, head].tolist(),
                budget=10,
                sinks=2,
                recent=3,
            )
            assert kept.positions[row, head].tolist() == expected


def test_merging_keeps_every_token(least_change: ModuleType) -> None:
    kept = least_change.LeastChange(sinks=2, recent=3, merge=True).compress(random_slots(20), 10, None)
    assert kept.cardinality.sum(dim=2).eq(20).all()


def test_the_usage_runs(blocks: list[str], least_change: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks[1], {})
    assert "Least change" in capsys.readouterr().out


def test_every_block_is_run(blocks: list[str]) -> None:
    assert len(blocks) == 3
