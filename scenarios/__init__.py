"""What people run: `python -m scenarios.NAME --help`."""

import warnings

import backends  # noqa: F401  (sets the thread policy before torch is imported)

# peft asks transformers for an attribute that transformers has renamed; nothing to act on here.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
