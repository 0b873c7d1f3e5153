"""The real world: homomorphic encryption, drivers on a real clock, torch glue."""

import os
import sys

# Torch's OpenMP threads spin for milliseconds after each parallel region, on the very cores
# that the ring kernels then need: it costs the owner a third of its speed and clear torch
# nothing measurable. Read when libgomp loads, so it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# `python -m scenarios.NAME` or `benchmarks.NAME`, of which nothing has been imported yet.
if sys.argv[:1] == ["-m"]:
    from backends.interrupts import end_while_loading

    end_while_loading()
