"""The two parameter sets. Public constants: neither side takes a context from the other.

Ring degree 2,048 with a ternary secret: OpenFHE's table of HEStd_128_classic, which it holds every
context against when it is made, allows a modulus of 54 bits. One prime of that size is all there
is, as there is nothing to rescale or to switch:

    bfv   q of 54 bits, t of 27, a prime = 1 mod 4096, so that 2,048 tokens fit into slots. Products
          are exact. What is left, 2^26, is far more than noise becomes: 3.2*||M_j|| of encrypting,
          with the key itself, and half a unit for each input, together below 2^22 for 16,384 inputs
    ckks  q of 53 bits, messages at a scale of 2^30, 1,024 tokens. Its noise stays: of each input,
          3.2 for every one of the 2,048 coefficients, half of which show in the real part of a slot
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import Any

from backends.he.openfhe import NAMES
from backends.he.openfhe.coefficients import CiphertextForm
from backends.he.openfhe.library import OpenFheError, openfhe
from backends.he.wire import Packing

RING = 2048
BFV_PLAIN = 134176769
"""The largest prime below 2^27 that is 1 mod 4096, the most OpenFHE takes with one modulus here."""
CKKS_SCALE_BITS = 30
_SIGMA = 3.19


@dataclass(frozen=True)
class OpenFheScheme:
    """One of the two, ready to use.

    context  OpenFHE's
    form     takes its ciphertexts apart and puts them together
    packing  sizes of what travels
    limit    largest |result|, in units of the message
    noise    standard deviation of what is added to each input, in these units
    scale    units of the message in 1 of OpenFHE's plaintexts
    """

    name: str
    context: Any
    form: CiphertextForm
    packing: Packing
    limit: float
    noise: float
    scale: float


def _bfv() -> Any:
    fhe = openfhe()
    wanted = fhe.CCParamsBFVRNS()
    wanted.SetPlaintextModulus(BFV_PLAIN)
    wanted.SetScalingModSize(54)
    return _context(wanted)


def _ckks() -> Any:
    fhe = openfhe()
    wanted = fhe.CCParamsCKKSRNS()
    wanted.SetFirstModSize(53)
    wanted.SetScalingModSize(CKKS_SCALE_BITS)
    wanted.SetScalingTechnique(fhe.FIXEDMANUAL)
    wanted.SetBatchSize(RING // 2)
    return _context(wanted)


def _context(wanted: Any) -> Any:
    fhe = openfhe()
    wanted.SetMultiplicativeDepth(0)
    wanted.SetSecurityLevel(fhe.HEStd_128_classic)
    wanted.SetSecretKeyDist(fhe.UNIFORM_TERNARY)
    wanted.SetKeySwitchTechnique(fhe.BV)
    wanted.SetRingDim(RING)
    try:
        context = fhe.GenCryptoContext(wanted)
    except RuntimeError as error:
        raise OpenFheError(
            f"this OpenFHE ({fhe.__version__}) refuses the parameters of this project: install the "
            "version in constraints.txt"
        ) from error
    context.Enable(fhe.PKE)
    context.Enable(fhe.LEVELEDSHE)
    return context


_MAKERS: dict[str, Callable[[], Any]] = dict(zip(NAMES, (_bfv, _ckks), strict=True))


@cache
def scheme(name: str) -> OpenFheScheme:
    """One of NAMES. Raises OpenFheError where OpenFHE is missing, or is another one."""
    context = _MAKERS[name]()
    bfv = name == "openfhe-bfv"
    zeros = [0] * RING if bfv else [0.0]
    encode = context.MakePackedPlaintext if bfv else context.MakeCKKSPackedPlaintext
    form = CiphertextForm(context, encode(zeros), RING)
    slots = RING if bfv else RING // 2
    constants = f"{name} v1: ring {RING}, q {form.modulus}, t {BFV_PLAIN}, 2^{CKKS_SCALE_BITS}"
    packing = Packing(hashlib.sha256(constants.encode()).digest(), slots, form.nbytes)
    if bfv:
        return OpenFheScheme(name, context, form, packing, BFV_PLAIN / 2, 0.0, 1.0)
    noise = sqrt(RING / 2 * (_SIGMA**2 + 1 / 12))
    # Slots are not coefficients: a message whose slots are all within a bound has coefficients
    # within twice that, as the real part of a slot and its conjugate are one number.
    return OpenFheScheme(
        name, context, form, packing, form.modulus / 4, noise, float(1 << CKKS_SCALE_BITS)
    )
