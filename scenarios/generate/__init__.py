"""Private completion: `python -m scenarios.generate`."""
