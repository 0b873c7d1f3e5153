"""Hostile input, a little of it; and that each detector of `benchmarks.fuzz` can fire."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fuzz import machines
from benchmarks.fuzz.attacks import (
    Attack,
    broken_frames,
    cut_at_every_point,
    frames_in_any_order,
    halves,
    oversize,
    sessions_dropped,
    strangers,
)
from benchmarks.fuzz.campaign import attack_worker
from benchmarks.fuzz.inputs import Frames, stream
from benchmarks.fuzz.live import Bounds, Scene
from benchmarks.fuzz.verdict import Verdict
from protocol.admission import Admission
from protocol.errors import ProtocolError
from protocol.events import CancelTimer, Effect
from protocol.messages import Bye, Message, Product, decode
from protocol.owner import Owner
from protocol.owner_memory import Peer
from protocol.owner_tables import Input
from protocol.worker import Worker

COUNT = 3000


def test_machines_take_whatever_comes() -> None:
    """Decoder, worker's and owner's machine; each sort of input, and right answers all the time."""
    verdict = Verdict()
    machines.throw_at_machines(7, 4 * COUNT, verdict)
    assert verdict.clean, verdict.told
    assert verdict.inputs.total() == 4 * COUNT
    assert len(verdict.inputs) == 32
    assert min(verdict.inputs.values()) > 40


def test_the_same_seed_draws_the_same_inputs() -> None:
    """And another seed does not."""

    def drawn(seed: int) -> list[tuple[str, bytes]]:
        frames = Frames(stream(seed, "test"), machines.CATALOGUE, (bytes(16), b"x" * 16))
        return [frames.draw() for _ in range(200)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def _key_error(frame: bytes) -> Message:
    if len(frame) == 27:
        raise KeyError("planted")
    return decode(frame)


def _takes_too_much(frame: bytes) -> Message:
    try:
        return decode(frame)
    except ProtocolError:
        if len(frame) == 29:
            return Bye(bytes(16))
        raise


@pytest.mark.parametrize("decoder", [_key_error, _takes_too_much])
def test_a_faulty_decoder_is_noticed(decoder: Callable[[bytes], object]) -> None:
    """One that raises what it must not, and one that takes what nobody could have sent."""
    verdict = Verdict()
    machines.throw_at_decoder(0, COUNT, verdict, decoder)
    assert verdict.found["crashes"] > 0
    assert not verdict.found["hangs"]


def test_a_worker_that_raises_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver would not survive that."""

    def raises(*_: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(Worker, "_refuse_stale", raises)
    verdict = Verdict()
    machines.throw_at_worker(0, COUNT, verdict)
    assert verdict.found["crashes"] > 0


def test_a_slow_worker_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every event has a bound."""
    monkeypatch.setattr(machines, "SLOW_S", 0.0)
    verdict = Verdict()
    machines.throw_at_worker(0, 100, verdict)
    assert verdict.found["hangs"] > 0


def test_a_worker_without_a_bound_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes in all that it is given."""
    monkeypatch.setattr(Admission, "wait_s", lambda *_: None)
    verdict = Verdict()
    machines.throw_at_worker(0, COUNT, verdict)
    assert verdict.found["memory_over_bound"] > 0


def test_an_owner_that_loses_a_call_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because a hostile worker said something."""
    accept = Owner._accept

    def forgets(self: Owner, peer: Peer, kind: Input, product: Product) -> list[Effect]:
        if peer.name == "honest":
            return accept(self, peer, kind, product)
        return [CancelTimer(f"call:{product.request}")]

    monkeypatch.setattr(Owner, "_accept", forgets)
    verdict = Verdict()
    machines.throw_at_owner(0, COUNT, verdict)
    assert verdict.found["hangs"] + verdict.found["crashes"] > 0


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene.make(tmp_path_factory.mktemp("scene"))


@pytest.mark.slow
def test_a_worker_that_listens_takes_whatever_comes(scene: Scene, tmp_path: Path) -> None:
    """Beside an owner that trains on, and one that connects anew all the time."""
    verdict = Verdict()
    attacks: tuple[tuple[int, Attack], ...] = (
        (300, frames_in_any_order), (10, broken_frames), (10, cut_at_every_point), (12, strangers),
        (12, halves), (12, oversize), (100, sessions_dropped),
    )  # fmt: skip
    figures = attack_worker(
        scene, "tls", attacks, 1, verdict, tmp_path / "log", Bounds(60, 60), patience_s=1.0
    )
    assert verdict.clean, verdict.told
    assert figures["good_answers"] > 3
    assert figures["newcomers"] >= 4


@pytest.mark.slow
def test_a_faulty_worker_is_noticed(scene: Scene, tmp_path: Path) -> None:
    """Each of its three faults."""
    verdict = Verdict()
    bounds = Bounds(answer_s=1.0, growth=100 << 20)
    attack_worker(
        scene, "plain", [(60, frames_in_any_order)], 1, verdict, tmp_path / "log", bounds,
        patience_s=1.0, module=("tests.net.faulty_worker",),
    )  # fmt: skip
    assert verdict.found["crashes"] == 1
    assert verdict.found["hangs"] >= 1
    assert verdict.found["memory_over_bound"] == 1
