"""A zoo of tiny random models, each through our path and in clear: `python -m benchmarks.zoo`."""
