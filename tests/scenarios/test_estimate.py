"""The probe of a line, and the estimate before a run: on made-up lines, and on a real one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import simpy
from transformers import LlamaConfig

from backends.he.matmul.choice import chosen_kernel
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.store import WorkerPart
from backends.net.devices import OneDevice
from backends.net.serving import serving
from backends.nn.adapters import add_lora
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import RandomBase
from backends.nn.trainer import TrainConfig, Trainer
from backends.session import Workers
from protocol.catalogue import MatrixShape
from scenarios.estimate import Estimate, Shape, _limbs, spoken
from scenarios.line import waits_for
from scenarios.preparation import prepared_for
from scenarios.probe import LineProbe, Prober, Sample, solved, telling
from scenarios.session import Live, PrivateSession, private_session
from sim.flows import Link
from sim.network import Network
from sim.stream import Stream, Tcp
from sim.topologies import star
from sim.workload import trace_step

SHAPES = [
    MatrixShape(name, inputs, outputs, 3 * inputs, 2 * outputs)
    for name, inputs, outputs in (
        ("qkv", 1024, 3072), ("qkv back", 3072, 1024), ("o", 1024, 1024), ("up", 1024, 5632),
        ("up back", 5632, 1024),
    )
]  # fmt: skip


def test_the_matrices_that_tell_most() -> None:
    """The least arithmetic a byte, the most input, the most output."""
    assert [SHAPES[i].name for i in telling(SHAPES)] == ["o", "up back", "up"]
    back = next(i for i, shape in enumerate(SHAPES) if shape.name == "up back")
    assert back not in telling(SHAPES, {back}), "nothing is ready for what no run asks for"


def test_rates_are_told_apart() -> None:
    """Exactly, where the times are; none is negative where they are not."""
    samples = [Sample(u, d, p, 0.02 + 1e-7 * u + 5e-8 * d + 1e-10 * p)
               for u, d, p in ((1e6, 5e5, 1e8), (2e6, 1e5, 3e8), (3e5, 2e6, 3e8))]  # fmt: skip
    assert solved(samples, 0.02) == pytest.approx((1e-7, 5e-8, 1e-10))
    assert min(solved([Sample(10, 20, 5.0, 0.0)] * 3, 0.02)) > 0


@pytest.mark.parametrize("rtt_s", [0.001, 0.02, 0.08])
@pytest.mark.parametrize("mb_s", [1, 12, 120])
def test_a_probe_is_short_and_right(mb_s: float, rtt_s: float) -> None:
    """Over simulated TCP, slow start and all: what a step's bytes will take is found."""
    env, clock = simpy.Environment(), SimpleNamespace(s=0.0)
    line = Link(8e6 * mb_s, rtt_s / 2)
    network = Network(env, star(["o"], ["w"], line, Link(1e15, 0.0)), random.Random(0))
    up, down = (Stream(env, network, *ends, Tcp(overhead=1.0)) for ends in ("ow", "wo"))

    def ask(matrix: int, tokens: int) -> None:
        shape, done, start = SHAPES[matrix], env.event(), env.now
        down_bytes = shape.down_bytes(tokens)
        up.send(shape.up_bytes(tokens), lambda: down.send(down_bytes, done.succeed))
        env.run(done)
        clock.s += env.now - start

    found = Prober(SHAPES, ask, lambda: clock.s, lambda: 0.0).run()
    assert found.bytes < 20e6
    assert found.rtt_s == pytest.approx(rtt_s, rel=0.1)
    one = Sample(800_000, 500_000, 256 * 1024 * 1024, 0.0)
    right = rtt_s + (one.up + one.down) / (1e6 * mb_s)
    told = found.rtt_s + one.up / found.up_b_s + one.down / found.down_b_s
    assert told + one.products / found.products_per_s == pytest.approx(right, rel=0.15)
    # Small products say little of a fast line that is long: there is time for larger ones.
    largest = max(tokens for _, tokens in found.asked)
    assert mb_s < 120 or largest == 64
    # And no slow long line is filled up, where real TCP would lose packets and wait for them.
    assert mb_s > 12 or rtt_s < 0.08 or largest == 16


def test_what_a_step_waits_for() -> None:
    """The largest part of a lane's time."""
    assert waits_for(10.0, 1, away_s=2.0, worker_s=1.0) == "owner"
    assert waits_for(10.0, 4, away_s=36.0, worker_s=8.0) == "worker"
    assert waits_for(10.0, 4, away_s=36.0, worker_s=2.0) == "line"
    assert waits_for(10.0, 4, away_s=8.0, worker_s=2.0, held_s=30.0) == "quota"


def test_the_digits_of_what_was_asked_for() -> None:
    """By the size of the products: half of them of two limbs, half of three."""
    shapes = [MatrixShape(str(up), 64, 64, up * 64, 64) for up in (2, 3)]
    probe = LineProbe(0.02, 1e7, 1e7, 1e11, 0.1, ((0, 8), (1, 8)), 9_000_000, 2.1)
    workload = replace(trace_step(CONFIG, 8, lora_rank=1), matrices=tuple(shapes))
    assert _limbs(workload, probe) == 2.5
    assert _limbs(workload, replace(probe, asked=())) == 3.0


def test_the_estimate_in_words() -> None:
    """Two lines a person understands."""
    probe = LineProbe(0.02, 11.6e6, 5e9, 1e11, 0.1, (), 9_000_000, 2.1)
    line, run = Estimate(100, 78.0, 3e10, 1.1e10, 1.0, "upload", probe).lines()
    assert line.startswith("the line: 20 ms round trip, 11.6 MB/s up, over 1 GB/s down")
    assert "2 h 10 min for 100 steps; the upload is the bottleneck" in run
    assert [spoken(s) for s in (3.21, 41, 720, 7800, 360_000)] == [
        "3.2 s", "41 s", "12 min", "2 h 10 min", "4 days 4 h",
    ]  # fmt: skip


CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=320, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
TOKENS = 64


@contextmanager
def _session(cache: Path) -> Iterator[tuple[PrivateSession, Trainer]]:
    """A private session over loopback, in plain text, and a training of three steps."""
    import torch

    chosen_kernel()
    skeleton = build_skeleton(RandomBase(CONFIG, 0))
    prepared, _ = prepared_for(skeleton, preset("exact"), cache)
    part = WorkerPart.open(prepared.directory)
    with (
        serving(OneDevice.holding(part, MlweWorker()), "127.0.0.1", 0, None) as service,
        private_session(
            skeleton, prepared, 1, workers=Workers((f"127.0.0.1:{service.port}",))
        ) as session,
    ):
        model = add_lora(skeleton.model, 16, 32, 0)
        training = TrainConfig(steps=3, batch=1, micro_batch=1, learning_rate=1e-4)
        text = torch.randint(256, (8, TOKENS))
        yield session, Trainer(model, text, training, forget_lane=skeleton.remote.forget_lane)


def test_an_estimate_is_near_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes to a hundredth. The time only to the order of magnitude: machines under test are busy
    (`python -m benchmarks.fidelity --network` compares it in earnest)."""
    with _session(tmp_path) as (session, trainer):
        shape = Shape(CONFIG, TOKENS, TOKENS, 1, 16, "exact")
        figures = session.say_estimate(shape, 3)["estimate"]
        before, live, said = session.usage(), Live(session, TOKENS, 1), {}
        trainer.train(lambda step, loss: said.update(live.step_ended(trainer.step_seconds[-1])))
        used = session.usage().since(before)
    assert figures["bytes_up"] == pytest.approx(used.bytes_up, rel=0.01)
    assert figures["bytes_down"] == pytest.approx(used.bytes_down, rel=0.01)
    assert 0.1 < figures["step_s"] / min(trainer.step_seconds) < 10
    assert set(figures) >= {"seconds", "bottleneck", "rtt_s", "up_mb_s", "down_mb_s"}
    assert "for 3 steps; " in capsys.readouterr().out
    assert set(said) == {"tok/s", "up", "down", "waits for"}
