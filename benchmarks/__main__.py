"""All timings, each beside its peers and its floor: ``python -m benchmarks``; ``--help`` lists the choices."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from kvrepro.experiments import speed, targets
from kvrepro.records import Record, Store, StoreError, read_records

Plan = Mapping[str, Sequence[Mapping[str, Any]]]

READ = ("full", "streaming_llm", "snapkv", "h2o", "weightedkv", "kvmerger", "kvslimmer")
FITTED = ("attention_matching", "attention_matching(heads='same')")
WRITE = ("full", "streaming_llm", "h2o", "weightedkv", "kvmerger", "kvslimmer")
SOME = ("full", "streaming_llm", "weightedkv")
BIASED = ("kvslimmer", "keepkv", "kvmerger(mass='attention')")  # a number is added to a slot's logits, as with FITTED
MERGE = ("weightedkv", "kvmerger", "kvslimmer", "d2o", "keepkv")
FIT = ("full", *FITTED, "attention_matching(fitted=128)")
PAIRS = ("kvslimmer", "asymkv")
PRESSES = ("streaming_llm", "snapkv", "observed_attention")

#: What each piece measures, call by call: the arguments of its function in ``kvrepro.experiments.speed``.
FULL: Plan = {
    "prefill": [
        {"lengths": 32768, "methods": READ, "repeats": 3},
        {"lengths": [4096, 16384], "methods": READ, "repeats": 3},
    ],
    "fit": [{"lengths": 32768, "methods": FIT, "repeats": 3}],
    "pairs": [{"lengths": [8192, 32768], "methods": PAIRS, "budget": 2080, "chunk": 512, "repeats": 1}],
    "merging": [{"length": 32768, "methods": MERGE, "repeats": 2}],
    "compiled": [{"slots": [1024, 8192], "methods": WRITE, "compile": True, "peers": False}],
    "decode": [
        {"slots": [1024, 8192], "methods": [], "blocks": 2, "steps": 32, "generate": ["weightedkv"]},
        {"slots": [1024, 8192], "methods": ["streaming_llm", "tova", "weightedkv", *BIASED], "peers": False},
        {"slots": 1024, "methods": FITTED, "peers": False},  # slots are chosen every 64 steps
        {"slots": 8192, "methods": FITTED, "steps": 512, "blocks": 2, "peers": False},  # every 512
        {"slots": 32768, "methods": SOME, "peers": False},
    ],
    "batch": [{"slots": 2048, "methods": SOME, "batch": [1, 4, 16, 64], "steps": 32, "peers": False}],
    "perplexity": [{"methods": "weightedkv", "budget": 256, "window": 2048, "rows": 128, "repeats": 1}],
    "perplexity_cpu": [{"methods": "weightedkv", "window": 512, "rows": 16, "plain_steps": 32, "repeats": 1}],
    "long": [
        {"lengths": 131072, "methods": ["h2o", "weightedkv", "kvmerger", "kvslimmer"], "chunk": 16384, "repeats": 1},
        {"lengths": 65536, "methods": ["h2o", "weightedkv"], "chunk": 16384, "repeats": 1},
    ],
    "throughput": [{"length": 32768, "methods": ["streaming_llm", "weightedkv"]}],
    "kvpress": [{"lengths": [8192, 32768], "presses": PRESSES, "repeats": 2}],
}
#: The same at a size for two CPU cores and two minutes.
QUICK: Plan = {
    "kvpress": [{"lengths": 128, "presses": "snapkv", "repeats": 1, "steps": 4}],
    "prefill": [{"lengths": [64, 128], "methods": ["full", "h2o", "weightedkv", "kvslimmer"], "repeats": 2}],
    "long": [{"lengths": 256, "methods": "weightedkv", "chunk": 128, "repeats": 1}],
    "fit": [{"lengths": 128, "methods": FIT, "repeats": 2}],
    "pairs": [{"lengths": 128, "methods": PAIRS, "budget": 64, "chunk": 16, "repeats": 1}],
    "merging": [{"length": 64, "methods": MERGE, "repeats": 1}],
    "decode": [{"slots": 64, "methods": [*SOME, *BIASED, *FITTED], "steps": 4, "blocks": 2}],
    "compiled": [],
    "batch": [{"slots": 64, "methods": "weightedkv", "batch": 4, "steps": 4, "blocks": 2}],
    "throughput": [{"length": 64, "methods": "weightedkv", "limit": 4, "steps": 4}],
    "perplexity": [{"methods": "weightedkv", "budget": 32, "window": 64, "rows": 8, "plain_steps": 8, "repeats": 1}],
    "perplexity_cpu": [],
}
#: The shape each scale measures, and the one of the embedded model, which the perplexity is measured on.
SHAPES = {"full": "llama-3.1-8b", "quick": "smollm2-135m"}
EMBEDDED = "smollm2-135m"
_FUNCTIONS: Mapping[str, Callable[..., list[Record]]] = {
    "prefill": speed.prefill,
    "long": speed.prefill,
    "merging": speed.merging,
    "decode": speed.decode,
    "compiled": speed.decode,
    "batch": speed.decode,
    "throughput": speed.throughput,
    "perplexity": speed.perplexity,
}


def run(pieces: Sequence[str], plan: Plan, setup: speed.Setup, peer: speed.Kvpress, embedded: str) -> list[Record]:
    """Measure some pieces.

    Args:
        pieces: keys of the plan, in order.
        plan: what each piece measures.
        setup: model and device.
        peer: where kvpress is.
        embedded: shape that the perplexity is measured on.

    Returns:
        The records, the device's ceilings first.
    """
    records = speed.ceilings(setup)
    for piece in pieces:
        for arguments in plan[piece]:
            records += _one(piece, dict(arguments), setup, peer, embedded)
    return records


def _one(piece: str, arguments: dict[str, Any], setup: speed.Setup, peer: speed.Kvpress, embedded: str) -> list[Record]:
    """One call of a piece."""
    if piece == "kvpress":
        return speed.kvpress(setup, peer=peer, **arguments)
    if piece in ("pairs", "fit"):
        return speed.prefill(setup, experiment=piece, peers=False, **arguments)
    if piece == "perplexity":
        setup = speed.Setup(embedded, setup.device, setup.dtype, setup.seed)
    if piece == "perplexity_cpu":
        setup = speed.Setup(embedded, "cpu", "float32", setup.seed)
        return [*speed.ceilings(setup), *speed.perplexity(setup, **arguments)]
    return _FUNCTIONS[piece](setup, **arguments)


def _pieces(names: str) -> list[str]:
    """The pieces asked for, in the plan's order."""
    asked = list(FULL) if names == "all" else [name for name in names.split(",") if name and name != "none"]
    if unknown := sorted(set(asked) - set(FULL)):
        raise click.BadParameter(f"no piece {', '.join(unknown)}; there are {', '.join(FULL)}, all and none")
    return [name for name in FULL if name in asked]


def _peer(python: str | None, path: str | None) -> speed.Kvpress:
    """Where kvpress is, from the options."""
    script = str(Path(__file__).with_name("kvpress_peer.py"))
    return speed.Kvpress(script, python or (sys.executable if path else None), path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--piece", "names", default="all", help=f"Pieces, separated by commas, of: {', '.join(FULL)}.")
@click.option("--quick", is_flag=True, help="A toy size, for two CPU cores.")
@click.option("--shape", default=None, help="Model shape; default llama-3.1-8b, or smollm2-135m with --quick.")
@click.option("--device", default=None, help="Device; default a GPU where there is one.")
@click.option("--dtype", default=None, help="Number format; default bfloat16 on a GPU, float32 on a CPU.")
@click.option("--out", default=None, type=click.Path(file_okay=False), help="Folder of the records (results/local).")
@click.option("--kvpress-python", default=None, help="Interpreter of an environment with kvpress.")
@click.option("--kvpress-path", default=None, help="Folder with kvpress and its transformers, for this interpreter.")
def main(
    names: str,
    quick: bool,
    shape: str | None,
    device: str | None,
    dtype: str | None,
    out: str | None,
    kvpress_python: str | None,
    kvpress_path: str | None,
) -> None:
    """Time prompts, merging, decoding, batches and perplexity beside their peers and their floors.

    Every cell is one record in the store. What is there already, measured by the same code on the same hardware, is not
    measured again. With --piece none only the tables of what is there are printed.
    """
    if out is not None:
        os.environ["KVREPRO_RESULTS"] = out
    pieces = _pieces(names)
    setup = speed.Setup(shape or SHAPES["quick" if quick else "full"], device, dtype)
    try:
        if pieces:
            records = run(pieces, QUICK if quick else FULL, setup, _peer(kvpress_python, kvpress_path), EMBEDDED)
        else:
            records = read_records(Store.default().folder / "speed.jsonl")
    except (StoreError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(targets.text(targets.board(records)))
    click.echo(targets.text(targets.verdicts(records)))


if __name__ == "__main__":
    main()
