"""What people run: `python -m scenarios.NAME --help`."""

import backends  # noqa: F401  (sets the thread policy before torch is imported)
