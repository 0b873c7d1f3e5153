"""The real world: homomorphic encryption, drivers on a real clock, torch glue."""

import os

# Torch's OpenMP threads spin for milliseconds after each parallel region, on the very cores
# that the ring kernels then need: it costs the owner a third of its speed and clear torch
# nothing measurable. Read when libgomp loads, so it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
