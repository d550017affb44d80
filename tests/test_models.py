"""Models: the embedded one without a network, exact shapes, reproducible random weights, honest identities."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import socket
import typing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kvrepro import assets, models, texts
from kvrepro.models import ModelError, load_model

Embedded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

#: Parameters of the real models, as their cards and checkpoints give them.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail(f"asked the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """A built-in shape small enough to be made in a test."""
    small = {**models.SHAPES["llama-3.1-8b"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    small |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    monkeypatch.setattr(models, "SHAPES", {**models.SHAPES, "tiny": small})
    return "tiny"


def weights_equal(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- the embedded model


def test_the_embedded_model_loads_without_a_network(no_network: None) -> None:
    model, tokenizer = load_model("smollm2-135m", device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config._attn_implementation == "kvrepro"
    assert tokenizer is not None


def test_the_embedded_model_has_the_shape_of_the_real_one(embedded: Embedded) -> None:
    found, expected = embedded[0].config, models.shape("smollm2-135m")
    assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps)  # a float32 in the file
    for name in set(models.SHAPES["smollm2-135m"]) - {"rms_norm_eps"}:
        assert getattr(found, name) == getattr(expected, name), name


def test_the_embedded_model_reads_text(embedded: Embedded) -> None:
    model, tokenizer = embedded
    ids = texts.tokens(texts.load("essays"), tokenizer, 256, 2)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 3.6  # a perplexity of about 30 this early in a text; a broken conversion gives thousands


def test_the_embedded_tokenizer(embedded: Embedded) -> None:
    tokenizer = embedded[1]
    text = "Hello  wörld\n\tdef f(x): return x**2  # 𝛼 → β 1234567"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("").input_ids == []
    assert tokenizer.padding_side == "left"
    batch = tokenizer(["a", "a longer prompt"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0].tolist()[0] == 0
    assert batch.attention_mask[:, -1].tolist() == [1, 1]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_damaged_model_file_is_noticed_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, embedded: Embedded
) -> None:
    shutil.copytree(assets.cache_folder() / "smollm2-135m", tmp_path / "smollm2-135m", copy_function=_link)
    whole = assets.MODEL.path
    monkeypatch.setenv("KVREPRO_CACHE", str(tmp_path))
    damaged = assets.MODEL.path / "model.safetensors"
    damaged.unlink()
    damaged.write_bytes(b"half a download")
    monkeypatch.setitem(assets.EMBEDDED, "smollm2-135m", (_refilled_from(whole), assets.GGUF_SHA256))
    load_model("smollm2-135m", device="cpu")
    assert "model.safetensors has 15 bytes instead of" in caplog.text


def test_a_folder_with_a_gguf_file_alone(tmp_path: Path, embedded: Embedded) -> None:
    """The file says it all: tokenizer and identity; a second file leaves open which is meant."""
    (tmp_path / "weights.gguf").symlink_to(assets.GGUF_MODEL.path / assets.GGUF)
    tokenizer = models.load_tokenizer(str(tmp_path))
    assert tokenizer("Hello  wörld").input_ids == embedded[1]("Hello  wörld").input_ids
    first = models.identity(str(tmp_path))
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(models.ModelError, match="one GGUF file"):
        models.load_tokenizer(str(tmp_path))
    models.identity.cache_clear()
    (tmp_path / "weights.gguf").unlink()
    assert models.identity(str(tmp_path)) != first


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(Path(source).resolve())


def _refilled_from(folder: Path) -> assets.Asset:
    """The model's asset, filled from a whole copy instead of converting for half a minute."""

    def fill(target: Path) -> None:
        for path in folder.iterdir():
            if path.name != assets.MANIFEST:
                _link(str(path), str(target / path.name))

    return assets.Asset(assets.MODEL.name, assets.MODEL.title, "", fill, 1000, needs=assets.MODEL.needs)


# --- shapes and random weights


@pytest.mark.parametrize("name", models.SHAPES)
def test_shapes_have_the_real_models_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.shape(name), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert getattr(model.config, "sliding_window", None) is None
    inv_freq = model.model.rotary_emb.inv_freq
    assert inv_freq.shape == (model.config.hidden_size // model.config.num_attention_heads // 2,)


def test_the_shapes_list_is_the_contract_s() -> None:
    assert set(models.SHAPES) == set(PARAMETERS)


def test_random_weights_are_reproducible_and_leave_the_generator_alone(tiny_shape: str) -> None:
    state = torch.get_rng_state()
    one, _ = load_model(tiny_shape, weights="random", device="cpu", dtype="bfloat16")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    two, _ = load_model(tiny_shape, weights="random", device="cpu", dtype=torch.bfloat16)
    three, _ = load_model(tiny_shape, weights="random", device="cpu", dtype=torch.bfloat16, seed=1)
    assert one.dtype == torch.bfloat16
    assert not one.training
    assert weights_equal(one, two)
    assert not weights_equal(one, three)
    assert one.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_tokenizer_of_random_weights_fits_the_vocabulary(tiny_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(tiny_shape, weights="random", device="cpu")[1] is None  # 512 < 49,152
    config = models.shape("llama-3.1-8b")
    assert models._tokenizer_for_random(config) is not None
    monkeypatch.setenv("KVREPRO_CACHE", "/nonexistent")
    assert models._tokenizer_for_random(config) is None


# --- other models


@pytest.fixture
def folder(tmp_path: Path, tiny_shape: str, embedded: Embedded) -> Path:
    model, _ = load_model(tiny_shape, weights="random", device="cpu")
    model.save_pretrained(tmp_path / "model")
    embedded[1].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads(folder: Path, no_network: None) -> None:
    model, tokenizer = load_model(str(folder), device="cpu", dtype="float64")
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "kvrepro"
    assert tokenizer is not None
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_without_a_pad_token_gets_one(folder: Path, embedded: Embedded) -> None:
    tokenizer = copy.deepcopy(embedded[1])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert models.load_tokenizer(str(folder)).pad_token == "<|im_end|>"


# --- identities


def test_identities_tell_weights_apart(folder: Path, embedded: Embedded, tiny_shape: str) -> None:
    assert models.model_identity(embedded[0], "smollm2-135m") == ("smollm2-135m", assets.GGUF_SHA256)
    random, _ = load_model(tiny_shape, weights="random", device="cpu")
    seeded, _ = load_model(tiny_shape, weights="random", device="cpu", seed=1)
    loaded, _ = load_model(str(folder), device="cpu")
    found = [models.model_identity(model, "x")[1] for model in (random, seeded, loaded)]
    assert len({*found, assets.GGUF_SHA256}) == 4
    assert found[0] == models.identity(tiny_shape, weights="random")
    assert found[2] == models.identity(str(folder))
    own = AutoModelForCausalLM.from_pretrained(folder)  # a model that the user loaded
    assert models.model_identity(own, str(folder)) == (str(folder), found[2])


def test_a_folder_s_identity_changes_with_weights_and_config(folder: Path) -> None:
    def fresh() -> str:
        models.identity.cache_clear()
        return models.identity(str(folder))

    first = fresh()
    assert fresh() == first
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    second = fresh()
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert len({first, second, fresh()}) == 3
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        fresh()


def test_a_hub_model_s_identity_takes_the_cache_s_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    blob = tmp_path / ("0" * 64)  # stands for a large file, named by its sum
    blob.write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blob)
    shutil.copy(folder / "config.json", snapshot)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda name, file: str(snapshot / file))
    models.identity.cache_clear()
    first = models.identity("a/b")
    blob.rename(tmp_path / ("1" * 64))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / ("1" * 64))
    models.identity.cache_clear()
    assert models.identity("a/b") != first
    models.identity.cache_clear()


@pytest.mark.parametrize("there", [[], ["config.json"], ["config.json", "model-1.safetensors"]])
def test_a_hub_model_that_is_not_whole_is_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str]
) -> None:
    snapshot = tmp_path / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    files = {
        "config.json": "{}",
        "model.safetensors.index.json": json.dumps({"weight_map": shards}),
        **dict.fromkeys(shards.values(), "w"),
    }
    for name in [*there, *(["model.safetensors.index.json"] if len(there) > 1 else [])]:
        (snapshot / name).write_text(files[name])
    calls = []

    def download(name: str, allow_patterns: list[str]) -> str:
        calls.append(name)
        for file, content in files.items():
            (snapshot / file).write_text(content)
        return str(snapshot)

    found = str(snapshot / "config.json") if there else None
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: found)
    monkeypatch.setattr(models, "snapshot_download", download)
    models.identity.cache_clear()
    first = models.identity("a/b")
    assert calls == ["a/b"]
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: str(snapshot / "config.json"))
    models.identity.cache_clear()
    assert models.identity("a/b") == first
    assert calls == ["a/b"]
    models.identity.cache_clear()


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "llama-2-70b", "weights": "random"}, "llama-2-7b, llama-2-13b, llama-3.1-8b, mistral-7b-v0.3"),
        ({"name": "llama-2-7b"}, "give its hub id, such as 'meta-llama/Llama-2-7b-hf'"),
        ({"name": "smollm2-135m", "weights": "trained"}, r"\['pretrained', 'random'\]"),
        ({"name": "smollm2-135m", "dtype": "int8"}, "float32', 'bfloat16'"),
        ({"name": "smollm2-135m", "device": "tpu9000"}, "write cpu, cuda"),
        ({"name": "smollm2-135m", "device": "cuda:99"}, "device='cpu' works"),
    ],
)
def test_wrong_arguments_list_the_valid_ones(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(**arguments)


def test_a_folder_without_a_model_is_one_clear_error(tmp_path: Path, no_network: None) -> None:
    for name in (str(tmp_path), str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(ModelError, match=r"needs config.json, the weights and the tokenizer"):
            load_model(name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more lines")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ModelError) as caught:
        load_model("somebody/something")
    message = str(caught.value)
    assert "'somebody/something' cannot be loaded (OSError: We couldn't connect to 'https://huggingface.co')" in message
    assert "'smollm2-135m' (embedded)" in message
    assert "\n" not in message


def test_type_checkers_know_when_there_is_a_tokenizer() -> None:
    """With pretrained weights always, with random ones perhaps; all else the overloads take as the function does."""
    taken = inspect.signature(load_model).parameters
    signatures = [inspect.signature(overload) for overload in typing.get_overloads(load_model)]
    found = {str(x.parameters["weights"].annotation): x.return_annotation for x in signatures}
    assert found == {
        "Literal['pretrained']": "tuple[GenerativeModel, PreTrainedTokenizerBase]",
        "str": "tuple[GenerativeModel, PreTrainedTokenizerBase | None]",
    }
    for parameters in (x.parameters for x in signatures):
        assert list(parameters) == list(taken)
        for name in set(taken) - {"weights"}:
            assert parameters[name] == taken[name]
