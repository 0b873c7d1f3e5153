"""Steps that are lost or done twice, and whether an adapter is the right one: judged from outside.

Three witnesses, none of which is the product's word for it:

  the disk   a complete checkpoint of step k promises that k steps are done and need not be again
  the wire   every step takes the same number of different requests, so their count says how many
             steps a life of the owner worked for (plain text only)
  the bits   the adapter, beside those of undisturbed trainings after each step; a step moves it by
             a hundred times what the cipher's noise does

lost_steps     steps that were done and are not there: the wire proves that step k was over (a
               request of the next one passed) and no checkpoint has it after the death; a later
               life worked again for what had been kept; a step is counted that nobody worked for;
               or an adapter is where it was so many steps before
doubled_steps  steps that are in the adapter twice: worked again for, though the adapter had them;
               or an adapter is so many steps further than it is said to be
other_adapters trainings whose adapter, losses or number of losses is not that of an undisturbed
               one within the noise, whatever the reason

A step that was in work when its owner died is done again, by right: it had not been kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenarios.crashes.training import Book, Failure

_NOISES = 3.0
_STEP_SHARE = 0.1
_LOSS_NOISES = 20.0


class Reference:
    """What undisturbed trainings come to. At least two of them: they differ, by the noise.

    adapters  float64[steps + 1, P] of each
    losses    of each, nats per token
    """

    def __init__(
        self, adapters: Sequence[NDArray[np.float64]], losses: Sequence[Sequence[float]],
        requests_per_step: int,
    ) -> None:  # fmt: skip
        self.steps = len(adapters[0]) - 1
        self.requests_per_step = requests_per_step
        self._middle = np.mean(adapters, axis=0)
        apart = [np.linalg.norm(a - b, axis=1) for a, b in itertools.combinations(adapters, 2)]
        self.noise: NDArray[np.float64] = np.max(apart, axis=0)
        """[steps + 1]: the largest distance of two undisturbed adapters after each step."""
        moved = np.linalg.norm(np.diff(self._middle, axis=0), axis=1)
        self.one_step: NDArray[np.float64] = np.concatenate([moved[:1], moved])
        """[steps + 1]: how far each step moves the adapter."""
        self._losses = np.mean(losses, axis=0)
        self.loss_noise = float(np.ptp(np.asarray(losses), axis=0).max())
        self.trainings = len(adapters)

    def distance(self, step: int, adapter: NDArray[np.float64]) -> float:
        """From the middle of the undisturbed ones after that step."""
        if adapter.shape != self._middle[step].shape:
            return float("inf")
        return float(np.linalg.norm(adapter - self._middle[step]))

    def right(self, step: int, adapter: NDArray[np.float64]) -> bool:
        """Whether an adapter is that of so many steps."""
        bar = max(_NOISES * self.noise[step], _STEP_SHARE * self.one_step[step])
        return self.distance(step, adapter) <= float(bar)

    def place(self, adapter: NDArray[np.float64]) -> int:
        """The step whose undisturbed adapter is nearest."""
        return int(np.argmin([self.distance(k, adapter) for k in range(self.steps + 1)]))

    def same_losses(self, losses: Sequence[float]) -> bool:
        """Whether a history is that of all steps."""
        if len(losses) != self.steps:
            return False
        apart = np.abs(np.asarray(losses) - self._losses).max()
        return bool(apart <= _LOSS_NOISES * self.loss_noise)


@dataclass
class Verdict:
    """On one training, or the sum over many."""

    lost_steps: int = 0
    doubled_steps: int = 0
    other_adapters: int = 0
    accused: int = 0
    found: list[str] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    """Of the adapters at the end, in units of the undisturbed ones' largest distance."""

    def add(self, other: Verdict) -> None:
        """Sum up."""
        self.lost_steps += other.lost_steps
        self.doubled_steps += other.doubled_steps
        self.other_adapters += other.other_adapters
        self.accused += other.accused
        self.found += other.found
        self.distances += other.distances

    def figures(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "lost_steps": self.lost_steps,
            "doubled_steps": self.doubled_steps,
            "other_adapters": self.other_adapters,
            "honest_workers_accused": self.accused,
        }

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.found


def judge(
    name: str, books: Sequence[Book], losses: Sequence[float], accused: bool, reference: Reference
) -> Verdict:
    """What became of a training that has ended."""
    verdict = Verdict(accused=int(accused))
    if accused:
        verdict.found.append(f"{name}: an honest worker was held for a liar")
    for number, book in enumerate(books, 1):
        if _judge_life(f"{name}, life {number}", book, reference, verdict):
            break  # what comes later follows from it
    last = books[-1]
    if not last.ended or last.kept != reference.steps or last.adapter is None:
        raise Failure(f"{name}: the owner says it is done and has kept {last.kept} steps")
    verdict.distances.append(reference.distance(last.kept, last.adapter) / reference.noise[-1])
    same = reference.same_losses(losses)
    if not (reference.right(last.kept, last.adapter) and same):
        verdict.other_adapters += 1
        what = "losses are" if not same else "adapter is"
        verdict.found.append(
            f"{name}: the {what} not that of an undisturbed training (distance "
            f"{verdict.distances[-1]:.1f} times that of two of those)"
        )
    return verdict


def _judge_life(name: str, book: Book, reference: Reference, verdict: Verdict) -> bool:
    """Add what one life shows to the verdict; whether the adapter was off at its end."""
    off = book.adapter is not None and not reference.right(book.kept, book.adapter)
    gained, lost, again = book.kept - book.began, 0, 0
    if book.life is not None:
        count, each = len(book.life.requests), reference.requests_per_step
        worked = count // each
        over = (count - 1) // each if count and not book.ended else worked
        lost = max(0, gained - worked)
        again = max(0, over - gained)
    place = book.kept
    if off and not lost and not again:
        assert book.adapter is not None
        place = reference.place(book.adapter)
    verdict.lost_steps += lost + max(0, book.kept - place) + (0 if off else again)
    verdict.doubled_steps += max(0, place - book.kept) + (again if off else 0)
    if lost:
        verdict.found.append(f"{name}: {lost} steps are counted that nobody worked for")
    if again:
        why = "are in the adapter twice" if off else "were worked for and are not kept"
        verdict.found.append(f"{name}: {again} steps {why}")
    if place != book.kept:
        verdict.found.append(
            f"{name}: the checkpoint of step {book.kept} holds the adapter of step {place}"
        )
    return off
