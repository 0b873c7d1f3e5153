"""concrete-ml-extensions, which the published remote runs of this protocol use, as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import concrete_ml_extensions as concrete
import numpy as np

from benchmarks.peers.problem import SIDE, Row, inputs, relative_error, rounded, seconds, weights


def rows() -> Iterator[Row]:
    """Its one way."""
    parameters = concrete.MatmulCryptoParameters.deserialize(concrete.default_params())
    private, compression = concrete.create_private_key(parameters)
    x, table = inputs(1), weights()
    codes, scale = rounded(x)
    unsigned = codes.astype(np.uint64)
    encrypt_s, sent = seconds(lambda: concrete.encrypt_matrix(private, parameters, unsigned))
    matrix = np.ascontiguousarray(table.T.astype(np.int64)).astype(np.uint64)
    multiply_s, answer = seconds(lambda: concrete.matrix_multiplication(sent, matrix, compression))
    decrypt_s, opened = seconds(lambda: concrete.decrypt_matrix(answer, private, parameters, SIDE))
    found = opened.astype(np.int64).astype(np.float64) * scale
    yield Row(
        "concrete-ml-extensions", version("concrete-ml-extensions"), "GLWE, matrix", 1, multiply_s,
        encrypt_s + decrypt_s, len(sent.serialize()), len(answer.serialize()),
        len(compression.serialize()), relative_error(found, x, table), False,
        "its default parameters, one token, its own threads",
    )  # fmt: skip
