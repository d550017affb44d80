"""KV-cache merging, reproducibly: WeightedKV, KVMerger, KVSlimmer and their baselines on today's transformers."""

from kvrepro import methods
from kvrepro.adapter import prepare
from kvrepro.cache import CompressedCache, make_cache
from kvrepro.decode import Decoder, generate
from kvrepro.evaluate import fidelity, perplexity, prefill
from kvrepro.models import load_model
from kvrepro.quantised import quantise
from kvrepro.recommend import Recommendation, recommend

__version__ = "0.1.0"

__all__ = [
    "CompressedCache",
    "Decoder",
    "Recommendation",
    "__version__",
    "fidelity",
    "generate",
    "load_model",
    "make_cache",
    "methods",
    "perplexity",
    "prefill",
    "prepare",
    "quantise",
    "recommend",
]
