"""How hard the cipher is to break: known lattice attacks on LWE, costed as the field costs them.

lwe (the problem) <- reduction (what BKZ and sieving cost) <- attacks <- verdict (all of them, and
the least that a parameter set must have). Public arithmetic only; nothing here is needed to run the
cipher. Every figure is a heuristic estimate of the attacks that are modelled, no proof: see
docs/security.md.
"""
