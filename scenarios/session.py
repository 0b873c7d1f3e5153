"""What the real scenarios share: a private session, its training, and where the time went."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from backends.defaults import SCHEMES
from backends.files import end_replacing, writing
from backends.hardware import CPU, Hardware
from backends.he.store import PreparedModel
from backends.ledger import WorkerLedger
from backends.lock import alone
from backends.net.inprocess import worker_name
from backends.net.loop import Hooks
from backends.nn.adapters import lora_parameters
from backends.nn.checkpoint import room_bytes, set_aside
from backends.nn.skeleton import Skeleton
from backends.nn.texts import RUN_FILES, RUN_FOLDERS
from backends.nn.trainer import Trainer, TrainingInterrupted
from backends.places import PlaceError, output_directory, require_room, taken_bytes
from backends.session import HERE, Session, Usage, Workers, opened
from scenarios.estimate import Estimate, Shape, estimate
from scenarios.line import LineWatch, waits_for, watched
from scenarios.probe import LineProbe, Prober
from scenarios.real_trace import RealTrace


def chosen_workers(args: argparse.Namespace) -> Workers:
    """What `add_worker_options` gave. Raises what `Workers.at` does."""
    return Workers.at(args.worker, args.tls)


def open_ledger(out: Path, checkpoints: Path, workers: Workers = HERE) -> WorkerLedger:
    """The ledger of the run in directory `out`. No checkpoint rests on who is in it, afterwards.

    Raises LedgerError when it is damaged, or when the worker of this process was caught there.
    """
    ledger = WorkerLedger(out / "retired-workers.json")
    # Before anything is refused: whoever deletes the ledger's file must not go on from those.
    set_aside(checkpoints, ledger.retired)
    # Workers elsewhere are known by their keys, which they show when they are connected.
    ledger.require_one_of([] if workers.addresses else [worker_name(0)])
    return ledger


_MADE = (*RUN_FOLDERS, *RUN_FILES)
"""What a run puts into its directory."""
_STEP = r"data\.key|((damaged|distrusted)-)?step-\d{6,}(-again)*|\..*"
_REPLACED = {
    "corpus": r"corpus\.json|data\.key|tokens\.int32",
    "adapter": r"adapter_config\.json|adapter_model\.safetensors|README\.md",
    "adapter-comparison": r"adapter_config\.json|adapter_model\.safetensors|README\.md",
    "checkpoints": _STEP, "checkpoints-private": _STEP, "checkpoints-clear": _STEP,
}  # fmt: skip
"""Directories that a run replaces or deletes as a whole, and the names in them that are its own."""
_FINISHING = b"\nfinishing the step in work; Ctrl-C again ends at once (the last save stays)\n"


@contextmanager
def one_run(out: Path) -> Iterator[None]:
    """The one run in directory `out`, which is made; what a dead one has left unfinished goes.

    Raises PlaceError or WriteError when nothing can be written there, or what a run would replace
    there is somebody's own, HeldError when another process is at work there.
    """
    output_directory(out)
    for name, own in _REPLACED.items():
        _require_replaceable(out / name, own)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    mend = "wait until it has ended, stop it, or choose another --out"
    with alone(out / "run.lock", mend) as certain:
        if certain:
            with writing(out):
                end_replacing(out, _MADE)
        yield


def _require_replaceable(place: Path, own: str) -> None:
    """Raise PlaceError where anything is that no run has put there: it would be lost."""
    what = None
    if place.is_symlink():
        what = "is a link"
    elif place.is_dir():
        names = sorted(path.name for path in place.iterdir())
        foreign = [name for name in names if not re.fullmatch(own, name)]
        if foreign:
            what = f"holds {foreign[0]!r}, which no run has written"
    elif place.exists():
        what = "is a file"
    if what is not None:
        raise PlaceError(
            f"{place} {what}, where a run keeps what is its own and replaces it; choose another "
            "--out, or another name for that"
        )


def require_room_for_run(skeleton: Skeleton, rank: int, out: Path, checkpoints: Path) -> None:
    """Raise PlaceError when the adapter and its checkpoints will not fit on the disk of `out`."""
    shapes = [
        (group.in_features, outputs) for group in skeleton.groups for outputs in group.out_features
    ]
    needed = room_bytes(lora_parameters(shapes, rank)) - taken_bytes(checkpoints)
    require_room(out, needed, "this run", "choose another place with --out")


@contextmanager
def stopped_untainted(trainer: Trainer) -> Iterator[None]:
    """Around a session: what Ctrl-C leaves as an adapter obeys the rule of the finished one.

    Raises TaintedError instead of TrainingInterrupted when it rests on a worker that was caught.
    """
    try:
        yield
    except TrainingInterrupted:
        trainer.require_untainted()
        raise


class PrivateSession:
    """A session, and what a scenario knows of the line to its workers.

    workers  how many there are elsewhere
    """

    def __init__(self, session: Session, workers: int, watch: LineWatch) -> None:
        self._session = session
        self._workers = workers
        self.watch = watch
        self.usage, self.exactness = session.usage, session.exactness
        self.probed: LineProbe | None = None
        self.estimate: Estimate | None = None

    def probe(self, prepared: PreparedModel, unasked: Collection[int]) -> None:
        """Look at the line to the workers elsewhere, for a few seconds and MB at most."""
        shapes, ones = prepared.catalogue().matrices, self._session.product_of_ones
        self.probed = Prober(
            shapes, lambda m, tokens: ones(m, tokens, shapes[m].in_features),
            lambda: self.watch.away_s, lambda: self.usage().owner_s, unasked,
        ).run()  # fmt: skip

    def say_estimate(self, shape: Shape, steps: int) -> dict[str, Any]:
        """Print what so many steps will take over this line; the figures, or none.

        None for workers in this process, where there is no line, and where no step is left.
        """
        if self.probed is None or steps < 1:
            return {}
        hardware = self._session.hardware
        try:
            self.estimate = estimate(shape, self.probed, hardware, self._workers, steps)
        except (ValueError, RuntimeError) as error:
            print(f"no estimate of this run: {error}")
            return {}
        print("\n".join(self.estimate.lines()))
        return {"estimate": self.estimate.figures()}


def gradient_norm_figures(private: Sequence[float], clear: Sequence[float]) -> dict[str, Any]:
    """Norms of the gradient in each step before clipping, and the mean ratio, where both are."""
    ratios = [ours / theirs for ours, theirs in zip(private, clear, strict=False) if theirs]
    figures: dict[str, Any] = {"gradient_norms": list(private)}
    if ratios:
        figures["clear_gradient_norms"] = list(clear)
        figures["gradient_norm_ratio"] = mean(ratios)
    return figures


@contextmanager
def private_session(
    skeleton: Skeleton,
    prepared: PreparedModel,
    lanes: int,
    trace: RealTrace | None = None,
    hardware: Hardware = CPU,
    hint_bytes: int | None = None,
    ledger: WorkerLedger | None = None,
    workers: Workers = HERE,
    scheme: str = SCHEMES[0],
) -> Iterator[PrivateSession]:
    """A session (see `opened`) whose line is watched, and probed before it is used.

    trace   is told who did what when
    scheme  see `opened`
    """
    watch, known = LineWatch(), []

    def hooks(side: str) -> Hooks:
        made = trace.hooks(side) if trace else Hooks()
        return watched(made, watch) if side == "owner" else made

    def first(session: Session) -> None:
        known.append(PrivateSession(session, len(workers.addresses), watch))
        if workers.addresses:
            known[0].probe(prepared, skeleton.unasked)

    with opened(
        skeleton,
        prepared,
        lanes,
        hooks,
        hardware,
        hint_bytes,
        ledger,
        workers,
        first=first,
        scheme=scheme,
    ):
        yield known[0]


MUCH = 0.25
"""An error of products from which on a run says that it is large."""


def exactness_figures(session: PrivateSession) -> dict[str, Any]:
    """How exact this session's products are, for a report."""
    found = session.exactness()
    return {} if found is None else {"products": asdict(found)}


def exactness_line(products: Mapping[str, Any]) -> str:
    """The same for people."""
    line = (
        f"products are off by {products['median']:.1%} in the median matrix, by "
        f"{products['largest']:.1%} in {products['where']}; {products['wraps']:,} results wrapped "
        "and were repaired"
    )
    much = "; that is a lot: --preset exact costs more bytes and is more exact"
    return line + (much if products["largest"] > MUCH else "")


def usage_figures(used: Usage, seconds: float, tokens: int, lanes: int) -> dict[str, Any]:
    """Where the time of training steps went, and their traffic, for a report and a run's page.

    used     by the steps alone, which took `seconds` for `tokens` tokens
    """
    return {
        "private_s": seconds,
        "owner_cipher_s": used.owner_s,
        "worker_s": used.worker_s,
        "wire_s": max(0.0, used.waited_s - used.owner_s - used.worker_s),
        "owner_model_s": max(0.0, seconds - used.waited_s / lanes),
        "bytes_per_token_up": used.bytes_up / max(1, tokens),
        "bytes_per_token_down": used.bytes_down / max(1, tokens),
        "tokens_this_run": tokens,
        "blocks_encrypted": used.blocks,
        "answers_checked": used.answers,
    }


class Live:
    """What a progress bar says of the step before: tokens a second, the line, what it waits for.

    tokens  of a step
    """

    def __init__(self, session: PrivateSession, tokens: int, lanes: int) -> None:
        self._session, self._tokens, self._lanes = session, tokens, lanes
        self.resume()

    def resume(self) -> None:
        """A step begins: what was used since the one before is no step's."""
        watch = self._session.watch
        self._last = self._session.usage(), watch.away_s, watch.held_s

    def step_ended(self, seconds: float) -> dict[str, str]:
        """Names and values for the bar. seconds: of the step that has just ended."""
        session, (before, away_s, held_s) = self._session, self._last
        self.resume()
        found = {"tok/s": f"{self._tokens / seconds:.3g}"}
        if session.probed is None:
            return found
        used = self._last[0].since(before)
        away_s, held_s = self._last[1] - away_s, self._last[2] - held_s
        worker_s = session.estimate.worker_s if session.estimate else 0.0
        return found | {
            "up": f"{used.bytes_up / seconds / 1e6:.3g} MB/s",
            "down": f"{used.bytes_down / seconds / 1e6:.3g} MB/s",
            "waits for": waits_for(seconds, self._lanes, away_s, worker_s, held_s),
        }


def train_with_bar(
    trainer: Trainer,
    label: str,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
    trace: RealTrace | None = None,
    live: Live | None = None,
) -> list[float]:
    """Train under a live progress bar; returns the losses of all steps.

    live  says beside the loss how fast it goes, and what it waits for
    """
    with tqdm(
        total=max(trainer.config.steps, trainer.progress.step),
        initial=trainer.progress.step,
        desc=label,
        unit="step",
        dynamic_ncols=True,
    ) as bar:

        def on_step(step: int, loss: float) -> None:
            seen = {} if live is None else live.step_ended(trainer.step_seconds[-1])
            bar.set_postfix({"loss": f"{loss:.3f}", **seen}, refresh=False)
            bar.update(step - bar.n)
            if trace is not None:
                trace.step_ended(trainer.step_seconds[-1])
            after_step(step, loss)

        def on_return(why: str) -> None:
            bar.update(trainer.progress.step - bar.n)
            bar.write(why)

        def on_stop() -> None:  # in a signal's handler, amid whatever the bar prints
            with suppress(OSError):  # nobody is there to read it
                os.write(2, _FINISHING)

        if trace is None:
            return trainer.train(on_step, on_return, on_stop)
        trace.start()
        try:
            return trainer.train(on_step, on_return, on_stop)
        finally:
            trace.stop()
