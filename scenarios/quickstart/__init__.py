"""A first private fine-tuning: `python -m scenarios.quickstart`."""
