"""Which worker gets the next request."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from protocol.errors import MisuseError


@dataclass(frozen=True)
class Placement:
    """Which workers hold which matrix, in order of preference; requests go to the least loaded.

    where  one tuple of worker names per matrix of the catalogue
    """

    where: tuple[tuple[str, ...], ...]

    @classmethod
    def everywhere(cls, peers: Sequence[str], matrices: int) -> Placement:
        """Every worker holds every matrix."""
        return cls((tuple(peers),) * matrices)

    def check(self, peers: Sequence[str], matrices: int) -> None:
        """Raise MisuseError unless every matrix has a holder, and every holder is a peer."""
        if len(self.where) != matrices:
            raise MisuseError(
                f"a placement of {len(self.where)} matrices, the model has {matrices}"
            )
        for matrix, names in enumerate(self.where):
            if not names or not set(names) <= set(peers):
                raise MisuseError(f"matrix {matrix} is placed on {names}; workers are {peers}")

    def holders(self, matrix: int, among: Container[str]) -> list[str]:
        """The workers of `among` that hold a matrix."""
        return [name for name in self.where[matrix] if name in among]

    def covered(self, left: Sequence[str]) -> bool:
        """Whether the workers left hold every matrix between them."""
        alive = set(left)
        return all(not alive.isdisjoint(names) for names in set(self.where))

    def choose(self, able: Sequence[str], in_flight: Mapping[str, int], window: int) -> str | None:
        """The able worker with the fewest requests in flight, the first of equals.

        Returns None when each of them has `window` requests in flight already.
        """
        free = [peer for peer in able if in_flight[peer] < window]
        return min(free, key=lambda peer: in_flight[peer], default=None)
