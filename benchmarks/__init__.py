"""Measurements. Every speed is a ratio of both sides in one run: `python -m benchmarks.NAME`."""

import backends  # noqa: F401  (sets the thread policy before torch is imported)
