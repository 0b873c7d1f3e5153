"""What parameters promise: `python -m scenarios.params`."""
