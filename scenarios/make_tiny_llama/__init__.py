"""A small real model from nothing: `python -m scenarios.make_tiny_llama`."""
