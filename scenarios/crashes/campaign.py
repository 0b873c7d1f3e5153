"""Kill -9, again and again, at random moments of small private trainings: is anything lost?

See `python -m scenarios.chaos --processes --help`, and `verdict.py` for what is counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scenarios.crashes import plan
from scenarios.crashes.disk import DamageError
from scenarios.crashes.plan import Fault
from scenarios.crashes.training import Bench, Failure, Training, adapters_by_step
from scenarios.crashes.verdict import Reference, Verdict, judge
from scenarios.crashes.wire import Wire
from scenarios.crashes.zygote import Starter, wait

STEPS = 24
UNDISTURBED = ("plain", "tls", "plain", "tls")
_PREPARING_S = 300.0


class Campaign:
    """Many trainings, one after the other, until so many processes were killed.

    starter  of processes; `owner` is the owner's command, as `Bench` has it
    place    an empty directory, where logs stay when something is found
    """

    def __init__(
        self, starter: Starter, certificates: Path, place: Path, seed: int,
        owner: tuple[str, ...] = ("scenarios.crashes.owner",), steps: int = STEPS,
    ) -> None:  # fmt: skip
        self.wire = Wire()
        self.verdict = Verdict()
        self.killed: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.trainings: Counter[str] = Counter()
        self.left_behind = 0
        self.lives = 0
        self.undisturbed_s = 0.0
        self._seed, self.place = seed, place
        logs = place / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._bench = Bench(starter, place / "model", certificates, logs, steps, owner)
        self.reference: Reference | None = None

    @property
    def kills(self) -> int:
        """Processes killed so far."""
        return self.killed.total()

    def bench_of(self, owner: tuple[str, ...]) -> Bench:
        """The same bench for another owner's command."""
        return replace(self._bench, owner=owner)

    def prepare(self, undisturbed: Sequence[str] = UNDISTURBED) -> None:
        """The public set-up, and what undisturbed trainings, over these lines, come to."""
        log = self._bench.logs / "prepare.log"
        child = self._bench.starter.start(
            "scenarios.crashes.owner", ["--model", str(self._bench.model), "--prepare"], log
        )
        if wait(child, _PREPARING_S) != 0:
            raise Failure(f"no model could be prepared: {log.read_text()[-300:]}")
        adapters, losses, counts = [], [], set()
        for number, transport in enumerate(undisturbed):
            place, start = self.place / f"undisturbed-{number}-{transport}", time.monotonic()
            by_step, history, books = adapters_by_step(self._bench, place, transport, self.wire)
            # The first compiles what is not compiled yet.
            self.undisturbed_s = time.monotonic() - start
            adapters.append(by_step)
            losses.append(history)
            counts |= {len(book.life.requests) for book in books if book.life is not None}
        each, rest = divmod(counts.pop(), self._bench.steps)
        if counts or rest:
            raise Failure("undisturbed trainings do not take the same number of requests a step")
        self.reference = Reference(adapters, losses, each)

    def run(self, kills: int, stop_at_first: bool = True) -> None:
        """Attack until so many kills. Raises Failure for what has no count of its own."""
        faults = plan.faults(self._seed)
        fault = next(faults)
        with tqdm(total=kills, unit="kill", dynamic_ncols=True) as bar:
            for number, transport in enumerate(plan.transports(self._seed), 1):
                name = f"training-{number:03d}-{transport}"
                fault = self._attack(name, transport, fault, faults, kills, bar)
                if self.kills >= kills or (stop_at_first and not self.clean):
                    return

    @property
    def clean(self) -> bool:
        """Whether nothing was found so far."""
        return self.verdict.clean and not self.wire.reused and not self.wire.unreadable

    def _attack(
        self, name: str, transport: str, fault: Fault, faults: Iterator[Fault], kills: int, bar: Any
    ) -> Fault:  # fmt: skip
        """One training to its end; returns the fault that is due next."""
        assert self.reference is not None
        with Training(self._bench, self.place / name, transport, self.wire) as training:
            while self.kills < kills and self._inflict(training, fault):
                bar.update(self.kills - bar.n)
                fault = next(faults)
            while training.wait(0.1):
                pass
        self.trainings[transport] += 1
        self.lives += len(training.books)
        self.left_behind += training.left_behind()
        verdict = judge(name, training.books, training.losses(), training.accused(), self.reference)
        self.verdict.add(verdict)
        bar.set_postfix(trainings=self.trainings.total(), found=len(self.verdict.found))
        if verdict.clean:
            training.clear_away()
        return fault

    def _inflict(self, training: Training, fault: Fault) -> bool:
        """Do it when it is due; False when the training had ended before."""
        if not training.wait(fault.after * self.undisturbed_s):
            return False
        if fault.kind == "owner saving":
            if not all(training.wait_for_saving() for _ in range(fault.saves)):
                return False
            time.sleep(fault.saving_s)
        match fault.kind:
            case "owner" | "owner saving":
                done = training.kill_owner()
                again = training.start_owner
            case "worker":
                done = training.kill_worker()
                again = training.start_worker
            case plan.FULL:
                done = training.fill_disk(fault.fits)
                again = training.start_owner
            case how:
                training.line.cut(how)
                done, again = True, training.line.heal
        if not done:
            return False
        (self.killed if fault.kind in plan.KILLS else self.others)[fault.kind] += 1
        time.sleep(fault.down_s)
        again()
        training.forgive()
        return True

    def figures(self) -> dict[str, Any]:
        """For the JSON file."""
        reference, distances = self.reference, self.verdict.distances
        assert reference is not None
        return {
            "kills": self.kills,
            **self.verdict.figures(),
            "reused_secrets": len(self.wire.reused),
            "found": [*self.verdict.found, *self.wire.reused[:20], *self.wire.unreadable[:20]],
            "seed": self._seed,
            "plan": plan.digest(self._seed, self.kills),
            "killed": dict(sorted(self.killed.items())),
            "cuts": {kind: self.others[kind] for kind in plan.CUTS},
            "disk_full": self.others[plan.FULL],
            "trainings": dict(sorted(self.trainings.items())),
            "steps_each": self._bench.steps,
            "lives_of_owners": self.lives,
            "requests_read": self.wire.seen,
            "requests_per_step": reference.requests_per_step,
            "unfinished_directories_left": self.left_behind,
            "undisturbed_trainings": reference.trainings,
            "undisturbed_s": round(self.undisturbed_s, 2),
            "undisturbed_distance": float(reference.noise[-1]),
            "last_step_moves": float(reference.one_step[-1]),
            "distances_in_undisturbed_distances": [round(float(d), 3) for d in sorted(distances)],
            "loss_noise": reference.loss_noise,
        }


def run(
    starter: Starter, certificates: Path, place: Path, seed: int, kills: int,
    owner: tuple[str, ...] = ("scenarios.crashes.owner",), steps: int = STEPS,
) -> tuple[dict[str, Any], str | None]:  # fmt: skip
    """A whole campaign: its figures, and one line about what was found, if anything."""
    campaign = Campaign(starter, certificates, place, seed, owner, steps)
    begun = time.perf_counter()
    campaign.prepare()
    prepared = time.perf_counter()
    why = []
    interrupted = False
    try:
        campaign.run(kills)
    except (Failure, DamageError) as failure:
        why = [str(failure)]
    except KeyboardInterrupt:
        interrupted = True  # what was judged until then counts
    figures = campaign.figures() | {"interrupted": interrupted}
    figures["seconds"] = round(time.perf_counter() - prepared, 1)
    figures["seconds_undisturbed"] = round(prepared - begun, 1)
    found = figures["found"] = why + figures["found"]
    return figures, found[0] if found else None
