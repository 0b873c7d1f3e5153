"""Homomorphic encryption backends behind the small interface of `interface.py`.

Public (either side may import): params, plan, quantise, ring, public, interface.
Owner only, because they hold secrets: entropy, secret, mlwe_owner, reference.
Worker only: mlwe_worker. `clear` has both roles and no secret at all.
"""
