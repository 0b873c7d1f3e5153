"""The training loop: lanes in flight, gradients summed in a fixed order, exact resume.

A step takes `batch` sequences in micro-batches of `micro_batch`. Up to `lanes` micro-batches
are in flight, each on its own thread; their gradients are added in the order of the data, not
of arrival, so the number of lanes changes the speed and not one bit of the result.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from backends.errors import Interrupted
from backends.interrupts import leave_terminal
from backends.ledger import TaintedError, WorkerLedger
from backends.nn import checkpoint
from backends.nn.adapters import config_text, trainable
from backends.nn.checkpoint import Progress
from backends.nn.corpus import Sequences, batch_indices
from backends.nn.dp import DifferentialPrivacy, DpSteps
from backends.nn.lean import lean
from backends.nn.losses import token_losses
from backends.nn.marks import counted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """What decides a run's result.

    batch, micro_batch  sequences of a step, and of one forward/backward pass
    learning_rate       peak; linear warm-up, then cosine to zero. All of it is a function of
                        `steps`, those of earlier runs included: a run that goes on with more of
                        them is from there on as one that was to have so many from the start
    max_grad_norm       of a step's gradient; not with differential privacy, which clips each
                        sequence's own and adds noise to their sum
    seed                of the data's order; with differential privacy nobody knows that
    privacy             limits what the adapter tells of any one sequence (`dp`); None for no limit
    """

    steps: int
    batch: int
    micro_batch: int
    learning_rate: float
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    privacy: DifferentialPrivacy | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.micro_batch < 1:
            raise ValueError("steps, batch and micro_batch are at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"a learning rate is positive and finite, not {self.learning_rate}")
        if self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} must divide batch {self.batch}")

    def settings(self, sequences: int) -> dict[str, Any]:
        """What two runs on so many sequences must agree on to be one. A budget of privacy may
        grow: its noise stays."""
        found, privacy = asdict(self), self.privacy
        del found["privacy"]
        delta = privacy and privacy.delta_of(sequences)
        return found | {"dp_clip": privacy and privacy.clip, "dp_delta": delta}

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        span = max(1, self.steps - self.warmup_steps)
        phase = min(1.0, (step - self.warmup_steps) / span)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * phase))


class TrainingInterrupted(Interrupted):
    """The user asked to stop; the text says what there is, and how to go on."""


def evaluate(
    model: nn.Module, sequences: Sequences, micro_batch: int, asked: int | None = None
) -> float:
    """Mean loss in nats per predicted token that is counted, over int64[n, S].

    A worker learns how many micro-batches there were. So that this tells nothing of how much text
    there is, as many are computed as `asked` sequences take: others are repeated and not counted.

    asked  at least n; None takes n itself, and tells it

    NaN when no token is counted.
    """
    there = len(sequences)
    asked = there if asked is None else asked
    if not 0 < there <= asked:
        raise ValueError(f"{there} sequences to evaluate on, where 1 to {asked} are asked for")
    model.eval()
    total, predicted = 0.0, 0
    with torch.no_grad():
        for start in range(0, asked, micro_batch):
            rows = sequences[torch.arange(start, start + micro_batch) % there]
            first = min(max(0, there - start), micro_batch)
            total += token_losses(model, rows, first).item()
            predicted += counted(rows[:first])
    return total / predicted if predicted else math.nan


def lane_threads(lanes: int) -> Executor:
    """One thread a lane."""
    return ThreadPoolExecutor(lanes, "lane")


class Trainer:
    """Fine-tunes a model's trainable parameters on packed sequences int64[n, S], ids or marked.

    A step's loss is the mean over the tokens of its batch that are counted.

    forget_lane     called when a lane's pass was cut short (see `Remote.forget_lane`)
    checkpoints     directory to save to and resume from; None keeps nothing
    identity        what besides the configuration a checkpoint must agree on
    pool            makes the executor of so many lanes: threads, or a simulated world's
    ledger          who serves and who was caught; when one that served is caught, training goes
                    back to the newest checkpoint from before its first answer
    say             is told in a line what is unexpected in a checkpoint that is resumed

    Of every step that was taken here: step_seconds, and gradient_norms, before they are clipped.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequences,
        config: TrainConfig,
        lanes: int = 1,
        forget_lane: Callable[[], None] = lambda: None,
        checkpoints: Path | None = None,
        checkpoint_every: int = 25,
        identity: dict[str, Any] | None = None,
        pool: Callable[[int], Executor] = lane_threads,
        ledger: WorkerLedger | None = None,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        self.config = config
        self.step_seconds: list[float] = []
        self.gradient_norms: list[float] = []
        self._model = model
        self._sequences = sequences
        self._lanes = lanes
        self._pool = pool
        self._forget_lane = forget_lane
        self._checkpoints = checkpoints
        self._every = checkpoint_every
        self._ledger = ledger or WorkerLedger()
        self._parameters = trainable(model)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._dp: DpSteps | None = None
        if config.privacy is not None:
            self._dp = DpSteps(model, len(sequences), config.batch, config.privacy)
        self._run = config.settings(len(sequences)) | (identity or {})
        self._adapter_config = config_text(model) if checkpoints is not None else None
        self._say = say
        self.progress = Progress(0, [], [])
        if checkpoints is not None:
            self._run["data"] = checkpoint.data_tag(checkpoints, sequences)
        self._restore()
        if self._dp is not None:
            self._dp.settle(self.progress.noise, max(config.steps, self.progress.step))
            self.progress.noise = self._dp.noise

    @property
    def dp(self) -> DpSteps | None:
        """What differential privacy makes of the steps; None without."""
        return self._dp

    def spent(self) -> tuple[float, float] | None:
        """(epsilon, delta) of the steps that are done; None without differential privacy."""
        if self._dp is None:
            return None
        return self._dp.spent(self.progress.step), self._dp.delta

    def train(
        self,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
        on_return: Callable[[str], None] = log.warning,
        on_stop: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """Run the steps that are left; returns the mean loss of every step.

        on_step    receives (steps done, mean loss)
        on_return  receives why training went back to an earlier step, `progress.step`
        on_stop    is called at the first Ctrl-C, within a signal's handler: the step in work is
                   finished first; the second ends it at once

        Raises TrainingInterrupted after Ctrl-C, when the step in work has been finished and saved,
        TaintedError when a worker that served was caught and there is no checkpoint to go back to.
        """
        self._model.train()
        if self.progress.step == 0:
            self._save()  # what rests on no worker at all
        adapted = nullcontext() if self._dp is None else self._dp.adapted()
        with (
            stop_on_interrupt(on_stop) as stop,
            adapted,
            _lanes(self._pool(self._lanes)) as pool,
        ):
            while self.progress.step < self.config.steps:
                start = time.perf_counter()
                try:
                    loss, norm = self._step(pool)
                except BaseException:
                    self._distrust()
                    raise
                self.step_seconds.append(time.perf_counter() - start)
                if self._caught():
                    on_return(self._go_back())
                    continue
                done = self.progress
                self.progress = replace(
                    done,
                    step=done.step + 1,
                    losses=[*done.losses, loss],
                    gradient_norms=[*done.gradient_norms, norm],
                    served=self._rests_on(),
                )
                on_step(self.progress.step, loss)
                last = self.progress.step == self.config.steps
                if last or stop.is_set() or self.progress.step % self._every == 0:
                    self._save()
                if stop.is_set() and not last:
                    raise TrainingInterrupted(self._stopped())
        return self.progress.losses

    def require_untainted(self) -> None:
        """Raise TaintedError when a worker was caught since the last step that rests on it."""
        if self._caught():
            self._distrust()
            raise TaintedError(
                f"{self._who()}, after step {self.progress.step}; what was trained rests on its "
                "answers and is not saved as a result. Run the same command again: training goes "
                "back to a checkpoint from before its first answer"
            )

    def _stopped(self) -> str:
        """After Ctrl-C: how far it came, what there is of it, and how to go on."""
        step = f"stopped after step {self.progress.step} of {self.config.steps}"
        if self._checkpoints is None:
            return f"{step}; no checkpoints are kept, so that nothing is left of it"
        place = checkpoint.place_of(self._checkpoints, self.progress.step)
        so_far = f"; {place} is an adapter that peft loads" if self._adapter_config else ""
        return f"{step}{so_far}; the same command goes on from there"

    def _rests_on(self) -> frozenset[str]:
        return self.progress.served | self._ledger.served

    def _caught(self) -> frozenset[str]:
        return self._rests_on() & self._ledger.retired.keys()

    def _who(self) -> str:
        caught = sorted(self._caught())
        were = "workers {} were" if len(caught) > 1 else "worker {} was"
        return f"{were.format(', '.join(caught))} caught giving wrong answers"

    def _go_back(self) -> str:
        why, step = self._who(), self.progress.step + 1
        if self._checkpoints is None:
            raise TaintedError(
                f"{why} in step {step}; earlier ones that passed are in this training, which keeps "
                "no checkpoints to go back to: start over without that worker"
            )
        self._ledger.start_over()
        if not self._restore():
            raise TaintedError(
                f"{why} in step {step}, and the checkpoints in {self._checkpoints} are gone: "
                "start over without that worker"
            )
        return f"{why} in step {step}; back to step {self.progress.step}, before its first answer"

    def _restore(self) -> bool:
        """Resume from the newest checkpoint that may be trusted; whether there is one."""
        if self._checkpoints is None:
            return False
        found = checkpoint.restore(
            self._checkpoints,
            self._run,
            self._parameters,
            self._optimizer,
            self._ledger.retired,
            self._say,
        )
        self.progress = found or self.progress
        return found is not None

    def _distrust(self) -> None:
        """Before a run ends: what rests on a worker that was caught is not gone on from, ever."""
        if self._checkpoints is not None and self._caught():
            checkpoint.set_aside(self._checkpoints, self._ledger.retired)

    def _step(self, pool: Executor) -> tuple[float, float]:
        """One step; its mean loss, and its gradient's norm before clipping."""
        step, config, dp = self.progress.step, self.config, self._dp
        if dp is None:
            chosen = batch_indices(step, config.batch, len(self._sequences), config.seed)
            batch = self._sequences[chosen]
        else:
            batch = dp.batch(self._sequences)
        parts = torch.split(batch, config.micro_batch)
        predicted = max(1, counted(batch))
        passes = deque(pool.submit(self._pass, part, predicted) for part in parts)
        total = 0.0
        sums: list[torch.Tensor] | None = None
        try:
            while passes:  # a pass holds its gradients
                loss, gradients = passes.popleft().result()
                total += loss
                if sums is None:
                    sums = list(gradients)
                else:
                    for kept, new in zip(sums, gradients, strict=True):
                        kept.add_(new)
        except BaseException:
            for future in passes:
                future.cancel()
            raise
        assert sums is not None
        if dp is not None:
            sums = dp.released(sums)
        for parameter, gradient in zip(self._parameters.values(), sums, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        norm = nn.utils.clip_grad_norm_(
            self._parameters.values(), config.max_grad_norm if dp is None else math.inf
        )
        if not (torch.isfinite(norm) and math.isfinite(total)):
            raise FloatingPointError(
                f"step {step + 1}: the loss or its gradient is not finite; lower the learning rate "
                f"({config.learning_rate:g}) or look at the data"
            )
        self.gradient_norms.append(norm.item())
        for group in self._optimizer.param_groups:
            group["lr"] = config.rate(step)
        self._optimizer.step()
        return total, norm.item()

    def _pass(self, part: torch.Tensor, predicted: int) -> tuple[float, tuple[torch.Tensor, ...]]:
        """One lane: loss and gradients of a micro-batch, as its share of the step's mean.

        With differential privacy gradients are the sum of its sequences' clipped ones.
        """
        try:
            if self._dp is not None:
                total, sums = self._dp.clipped(part)
                return total / predicted, sums
            with lean():
                loss = token_losses(self._model, part) / predicted
            # On this lane's own thread: autograd has one thread a GPU, on which the lanes would
            # wait for each other's remote linears.
            with torch.autograd.set_multithreading_enabled(False):
                # Adapters of what only chooses, as an indexer does, have none.
                gradients = torch.autograd.grad(
                    loss, list(self._parameters.values()), allow_unused=True, materialize_grads=True
                )
        finally:
            self._forget_lane()
        return loss.item(), gradients

    def _save(self) -> None:
        if self._checkpoints is not None:
            checkpoint.save(
                self._checkpoints,
                self.progress,
                self._run,
                self._parameters,
                self._optimizer,
                self._adapter_config,
            )


@contextmanager
def _lanes(pool: Executor) -> Iterator[Executor]:
    """Waits for the lanes at the end; not after Ctrl-C, when they wait for a worker themselves.

    Those end when the session does.
    """
    try:
        yield pool
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown()
        raise
    pool.shutdown()


@contextmanager
def stop_on_interrupt(on_stop: Callable[[], None]) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; a second one stops at once.

    So does a terminal that is closed, but where that is ignored, as by nohup. It is often told
    twice: that is no second wish.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if stop.is_set():
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        stop.set()
        on_stop()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
