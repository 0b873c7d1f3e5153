"""Homomorphic encryption backends behind the small interface of `interface.py`.

Public (either side may import): params, plan, quantise, ring, public, interface, store, estimate.
Public set-up, once per model: preparation (and cuda.hints, the same on a GPU).
Owner only, because they hold secrets: entropy, secret, integrity, check, mlwe_owner, reference,
cuda.owner, cuda.check. Worker only: mlwe_worker, cuda.worker. `clear` has both roles and no
secret but its check's.
"""
