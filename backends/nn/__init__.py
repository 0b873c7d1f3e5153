"""Torch glue on the owner's side: remote linears, lanes, training, adapters, checkpoints."""
