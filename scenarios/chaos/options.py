"""What is drawn for one seed, and how long the run may then take."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

from backends.nn.trainer import TrainConfig
from protocol.owner_memory import OwnerConfig
from scenarios.chaos.model import MICRO_BATCH
from sim.faults import FaultPlan, draw_plan


@dataclass(frozen=True)
class Options:
    """Everything drawn for one seed.

    kind, cipher    which model, under `clear`, `mlwe` (results cannot wrap), `thin`, or a
                    scheme of OpenFHE, which is never drawn
    local_s, seal_s, multiply_s   (least, most) seconds of a lane's own layers before a product, of
                    an encryption or decryption, of a worker's product
    in_flight_max   requests a worker takes at once; beyond that it is busy
    """

    seed: int
    kind: str
    cipher: str
    workers: int
    steps: int
    micro_batches: int
    lanes: int
    checkpoint_every: int
    data_seed: int
    local_s: tuple[float, float]
    seal_s: tuple[float, float]
    multiply_s: tuple[float, float]
    owner: OwnerConfig
    in_flight_max: int
    plan: FaultPlan

    def __str__(self) -> str:
        """One line."""
        shown = [
            f"{item.name}={getattr(self, item.name)}"
            for item in fields(self)
            if item.name not in ("owner", "plan")
        ]
        return " ".join([*shown, str(self.owner), str(self.plan)])

    @property
    def training(self) -> TrainConfig:
        """The training run."""
        return TrainConfig(
            steps=self.steps, batch=self.micro_batches * MICRO_BATCH, micro_batch=MICRO_BATCH,
            learning_rate=0.02, warmup_steps=1, seed=self.data_seed,
        )  # fmt: skip

    @property
    def recovered_s(self) -> float:
        """Simulated seconds after the faults' end from which on nothing may fail any more.

        What is left behind by then: frames in the air, slowed tasks, a clock that jumped. Then
        every worker may have to be given up and greeted again, and the owner to be started again,
        twice.
        """
        plan, owner = self.plan, self.owner
        slowest = max([1.0, *(w.factor for w in plan.slow)])
        left_s = plan.delay_s[1] + plan.jumped_s + slowest * self.multiply_s[1] + self.trip_s
        given_up_s = (self.workers + 1) * owner.attempts_max * owner.wait_s_max
        greeted_s = owner.revive_s_max + owner.greetings_max * owner.timeout_s_max + plan.restart_s
        return left_s + 2 * (given_up_s + greeted_s)

    @property
    def trip_s(self) -> float:
        """The longest a product may take when all is well."""
        return 2 * self.plan.latency_s[1] + 2 * self.seal_s[1] + self.multiply_s[1]

    def bound_s(self, calls_per_pass: int) -> float:
        """Simulated seconds after the faults' end within which training must have ended.

        After the recovery, every product of the whole run may be computed anew, one by one; and
        once more for every liar, when training goes back to before its first answer.
        """
        lives = 1 + len(self.plan.liars)
        calls = lives * self.steps * self.micro_batches * calls_per_pass
        return self.recovered_s + calls * (self.trip_s + self.local_s[1])


def stream(seed: int, purpose: str) -> random.Random:
    """The seed's own generator for one purpose; the same on every machine and in every process."""
    return random.Random(f"chaos:{seed}:{purpose}")


def draw_options(seed: int, scheme: str | None = None) -> Options:
    """Everything of a run, from its seed; with a scheme, under that whatever cipher was drawn."""
    options = _drawn(seed)
    return options if scheme is None else replace(options, cipher=scheme)


def _drawn(seed: int) -> Options:
    rng = stream(seed, "options")
    workers, steps = rng.choice((1, 2, 2, 3)), rng.randint(3, 5)
    plan = draw_plan(stream(seed, "faults"), [f"worker{i}" for i in range(workers)], steps)
    seal_s, multiply_s = rng.uniform(0.0001, 0.002), rng.uniform(0.0002, 0.004)
    trip_s = 2 * plan.latency_s[1] + multiply_s
    request_s = rng.uniform(3, 12) * trip_s
    timeout_s_max = request_s * rng.uniform(2, 6)
    revive_s = rng.uniform(0.05, 0.4)
    return Options(
        seed=seed,
        kind="llama" if rng.random() < 0.1 else "plain",
        cipher="mlwe" if (drawn := rng.random()) < 0.25 else "thin" if drawn < 0.35 else "clear",
        workers=workers,
        steps=steps,
        micro_batches=rng.randint(3, 4),
        lanes=rng.randint(1, 4),
        checkpoint_every=rng.randint(1, 2),
        data_seed=rng.randrange(3),
        local_s=(0.0, rng.uniform(0.0, 0.005)),
        seal_s=(seal_s / 4, seal_s),
        multiply_s=(multiply_s / 4, multiply_s),
        owner=OwnerConfig(
            hello_timeout_s=rng.uniform(3, 10) * trip_s,
            request_timeout_s=request_s,
            timeout_s_max=timeout_s_max,
            attempts_max=rng.randint(2, 6),
            retry_s=rng.uniform(0.002, 0.02),
            refusals_max=rng.randint(4, 12),
            revive_s=revive_s,
            window=rng.randint(1, 8),
            window_bytes=rng.choice((1 << 28, 1 << 16, 1)),
            quiet_s=request_s * rng.uniform(0.3, 2),
            wait_s_max=timeout_s_max * rng.uniform(1, 3),
            greetings_max=rng.randint(2, 8),
            revive_s_max=revive_s * rng.uniform(1, 6),
            slow_bytes_per_s=rng.choice((1e9, 1e6)),
        ),
        in_flight_max=rng.choice((64, 64, 64, 2, 1)),
        plan=plan,
    )
