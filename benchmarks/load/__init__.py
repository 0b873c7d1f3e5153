"""Many owners at one live worker: speed, fairness, and that each gets what it gets alone."""
