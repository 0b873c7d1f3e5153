"""The real world: homomorphic encryption, drivers on a real clock, torch glue."""
