"""OpenFHE's BFV and CKKS as schemes: tokens packed into slots, multiplied by scalars, added up.

One ciphertext carries one input of up to `block_tokens` tokens, a token a slot. The worker makes of
K of them, for each output, the sum of weights times ciphertexts: no rotations, no products of
ciphertexts, so no evaluation keys, and nothing about a key ever leaves the owner.

`library` finds OpenFHE and says what is missing; `scheme` has the two parameter sets, which both
sides derive from constants; `coefficients` takes ciphertexts apart, so that nothing of OpenFHE's
own format is ever parsed that came off a wire. Owner only: `owner`. Worker only: `worker`.
"""

NAMES = ("openfhe-bfv", "openfhe-ckks")
