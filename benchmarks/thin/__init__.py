"""What thin ciphertexts cost: `python -m benchmarks.thin`."""
