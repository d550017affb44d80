"""Load a language model ready for compressed caches: the embedded one, one of the hub or a folder, or a bare shape."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvrepro import assets

#: The embedded model.
DEFAULT = "smollm2-135m"
WEIGHTS = ("pretrained", "random")
#: What a hub model is made of; its weights in other formats are not downloaded.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_WEIGHT_FILES = re.compile(r"\.(safetensors|bin|gguf|index\.json)$")

#: Shapes for ``weights="random"``: each model's own ``config.json`` on the hub, in transformers 5's terms.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": {  # meta-llama/Llama-2-7b-hf
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    "llama-2-13b": {  # meta-llama/Llama-2-13b-hf
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {  # meta-llama/Llama-3.1-8B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": False,
    },
    "mistral-7b-v0.3": {  # mistralai/Mistral-7B-v0.3: no sliding window since v0.2
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    "qwen2-7b": {  # Qwen/Qwen2-7B-Instruct
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {  # HuggingFaceTB/SmolLM2-135M-Instruct
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    },
}
_HUB_NAMES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2-7b": "Qwen/Qwen2-7B-Instruct",
}
#: Identities of the models that ``load_model`` made, by model.
_identities: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


if TYPE_CHECKING:

    class GenerativeModel(PreTrainedModel):
        """What `AutoModelForCausalLM` makes, for type checkers: transformers has no class for it."""

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """See transformers' `GenerationMixin.generate`."""


class ModelError(OSError):
    """A model cannot be loaded; the message says why and what to do."""


@overload
def load_model(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    weights: Literal["pretrained"] = "pretrained",
    seed: int = 0,
) -> tuple[GenerativeModel, PreTrainedTokenizerBase]: ...


@overload
def load_model(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    weights: str,
    seed: int = 0,
) -> tuple[GenerativeModel, PreTrainedTokenizerBase | None]: ...


def load_model(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    weights: str = "pretrained",
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model that is ready for compressed caches, in evaluation mode, and its tokenizer.

    Args:
        name: ``"smollm2-135m"`` or ``"gemma3-270m"`` (embedded), a hub id or a folder, which may hold a GGUF file
            alone; with ``weights="random"`` one of ``SHAPES``.
        device: a torch device; None for CUDA where there is a GPU, else the CPU.
        dtype: a torch dtype or its name; None for bfloat16 on a GPU and float32 on the CPU.
        weights: ``"pretrained"``, or ``"random"`` for a model of this shape that was never trained (for timings):
            created on the device in the dtype, so that it never takes more memory than the model itself.
        seed: of random weights.

    Returns:
        Model and tokenizer. The tokenizer pads on the left and has a pad token. With random weights it is the embedded
        model's where that is in the cache and the shape's vocabulary holds it, else None. Type checkers know that, and
        call the model a `GenerativeModel`: a `PreTrainedModel` that has `generate`.

    Raises:
        ValueError: unknown weights, dtype or device, or an unknown shape; lists the valid ones.
        ModelError: the hub or folder does not give such a model.
        kvrepro.assets.AssetError: the embedded model could not be fetched.
    """
    target = resolve_device(device)
    number = resolve_dtype(dtype, target)
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}; choose one of {list(WEIGHTS)}")
    if weights == "random":
        model = _random_model(name, target, number, seed)
        tokenizer = _tokenizer_for_random(model.config)
    else:
        tokenizer = load_tokenizer(name)
        with _explained(name):
            location = _location(name)
            model = AutoModelForCausalLM.from_pretrained(location, dtype=number, **_format(location)).to(target)
    model.eval().requires_grad_(False)  # gradients, where a method takes any, are by cached keys
    from kvrepro.adapter import prepare  # the adapter is no part of loading

    prepare(model)
    _identities[model] = identity(name, weights=weights, seed=seed)
    return model, tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained model, with a pad token and padding on the left.

    Args:
        name: as for ``load_model``.

    Raises:
        ModelError: the hub or folder has none.
        kvrepro.assets.AssetError: the embedded model could not be fetched.
    """
    with _explained(name):
        location = _location(name)
        tokenizer = AutoTokenizer.from_pretrained(location, padding_side="left", **_format(location))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to use: the one given, else CUDA where there is a GPU, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; write cpu, cuda or cuda:0") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {device} here: torch sees {torch.cuda.device_count()} GPUs; device='cpu' works")
    return found


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format to use: the one given, else bfloat16 on a GPU and float32 on the CPU.

    Raises:
        ValueError: not a floating-point dtype of torch.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    found = formats.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {list(formats)}")
    return found


def shape(name: str) -> PreTrainedConfig:
    """The configuration of a built-in shape.

    Raises:
        ValueError: unknown name; lists the shapes.
    """
    if name not in SHAPES:
        raise ValueError(f"no built-in shape {name!r} for weights='random'; the shapes are {', '.join(SHAPES)}")
    return AutoConfig.for_model(**SHAPES[name])


def _random_model(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    config = shape(name)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), device:  # parameters are made where they stay
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _tokenizer_for_random(config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    if assets.fault(assets.EMBEDDED[DEFAULT][0]) is not None:
        return None
    tokenizer = load_tokenizer(DEFAULT)
    return tokenizer if len(tokenizer) <= config.vocab_size else None


def _location(name: str) -> str | Path:
    """What transformers reads a pretrained model from: a folder or a hub id."""
    if name in assets.EMBEDDED:
        return assets.ensure(assets.EMBEDDED[name][0])
    path = Path(name).expanduser()
    if path.is_dir() or path.is_absolute() or name.startswith("."):
        if not (path / "config.json").is_file() and not _format(path):
            raise ModelError(
                f"no model in {name}: the folder needs config.json, the weights and the tokenizer, or one GGUF file"
            )
        return path
    if name in _HUB_NAMES:
        raise ValueError(
            f"{name!r} is a shape for weights='random'; for the trained model give its hub id, such as "
            f"{_HUB_NAMES[name]!r}"
        )
    return name


def _format(location: str | Path) -> dict[str, str]:
    """What transformers must be told to read a folder that holds nothing but one GGUF file."""
    if not isinstance(location, Path) or (location / "config.json").is_file():
        return {}
    files = sorted(location.glob("*.gguf"))
    return {"gguf_file": files[0].name} if len(files) == 1 else {}


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the many errors of a failed load into one that says what to do."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, assets.AssetError | torch.OutOfMemoryError | ModelError) or name in _HUB_NAMES:
            raise
        said = str(error).strip().split("\n")[0]
        raise ModelError(
            f"the model {name!r} cannot be loaded ({type(error).__name__}: {said}). Give {DEFAULT!r} (embedded), a "
            "folder with config.json and weights, or a hub id that this machine can reach (for a gated model log in "
            "first: hf auth login)"
        ) from error


def model_identity(model: PreTrainedModel, name: str) -> tuple[str, str]:
    """Name and sha256 of a loaded model, for records.

    Args:
        model: a model; one that ``load_model`` made is known even where its weights are random.
        name: its name, as given to ``load_model``, or the hub id or folder a model came from.

    Returns:
        (name, sha256).
    """
    return name, _identities.get(model) or identity(name)


@functools.lru_cache(maxsize=32)
def identity(name: str, *, weights: str = "pretrained", seed: int = 0) -> str:
    """The sha256 that tells one model's weights from another's, without loading them.

    An embedded model's is that of its GGUF file. A folder's covers ``config.json`` and the names, sizes and sha256
    sums of the weight files; a hub model's also the commit, and takes the sums that the hub's cache names its files by;
    one that is not in the cache is downloaded.
    Random weights' covers the shape and the seed.

    Args:
        name: as for ``load_model``.
        weights: ``"pretrained"`` or ``"random"``.
        seed: of random weights.

    Raises:
        ValueError: unknown shape, or unknown weights.
        ModelError: the hub cannot be reached for a model that is not here, or a folder has no weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}; choose one of {list(WEIGHTS)}")
    if weights == "random":
        shape(name)
        return _sha256_json({"shape": SHAPES[name], "seed": seed})
    if name in assets.EMBEDDED:
        return assets.EMBEDDED[name][1]
    folder, commit = _snapshot(name)
    files = sorted(path for path in folder.iterdir() if _WEIGHT_FILES.search(path.name))
    if not files:
        raise ModelError(f"no weights (.safetensors, .bin or .gguf) in {folder}: download the model {name!r} again")
    weight_files = [[path.name, path.stat().st_size, _weights_sha256(path)] for path in files]
    config = assets.file_sha256(folder / "config.json") if not _format(folder) else None  # it is in the GGUF file
    return _sha256_json({"config": config, "commit": commit, "files": weight_files})


def _snapshot(name: str) -> tuple[Path, str | None]:
    """The folder a pretrained model was loaded from, and its commit on the hub."""
    location = _location(name)
    if isinstance(location, Path):
        return location, None
    with _explained(name):
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str) or not _is_whole(Path(cached).parent):
            cached = str(Path(snapshot_download(name, allow_patterns=_HUB_FILES)) / "config.json")
    return Path(cached).parent, Path(cached).parent.name


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the hub's cache has all weight files; a download may have been interrupted."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return all((folder / name).is_file() for name in json.loads(index.read_text())["weight_map"].values())
    return any(_WEIGHT_FILES.search(path.name) for path in folder.iterdir())


def _weights_sha256(path: Path) -> str:
    """The file's sha256; the hub's cache stores large files under theirs."""
    blob = path.resolve().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else assets.file_sha256(path)


def _sha256_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
