"""Which worker may get which request."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from protocol.errors import MisuseError


@dataclass(frozen=True)
class Placement:
    """Which workers hold which matrix, in order of preference.

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
