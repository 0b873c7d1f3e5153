"""The public set-up of a model: prepared ahead of time, verified, a worker's part copied out."""
