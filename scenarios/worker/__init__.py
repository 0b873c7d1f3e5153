"""A worker for owners elsewhere: `python -m scenarios.worker`."""
