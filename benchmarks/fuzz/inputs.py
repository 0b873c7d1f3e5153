"""What is thrown: frames that are random, almost right, or right in the wrong place.

Everything is drawn from a generator that the caller seeds: same seed, same inputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from protocol.catalogue import Catalogue
from protocol.messages import (
    HEADER_BYTES,
    MAGIC,
    MAX_BODY_BYTES,
    VERSION,
    Bye,
    Farewell,
    Hello,
    Message,
    Multiply,
    Product,
    Reason,
    Refuse,
    Welcome,
    encode,
)

_SMALL = (0, 1, 2, 3, 7, 8, 255, 256)
_EDGES = (*_SMALL, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_EDGES_64 = (*_EDGES, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
# Of the header: version, kind, zero, body length; of the bodies: whatever starts at a field.
_FIELDS = ((4, 1), (5, 1), (6, 2), (24, 4), (28, 8), (36, 2), (36, 4), (40, 4), (92, 4))


def stream(seed: int, purpose: str) -> random.Random:
    """The seed's own generator for one purpose; the same on every machine and in every process."""
    return random.Random(f"fuzz:{seed}:{purpose}")


class Frames:
    """Draws frames against one model.

    catalogue   of the machine that is thrown at: sizes and digests that it takes for right
    sessions    ids to speak under; the first is the one a peer would use
    tokens_max  of a request whose payload has the right size
    """

    def __init__(
        self,
        rng: random.Random,
        catalogue: Catalogue,
        sessions: Sequence[bytes],
        tokens_max: int = 8,
    ) -> None:
        self._rng, self._catalogue, self._tokens_max = rng, catalogue, tokens_max
        self.sessions = list(sessions)
        self.requests = list(_SMALL)
        self._kinds: dict[str, Callable[[], bytes]] = {
            "legal": self.legal,
            "random bytes": self._random,
            "random body": self._random_body,
            "bits flipped": self._flipped,
            "cut short": self._cut,
            "too long": self._extended,
            "length that lies": self._lying,
            "number at its limit": self._edge,
            "two frames spliced": self._spliced,
        }
        self._names = tuple(self._kinds)

    def draw(self) -> tuple[str, bytes]:
        """(kind, frame)."""
        name = self._rng.choice(self._names)
        return name, self._kinds[name]()

    def whole(self) -> tuple[str, bytes]:
        """(kind, frame) with a header that a link lets through, whatever else is wrong."""
        name, frame = self.draw()
        if len(frame) < HEADER_BYTES:
            frame = frame.ljust(HEADER_BYTES, b"\0")
        body = frame[HEADER_BYTES:]
        return name, MAGIC + frame[4:24] + len(body).to_bytes(4, "little") + body

    def message(self) -> Message:
        """A message that either side might say, in any order."""
        rng, session = self._rng, self._rng.choice(self.sessions)
        request = rng.choice(self.requests)
        digests = [self._catalogue.parameters_digest, self._catalogue.model_digest]
        if rng.random() < 0.2:
            digests[rng.randrange(2)] = rng.randbytes(32)
        match rng.randrange(10):
            case 0:
                return Hello(session, *digests)
            case 1:
                return Welcome(session, *digests, max(1, rng.choice(_EDGES)))
            case 2 | 3 | 4:
                return self._multiply(session, request)
            case 5 | 6:
                return Product(session, request, self._payload(down=True)[2])
            case 7:
                return Refuse(session, rng.choice((0, request)), rng.choice(list(Reason)))
            case 8:
                return Bye(session)
            case _:
                return Farewell(session)

    def legal(self) -> bytes:
        """A frame of such a message."""
        frame = encode(self.message())
        assert isinstance(frame, bytes)
        return frame

    def _payload(self, down: bool) -> tuple[int, int, bytes]:
        """(matrix, tokens, payload), of the right size but for one in five."""
        rng = self._rng
        matrix, tokens = (
            rng.randrange(len(self._catalogue.matrices)),
            rng.randint(1, self._tokens_max),
        )
        size = (self._catalogue.down_bytes if down else self._catalogue.up_bytes)(matrix, tokens)
        if rng.random() < 0.2:
            size = max(0, size + rng.choice((-size, -1, 1, size)))
        return matrix, tokens, rng.randbytes(size)

    def _multiply(self, session: bytes, request: int) -> Multiply:
        matrix, tokens, payload = self._payload(down=False)
        if self._rng.random() < 0.2:
            matrix = self._rng.choice(_EDGES)
        if self._rng.random() < 0.2:
            tokens = self._rng.choice(_EDGES)
        return Multiply(session, request, matrix, tokens, payload)

    def _random(self) -> bytes:
        return self._rng.randbytes(self._rng.choice((0, 1, 4, 27, 28, 29, 64, 200)))

    def _random_body(self) -> bytes:
        rng = self._rng
        body = rng.randbytes(rng.choice((0, 1, 7, 8, 9, 10, 16, 17, 64, 68, 69, 200)))
        head = MAGIC + bytes((VERSION, rng.randrange(10), 0, 0)) + rng.choice(self.sessions)
        return head + len(body).to_bytes(4, "little") + body

    def _flipped(self) -> bytes:
        frame = bytearray(self.legal())
        for _ in range(self._rng.choice((1, 1, 2, 8))):
            frame[self._rng.randrange(len(frame))] ^= 1 << self._rng.randrange(8)
        return bytes(frame)

    def _cut(self) -> bytes:
        frame = self.legal()
        return frame[: self._rng.randrange(len(frame))]

    def _extended(self) -> bytes:
        return self.legal() + self._rng.randbytes(self._rng.choice((1, 2, 28, 100)))

    def _lying(self) -> bytes:
        frame, rng = self.legal(), self._rng
        length = len(frame) - HEADER_BYTES
        said = rng.choice((0, length - 1, length + 1, 2 * length, MAX_BODY_BYTES - 1,
                           MAX_BODY_BYTES, MAX_BODY_BYTES + 1, 2**32 - 1))  # fmt: skip
        return frame[:24] + max(0, said).to_bytes(4, "little") + frame[HEADER_BYTES:]

    def _edge(self) -> bytes:
        frame, rng = self.legal(), self._rng
        place, width = rng.choice(_FIELDS)
        edges = _EDGES_64 if width == 8 else _EDGES
        value = rng.choice(edges) % (1 << 8 * width)
        if place + width > len(frame):
            return frame
        return frame[:place] + value.to_bytes(width, "little") + frame[place + width :]

    def _spliced(self) -> bytes:
        first, second = self.legal(), self.legal()
        return (
            first[: self._rng.randrange(len(first) + 1)]
            + second[self._rng.randrange(len(second) + 1) :]
        )
