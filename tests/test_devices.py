"""Models on other devices than the current one, as far as it shows without GPUs (else: benchmarks.check_devices)."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import tiny_model, tokens

import kvrepro
from kvrepro import decode, fixed, kernels
from kvrepro.rope import Rotation


def launchers(module: str, source: str) -> Iterator[tuple[str, bool]]:
    """Each function of a module that launches a kernel, and whether it does so on its tensors' device.

    A private one does if all that call it do.
    """
    functions = {x.name: x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef)}
    calls = {name: [x.func for x in ast.walk(f) if isinstance(x, ast.Call)] for name, f in functions.items()}
    called = {name: {x.id for x in its if isinstance(x, ast.Name)} for name, its in calls.items()}

    def placed(name: str) -> bool:
        """Whether everything that the function launches goes there."""
        if "on_its_device" in map(ast.unparse, functions[name].decorator_list):
            return True
        callers = [other for other, names in called.items() if name in names - {other}]
        return name.startswith("_") and bool(callers) and all(map(placed, callers))

    for name, its in calls.items():
        if any(isinstance(x, ast.Subscript) for x in its):
            yield f"{module}.{name}", placed(name)


def test_what_launches_on_its_tensors_device() -> None:
    """Marked functions, and private ones that only they call."""
    source = """
@on_its_device
def marked(x): _helper(x)
def _helper(x): kernel[(1,)](x)
def plain(x): _shared(x)
@on_its_device
def also(x): _shared(x)
def _shared(x): kernel[(1,)](x)
def _nobody_s(x): kernel[(1,)](x)
"""
    assert dict(launchers("m", source)) == {"m._helper": True, "m._shared": False, "m._nobody_s": False}


def test_every_kernel_is_launched_on_its_tensors_device() -> None:
    pytest.importorskip("triton")
    found: dict[str, bool] = {}
    for module in pkgutil.iter_modules(kernels.__path__, "kvrepro.kernels."):
        found |= launchers(module.name, inspect.getsource(importlib.import_module(module.name)))
    assert {"kvrepro.kernels.rotation.rotate", "kvrepro.kernels.decode.step"} < set(found)
    assert [name for name, placed in found.items() if not placed] == []


def test_a_launching_function_runs_on_the_device_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[object] = []

    @contextmanager
    def noted(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.append("left")

    @kernels.on_its_device
    def launch(name: str, x: torch.Tensor, other: torch.Tensor) -> str:
        assert entered[-1] == x.device
        return name

    monkeypatch.setattr(kernels, "on", noted)
    there, here = torch.empty(2, device="meta"), torch.empty(2)
    assert launch("positional", there, here) == "positional"
    assert launch("named", x=here, other=there) == "named"
    assert entered == [there.device, "left", here.device, "left"]


def test_the_guard_is_for_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("guard", device))
    assert kernels.on(torch.device("cuda:1")) == ("guard", torch.device("cuda:1"))
    with kernels.on(torch.device("cpu")) as nothing:
        assert nothing is None


def test_a_layer_elsewhere_than_the_rotary_embedding_is_turned_where_it_lies() -> None:
    rotation = Rotation(torch.tensor([1.0, 0.1]))
    keys, shift = torch.empty(1, 2, 3, 4, device="meta"), torch.zeros(1, 2, 3, dtype=torch.int32, device="meta")
    assert rotation.rotate(keys, shift).device == keys.device
    assert rotation.frequencies(keys.device) is rotation.frequencies(keys.device)
    assert rotation.frequencies(torch.device("cpu")) is rotation.inv_freq


def test_no_graph_holds_a_model_on_several_devices() -> None:
    model = kvrepro.prepare(tiny_model(dtype=torch.float32))
    cache = kvrepro.make_cache(model, "h2o", 12)
    kvrepro.prefill(model, tokens(1, 30), cache)
    assert not fixed.on_several_devices(model)
    with decode.Decoder(model, cache, room=2) as decoder:
        assert set(decoder.modes) == {"in place"}
    model.lm_head.to("meta")
    assert fixed.on_several_devices(model)
    with decode.Decoder(model, cache, room=2) as decoder:
        assert set(decoder.modes) == {"plain"}
