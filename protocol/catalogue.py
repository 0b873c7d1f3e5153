"""What both sides know of the model: one entry per matrix, with its public sizes.

Message sizes depend on this table and the token count, and on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import DIGEST_BYTES, MAX_BODY_BYTES, OVERHEAD_BYTES


@dataclass(frozen=True)
class MatrixShape:
    """One direction of one frozen linear group.

    block_tokens  that travel together: fewer in a last block take as many bytes as all of one
    """

    name: str
    in_features: int
    out_features: int
    up_bytes_per_block: int
    down_bytes_per_block: int
    block_tokens: int = 1

    def __post_init__(self) -> None:
        for value in (
            self.in_features,
            self.out_features,
            self.up_bytes_per_block,
            self.down_bytes_per_block,
            self.block_tokens,
        ):
            if value < 1:
                raise ValueError(f"matrix {self.name!r}: sizes are at least 1")

    def blocks(self, tokens: int) -> int:
        """Of so many tokens."""
        return -(-tokens // self.block_tokens)

    def up_bytes(self, tokens: int) -> int:
        """Payload bytes of a request."""
        return self.up_bytes_per_block * self.blocks(tokens)

    def down_bytes(self, tokens: int) -> int:
        """Payload bytes of an answer."""
        return self.down_bytes_per_block * self.blocks(tokens)


@dataclass(frozen=True)
class Catalogue:
    """The matrices of one model under one parameter set; a matrix is named by its index."""

    model_digest: bytes
    parameters_digest: bytes
    matrices: tuple[MatrixShape, ...]

    def __post_init__(self) -> None:
        for digest in (self.model_digest, self.parameters_digest):
            if len(digest) != DIGEST_BYTES:
                raise ValueError(f"a digest has {DIGEST_BYTES} bytes, got {len(digest)}")

    def largest_frame(self, tokens: int) -> int:
        """Bytes that no frame of either side exceeds, requests having at most so many tokens."""
        most = max(max(m.up_bytes(tokens), m.down_bytes(tokens)) for m in self.matrices)
        return OVERHEAD_BYTES + most

    def tokens_max(self, matrix: int) -> int:
        """Tokens of one request whose frame, and whose answer's, can be encoded."""
        shape = self.matrices[matrix]
        per_block = max(shape.up_bytes_per_block, shape.down_bytes_per_block)
        return (MAX_BODY_BYTES - OVERHEAD_BYTES) // per_block * shape.block_tokens

    def both_bytes(self, matrix: int, tokens: int) -> int:
        """Payload bytes of a request and its answer together."""
        return self.up_bytes(matrix, tokens) + self.down_bytes(matrix, tokens)

    def up_bytes(self, matrix: int, tokens: int) -> int:
        """Payload bytes of a request."""
        return self.matrices[matrix].up_bytes(tokens)

    def down_bytes(self, matrix: int, tokens: int) -> int:
        """Payload bytes of an answer."""
        return self.matrices[matrix].down_bytes(tokens)
