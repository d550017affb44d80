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


def launchers() -> Iterator[tuple[str, bool]]:
    """Each function of the kernel modules that launches one, and whether it does so on its tensors' device."""
    for found in pkgutil.iter_modules(kernels.__path__, "kvrepro.kernels."):
        source = inspect.getsource(importlib.import_module(found.name))
        for function in (x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef)):
            calls = [x.func for x in ast.walk(function) if isinstance(x, ast.Call)]
            if any(isinstance(x, ast.Subscript) for x in calls):
                marks = [ast.unparse(mark) for mark in function.decorator_list]
                yield f"{found.name}.{function.name}", "on_its_device" in marks


def test_every_kernel_is_launched_on_its_tensors_device() -> None:
    pytest.importorskip("triton")
    found = dict(launchers())
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
