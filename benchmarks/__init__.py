"""Timings of the package beside its peers; ``python -m benchmarks`` runs them."""
