"""One encrypted linear layer by this project and by others: `python -m benchmarks.peers`."""

PEERS = ("ours", "concrete_ml", "desilo", "tenseal_packed", "openfhe_packed")
"""Modules of this package, each with `rows()`."""
