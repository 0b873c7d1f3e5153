"""Figures and names that a command's help shows and that modules act on which take long to load."""

from __future__ import annotations

from backends.he.openfhe import NAMES as OPENFHE

KERNELS = ("avx512vnni", "avxvnni", "avx2", "neon", "generic")
"""What can multiply int8 weights on a CPU, fastest first (`backends.he.matmul.choice`)."""
OWNER_TAG_BYTES = 1024
"""The longest tag."""
LEAST_REMOTE = 0.5
"""Of a model's frozen weights, so many must be computed by workers: otherwise it is refused."""
CLIP = 0.1
"""What a sequence's gradient may weigh, with differential privacy. Small enough that nearly every
one is clipped, as Li et al. (2022) advise for language models: Adam takes no notice of the scale,
and the noise goes with it."""
LEAST_DELTA = 1e-10
"""The accountant cuts tails of losses off and adds what was in them to delta: up to some 1e-12 in
long runs. A delta near that finds an epsilon that is true, and many times too large, or none."""
HELD_OUT = 0.05
"""Share of the documents that are not trained on."""
FLOATS = ("fp32", "bf16")
"""What a training in clear may compute in."""
SCHEMES = ("mlwe", *OPENFHE)
"""Ciphers by name: this project's own, and those it can be compared with in a whole run."""
SHARED_BLOCKS = 2**30
"""Blocks that share A, all owners of one model together: some 10^11 tokens in one linear."""
MAX_INPUTS = 1 << 20
"""Inputs of a product that every kernel takes (`backends.he.matmul`)."""
