"""What runs inside a notebook's kernel when the book runs it: one last cell that hands over the records it used."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kvrepro import executors, provenance
from kvrepro.records import Store, write_records


def export(folder: str) -> None:
    """Write the records this process used and where it ran, for the page's stamp.

    Args:
        folder: where ``records.jsonl`` and ``environment.json`` go.
    """
    commit, dirty = provenance.commit()
    environment = {
        "commit": commit,
        "dirty": dirty,
        "device": provenance.device_name() + (" and a Dask cluster" if executors.scheduler() else ""),
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(),
    }
    write_records(Path(folder) / "records.jsonl", Store.default().touched)
    (Path(folder) / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
