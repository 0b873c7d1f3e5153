"""A zoo of tiny random models: is every one the same through our path? `python -m benchmarks.zoo`."""
