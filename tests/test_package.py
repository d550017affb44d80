"""The package as others install it: what the archives hold, and a wheel beside its base dependencies alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvrepro
from kvrepro import assets

ROOT = Path(__file__).resolve().parents[1]
Answer = tuple[int, str, str]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
#: Runs command lines, each in a folder; prints exit code, standard output and standard error of each as JSON.
COMMANDS = """
import contextlib, io, json, os, sys
import kvrepro
from kvrepro.cli import main

def run(folder, words):
    if words == ["where"]:
        return [0, kvrepro.__file__, ""]
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code
    return [code, out.getvalue(), err.getvalue()]

print(json.dumps([run(folder, words) for folder, words in json.loads(sys.argv[1])]))
"""


def sources() -> set[str]:
    """The package's own files, relative to the checkout."""
    paths = (ROOT / "kvrepro").rglob("*")
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, made from a copy: setuptools writes beside the sources."""
    copy, made = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("kvrepro", "tests", "benchmarks", "notebooks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return build("build_sdist", copy, made)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source archive alone, as ``python -m build`` does."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("build_wheel", next(folder.iterdir()), tmp_path_factory.mktemp("wheel"))


def build(what: str, source: Path, target: Path) -> Path:
    """The archive that setuptools makes of a folder; no network is asked."""
    subprocess.run([sys.executable, "-c", BUILD, what, str(target)], cwd=source, check=True, capture_output=True)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def about(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == sources()
    assert {"kvrepro/py.typed", "kvrepro/data/claims.yml"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_source_archive_holds_what_the_wheel_is_made_of(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    own = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert {name for name in names if not name.startswith("kvrepro.egg-info/")} == sources() | own


def test_metadata(about: Message) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (about["Name"], about["Version"], about["License-Expression"]) == ("kvrepro", kvrepro.__version__, "MIT")
    assert about["Requires-Python"] == project["requires-python"]
    assert set(about.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert "Typing :: Typed" in about.get_all("Classifier")
    wanted = [str(Requirement(line)) for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert wanted == [str(Requirement(line)) for line in project["dependencies"]]
    assert "make_cache" in str(about.get_payload())  # the README is the description


# --- installed alone


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages after installing the wheel without extras."""
    folder = tmp_path_factory.mktemp("alone")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (info,) = folder.glob("*.dist-info")
    for distribution in required(metadata.PathDistribution(info)):
        for name in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / name).exists():
                (folder / name).symlink_to(distribution.locate_file(name))
    return folder


def required(distribution: metadata.Distribution) -> Iterator[metadata.Distribution]:
    """The distributions that one needs, directly or not, without extras of its own."""
    seen: set[str] = set()
    left: list[tuple[metadata.Distribution, set[str]]] = [(distribution, set())]
    while left:
        needing, extras = left.pop()
        for requirement in map(Requirement, needing.requires or ()):
            marker = requirement.marker
            wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""})
            if str(requirement) in seen or not wanted:
                continue
            seen.add(str(requirement))
            found = metadata.distribution(requirement.name)
            left.append((found, requirement.extras))
            yield found


SMALL = "--budget 32 --device cpu --dtype float32 --json"
NEEDLE = f"eval needle h2o {SMALL} --length 160 -n 1"
LINES = {
    "where": "where",
    "methods": "methods",
    "ppl": f"eval ppl kvmerger -o sigma=5.0 {SMALL} --window 48 -n 1 --chunk 16",
    "fidelity": f"eval fidelity h2o {SMALL} --context 48 --continuation 8 -n 1",
    "needle": NEEDLE,
    "ledger": "ledger",
    "build": "build",
    "build in a checkout": "build",
    "run": "run weightedkv/perplexity",
    "lm-eval": "lm-eval --help",
    "doctor": "doctor",
    "dask": f"{NEEDLE} --depth 0.1 --executor dask://localhost:1",
}


@pytest.fixture(scope="module")
def said(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What the commands answer in an empty folder; all in one process, because importing takes the time."""
    empty = tmp_path_factory.mktemp("empty")
    calls = [(str(ROOT if "checkout" in name else empty), line.split()) for name, line in LINES.items()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KVREPRO_"))}
    environment |= {"PYTHONPATH": str(alone), "KVREPRO_CACHE": str(assets.cache_folder())}
    done = subprocess.run(
        [sys.executable, "-S", "-c", COMMANDS, json.dumps(calls)],  # -S: nothing but the standard library and alone
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(answer) for name, answer in zip(LINES, json.loads(done.stdout), strict=True)}


def test_it_is_the_installed_package_that_runs(said: dict[str, Answer], alone: Path) -> None:
    assert said["where"] == (0, str(alone / "kvrepro" / "__init__.py"), "")


@pytest.mark.parametrize("name", ["ppl", "fidelity", "needle"])
def test_evaluations_need_no_extra(said: dict[str, Answer], name: str) -> None:
    code, out, err = said[name]
    assert code == 0, err
    assert json.loads(out)["method"] in ("kvmerger", "h2o")


def test_methods_are_listed(said: dict[str, Answer]) -> None:
    code, out, _ = said["methods"]
    assert code == 0
    assert all(name in out for name in kvrepro.methods.names())


def test_doctor_calls_the_book_s_tools_optional_outside_a_checkout(said: dict[str, Answer]) -> None:
    code, out, _ = said["doctor"]
    assert code == 0
    assert "warning  book tools: missing: papermill" in out and "only to make the book, from a checkout" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("build", "error: no notebooks/index.yml in .*: the book is made from a checkout of the repository"),
        ("run", "error: no notebooks/index.yml in .*: the book is made from a checkout of the repository"),
        ("build in a checkout", r"Error: No module named 'nbformat': pip install 'kvrepro\[book\]'"),
        ("ledger", "Error: the published records are not here: a checkout of the repository has them"),
        ("lm-eval", r"Error: No module named 'lm_eval': pip install 'kvrepro\[lm-eval\]'"),
        ("dask", r"error: KVREPRO_EXECUTOR: Dask is not installed here .*: pip install 'kvrepro\[dask\]'"),
    ],
)
def test_what_is_not_installed_is_said_in_one_line(said: dict[str, Answer], name: str, message: str) -> None:
    code, _, err = said[name]
    assert code == 1
    assert re.match(message, err.splitlines()[-1])
    assert "Traceback" not in err
