"""Homomorphic encryption backends behind the small interface of `interface.py`.

Public (either side may import): params, plan, quantise, ring, public, interface, store, estimate.
Public set-up, once per model: preparation (and cuda.hints, the same on a GPU).
Owner only, because they hold secrets: entropy, secret, integrity, check, direct, mlwe_owner,
scaled, reference, cuda.owner, cuda.check, openfhe.owner. Worker only: mlwe_worker, cuda.worker,
openfhe.worker. `clear` has both roles and no secret but its check's. `conformance` is what all of
them pass.
"""
