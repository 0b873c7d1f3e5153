"""What people run: `python -m scenarios.NAME --help`."""

import sys
import warnings

from scenarios.privacy import private_process

# `python -m scenarios.NAME`, and nothing of it has been read or imported yet: from here on nobody
# looks into this process. (Python sets this first argument while it looks for the module.)
if sys.argv[:1] == ["-m"]:
    private_process()

import backends  # noqa: F401  (sets the thread policy before torch is imported)

# peft asks transformers for an attribute that transformers has renamed; nothing to act on here.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
