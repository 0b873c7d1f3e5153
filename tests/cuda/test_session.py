"""Owner and worker on a GPU under the real machines: training, mixed places, joined requests."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from backends.hardware import CPU, Hardware
from backends.he.cuda.device import Gpu
from backends.he.cuda.owner import CudaOwner
from backends.he.cuda.worker import CudaWorker
from backends.he.interface import OwnerCipher, WorkerCipher
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.net.inprocess import in_process
from backends.net.loop import Hooks
from backends.nn.adapters import add_lora
from backends.nn.trainer import TrainConfig, Trainer
from protocol.events import Effect, Event, Send
from protocol.messages import HEADER_BYTES, LocalFrame
from scenarios.session import private_session
from tests.nn.conftest import Tiny, make_tiny, tokens

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiler")]
CONFIG = TrainConfig(steps=2, batch=2, micro_batch=1, learning_rate=1e-2, warmup_steps=1)
DATA = tokens(4, 12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny Llama, prepared."""
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def train(llama: Tiny, hardware: Hardware, lanes: int) -> list[float]:
    """Losses of a short private training there."""
    skeleton = llama.skeleton()
    model = add_lora(skeleton.model, 4, 8, seed=0)
    model.to(hardware.device)
    trainer = Trainer(model, DATA, CONFIG, lanes=lanes, forget_lane=skeleton.remote.forget_lane)
    with private_session(
        skeleton, llama.prepared["mlwe"], lanes, hardware=hardware, hint_bytes=1 << 30
    ) as session:
        losses = trainer.train()
        assert session.usage().blocks > 0
    return losses


@pytest.mark.parametrize("lanes", [1, 2])
def test_training_on_the_gpu_follows_training_on_the_cpu(llama: Tiny, gpu: Gpu, lanes: int) -> None:
    """The same text, two ciphers: losses differ by the noise of the cipher only."""
    there = train(llama, Hardware(gpu.device, torch.float32, gpu), lanes)
    here = train(llama, CPU, 1)
    assert there == pytest.approx(here, rel=2e-3)


@pytest.mark.parametrize("owner_on", ["cpu", "gpu", "gpu, frames local"])
@pytest.mark.parametrize("worker_on", ["cpu", "gpu"])
def test_any_mix_of_places_computes_the_same(
    llama: Tiny, gpu: Gpu, owner_on: str, worker_on: str
) -> None:
    """Neither side can tell where the other one computes."""
    if owner_on == "gpu, frames local" and worker_on == "cpu":
        pytest.skip("a local frame needs a worker on the same GPU")
    prepared = llama.prepared["mlwe"]
    parameters, public = prepared.parameters, prepared.public_matrix()
    assert parameters is not None
    owner: OwnerCipher = MlweOwner(parameters, public)
    if owner_on != "cpu":
        owner = CudaOwner(parameters, public, gpu, local=owner_on != "gpu")
    worker: WorkerCipher = MlweWorker()
    if worker_on == "gpu":
        worker = CudaWorker(gpu)
    prepared.guard(owner)
    weights, matrices = prepared.worker_weights(), prepared.owner_matrices()
    sent: list[object] = []

    def watch(event: Event, effects: list[Effect]) -> None:
        sent.extend(e.frame for e in effects if isinstance(e, Send) and len(e.frame) > HEADER_BYTES)

    def hooks(side: str) -> Hooks:
        return Hooks(observe=watch)  # type: ignore[arg-type]

    rng = np.random.default_rng(0)
    with in_process(prepared, owner, [worker], lanes=2, hooks=hooks) as (client, _):
        for index in (0, 1, 6, 7):
            x = rng.standard_normal((5, matrices[index].in_features)).astype(np.float32)
            y = client.linear(index, x)
            weight = weights[index // 2].astype(np.float64)
            operand = weight.T if index % 2 == 0 else weight
            expected = (x * matrices[index].in_scale) @ operand * matrices[index].out_scale
            assert np.linalg.norm(y - expected) < 0.02 * np.linalg.norm(expected)
    local = [frame for frame in sent if isinstance(frame, LocalFrame)]
    assert bool(local) == (owner_on == "gpu, frames local")


def test_requests_of_several_lanes_at_once(llama: Tiny, gpu: Gpu) -> None:
    """Many threads, one matrix: whatever is joined, each gets the product of its own input."""
    prepared = llama.prepared["mlwe"]
    parameters = prepared.parameters
    assert parameters is not None
    owner = MlweOwner(parameters, prepared.public_matrix())
    prepared.guard(owner)
    matrix, weight = prepared.owner_matrices()[0], prepared.worker_weights()[0].astype(np.float64)
    inputs = [np.full((1, matrix.in_features), 1.0 + n, np.float32) for n in range(8)]
    answers: dict[int, np.ndarray] = {}
    with in_process(prepared, owner, [CudaWorker(gpu)], lanes=4) as (client, _):

        def lane(n: int) -> None:
            answers[n] = client.linear(0, inputs[n])

        threads = [threading.Thread(target=lane, args=(n,)) for n in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for n, x in enumerate(inputs):
        expected = x @ weight.T * matrix.out_scale
        assert np.linalg.norm(answers[n] - expected) < 0.05 * np.linalg.norm(expected)
