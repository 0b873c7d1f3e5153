"""A worker is caught in mid-training: what rests on its answers is undone, at once or at a restart.

Workers are honest for a while, then lie. With `clear` every bit of the outcome is that of training
that the liar never took part in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends.he.clear import ClearWorker
from backends.ledger import WorkerLedger
from backends.net.owner import RemoteLinearError
from backends.nn.adapters import add_lora, trainable
from backends.nn.checkpoint import ResumeError
from backends.nn.trainer import TaintedError, TrainConfig, Trainer, evaluate
from tests.nn.conftest import Tiny, tokens

CONFIG = TrainConfig(steps=6, batch=2, micro_batch=1, learning_rate=1e-2, warmup_steps=1)
DATA = tokens(10, 12)


class Turncoat(ClearWorker):
    """Fails at first, so many times; then honest for so many products; then rolls its answers."""

    def __init__(self, honest: int, silent: int = 0) -> None:
        self.honest = honest
        self.silent = silent
        self.answered = 0

    def multiply(self, payload: Any, tokens: int, matrix: Any) -> Any:
        self.answered += 1
        if self.answered <= self.silent:
            raise RuntimeError("not now")
        right = super().multiply(payload, tokens, matrix)
        return right if self.answered <= self.silent + self.honest else np.roll(right, 4)


class Run:
    """One start of the owner; a directory makes it resume."""

    def __init__(self, tiny: Tiny, directory: Path | None, ledger: WorkerLedger) -> None:
        self.tiny, self.ledger = tiny, ledger
        self.skeleton = tiny.skeleton()
        self.model = add_lora(self.skeleton.model, 4, 8, seed=0)
        self.trainer = Trainer(
            self.model, DATA, CONFIG, forget_lane=self.skeleton.remote.forget_lane,
            checkpoints=directory, checkpoint_every=1, ledger=ledger,
        )  # fmt: skip
        self.returns: list[tuple[int, str]] = []
        self.steps: list[int] = []

    def train(self, *workers: ClearWorker) -> Run:
        def on_return(why: str) -> None:
            self.returns.append((self.trainer.progress.step, why))

        with self.tiny.connected(self.skeleton, "clear", workers=workers, ledger=self.ledger):
            self.trainer.train(lambda step, loss: self.steps.append(step), on_return)
        return self

    def outcome(self) -> tuple[list[float], dict[str, torch.Tensor]]:
        adapter = {name: p.detach().clone() for name, p in trainable(self.model).items()}
        return self.trainer.progress.losses, adapter


def same(run: Run, other: Run) -> bool:
    (losses, mine), (expected, theirs) = run.outcome(), other.outcome()
    return losses == expected and all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def untouched(llama: Tiny) -> Run:
    """A training that no liar took part in."""
    return Run(llama, None, WorkerLedger()).train(ClearWorker())


@pytest.fixture(scope="module")
def products(llama: Tiny) -> int:
    """Of one step."""
    counted = Turncoat(10**9)
    Run(llama, None, WorkerLedger()).train(counted)
    assert counted.answered % CONFIG.steps == 0
    return counted.answered // CONFIG.steps


def test_training_goes_back_to_before_a_liars_first_answer(
    llama: Tiny, tmp_path: Path, untouched: Run, products: int
) -> None:
    """It served from the first step on: all of it is done again, by the other worker."""
    ledger = WorkerLedger(tmp_path / "retired.json")
    run = Run(llama, tmp_path / "checkpoints", ledger)
    run.train(Turncoat(3 * products), ClearWorker())
    ((step, why),) = run.returns
    assert step == 0
    assert "worker worker0 was caught" in why
    assert "in step 4; back to step 0, before its first answer" in why
    assert run.steps == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert same(run, untouched)
    run.trainer.require_untainted()


NEVER = 10**9


def test_only_what_rests_on_the_liar_is_done_again(
    llama: Tiny, tmp_path: Path, untouched: Run, products: int
) -> None:
    """The newest checkpoint without it is kept however many follow, and found again."""
    place = tmp_path / "checkpoints"
    stopped_after(2, Run(llama, place, WorkerLedger()), Turncoat(0, silent=NEVER), ClearWorker())
    assert rests_on(place) == {0: [], 1: ["worker1"], 2: ["worker1"]}
    run = Run(llama, place, WorkerLedger())
    run.train(Turncoat(3 * products + 1), ClearWorker())
    ((step, why),) = run.returns
    assert step == 2
    assert "in step 6; back to step 2" in why
    assert run.steps == [3, 4, 5, 3, 4, 5, 6]
    assert same(run, untouched)
    assert rests_on(place) == {0: [], 5: ["worker1"], 6: ["worker1"]}


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_liar_caught_as_the_last_worker_is_undone_at_the_next_start(
    llama: Tiny, tmp_path: Path, untouched: Run, products: int, forgotten: bool
) -> None:
    """The run ends; the next one, with another worker, does not build on what is there.

    Not even when somebody has deleted the file that names the liar.
    """
    place, ledger = tmp_path / "checkpoints", tmp_path / "retired.json"
    with pytest.raises(RemoteLinearError, match="no worker left"):
        Run(llama, place, WorkerLedger(ledger)).train(Turncoat(4 * products))
    assert set(rests_on(place)) == {0}
    assert {path.name for path in place.glob("distrusted-*")} == {
        "distrusted-step-000003", "distrusted-step-000004",
    }  # fmt: skip
    run = Run(llama, place, WorkerLedger(None if forgotten else ledger))
    assert run.trainer.progress.step == 0
    run.train(ClearWorker(), ClearWorker())
    assert same(run, untouched)


def test_without_checkpoints_training_says_that_it_cannot_go_back(
    llama: Tiny, products: int
) -> None:
    """And ends: what rests on a liar is not handed out."""
    run = Run(llama, None, WorkerLedger())
    with pytest.raises(TaintedError, match=r"worker0 was caught.*step 3.*start over"):
        run.train(Turncoat(2 * products), ClearWorker())


def test_a_lie_in_the_first_step_needs_no_checkpoint_of_it(
    llama: Tiny, tmp_path: Path, untouched: Run
) -> None:
    """A liar whose very first answer is wrong has served nothing: no step is lost."""
    run = Run(llama, tmp_path, WorkerLedger()).train(Turncoat(0), ClearWorker())
    assert run.returns == []
    assert same(run, untouched)


def test_a_liar_caught_after_the_training_taints_it(
    llama: Tiny, tmp_path: Path, untouched: Run, products: int
) -> None:
    """As in an evaluation: the result is refused, and the next start goes back."""
    ledger = tmp_path / "retired.json"
    run = Run(llama, tmp_path / "checkpoints", WorkerLedger(ledger))
    workers = Turncoat(CONFIG.steps * products), ClearWorker()
    with llama.connected(run.skeleton, "clear", workers=workers, ledger=run.ledger):
        run.trainer.train()
        run.trainer.require_untainted()
        evaluate(run.model, DATA, 4)
    with pytest.raises(TaintedError, match="not saved as a result"):
        run.trainer.require_untainted()
    again = Run(llama, tmp_path / "checkpoints", WorkerLedger(ledger))
    assert again.trainer.progress.step == 0
    assert same(again.train(ClearWorker(), ClearWorker()), untouched)


def test_a_process_killed_when_the_lie_is_found_is_no_way_around(
    llama: Tiny, tmp_path: Path, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger is on the disk, nothing is set aside yet: the next start does it."""
    place, ledger = tmp_path / "checkpoints", tmp_path / "retired.json"
    with monkeypatch.context() as killed, pytest.raises(RemoteLinearError):
        killed.setattr(Trainer, "_distrust", lambda trainer: None)
        Run(llama, place, WorkerLedger(ledger)).train(Turncoat(2 * products))
    assert set(rests_on(place)) == {0, 1, 2}
    assert Run(llama, place, WorkerLedger(ledger)).trainer.progress.step == 0
    assert set(rests_on(place)) == {0}
    shutil.rmtree(place / "step-000000")
    for path in place.glob("distrusted-*"):
        path.rename(place / path.name.removeprefix("distrusted-"))
    with pytest.raises(ResumeError, match=r"worker0.*--fresh"):
        Run(llama, place, WorkerLedger(ledger))


def test_a_run_whose_checkpoints_vanished_does_not_pretend_to_go_back(
    llama: Tiny, tmp_path: Path, products: int
) -> None:
    """Somebody has deleted them meanwhile: it ends, whatever the liar's share."""
    place = tmp_path / "checkpoints"
    run = Run(llama, place, WorkerLedger())

    class Vandal(Turncoat):
        def multiply(self, payload: Any, tokens: int, matrix: Any) -> Any:
            if self.answered == self.honest:
                shutil.rmtree(place)
            return super().multiply(payload, tokens, matrix)

    with pytest.raises(TaintedError, match="are gone"):
        run.train(Vandal(2 * products), ClearWorker())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "state.json").write_text("[" * 100_000),
        lambda path: (path / "state.json").write_text('{"served": "worker0"}'),
        lambda path: served_by(path, "worker0"),
        lambda path: path.rename(path.with_name("step-000009")),
        lambda path: (path / "adapter_model.safetensors").write_bytes(b""),
        lambda path: (path / "optimizer.safetensors").write_bytes(b"x" * 100),
    ],
)
def test_a_damaged_checkpoint_is_not_gone_on_from(
    llama: Tiny, tmp_path: Path, spoil: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The one before it is, and it is said, whichever file it is."""
    place = tmp_path / "checkpoints"
    stopped_after(2, Run(llama, place, WorkerLedger()), ClearWorker())
    spoil(place / "step-000002")
    assert Run(llama, place, WorkerLedger()).trainer.progress.step == 1
    assert "is damaged" in caplog.text
    assert "going on from step-000001" in caplog.text
    assert len(list(place.glob("damaged-*"))) == 1


def test_a_liar_is_not_lost_with_a_damaged_ledger(
    llama: Tiny, tmp_path: Path, products: int
) -> None:
    """It cannot be written down: one line says so, and nothing that rests on it is gone on from."""
    place, path = tmp_path / "checkpoints", tmp_path / "retired.json"
    run = Run(llama, place, WorkerLedger(path))
    path.write_text("{")
    with pytest.raises(RemoteLinearError) as told:
        run.train(Turncoat(2 * products), ClearWorker())
    said = str(told.value)
    assert "worker 'worker0' gave a wrong answer, and that cannot be written down" in said
    assert "retired.json is damaged" in said
    assert "restore it, or delete it" in said
    assert "\n" not in said
    assert set(rests_on(place)) == {0}


def served_by(path: Path, workers: object) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "served": workers}))


class _Stop(Exception):
    pass


def stopped_after(steps: int, run: Run, *workers: ClearWorker) -> None:
    """Train, and die in the step after that many."""

    def on_step(step: int, loss: float) -> None:
        if step > steps:
            raise _Stop

    with (
        run.tiny.connected(run.skeleton, "clear", workers=workers, ledger=run.ledger),
        pytest.raises(_Stop),
    ):
        run.trainer.train(on_step)


def rests_on(place: Path) -> dict[int, list[str]]:
    """Workers named by each checkpoint that is there."""
    return {
        int(path.name[-6:]): json.loads((path / "state.json").read_text())["served"]
        for path in place.glob("step-*")
    }
