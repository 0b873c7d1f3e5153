"""A tiny random Llama and GPT-2, prepared for both backends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from backends.he.clear import ClearOwner, ClearWorker
from backends.he.interface import WorkerCipher
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.preparation import prepare
from backends.he.store import PreparedModel
from backends.ledger import WorkerLedger
from backends.net.inprocess import in_process
from backends.net.loop import Hooks
from backends.net.owner import OwnerClient
from backends.nn.adapters import add_lora
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import RandomBase
from protocol.events import MultiplyCiphertext, Task

LLAMA = LlamaConfig(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {"llama": LLAMA, "gpt2": GPT2}
BASES = {name: RandomBase(config, 0, deviation=0.1) for name, config in CONFIGS.items()}


@dataclass
class Tiny:
    """A config and its prepared models."""

    config: PretrainedConfig
    prepared: dict[str, PreparedModel]

    def skeleton(self) -> Skeleton:
        """A fresh owner's model."""
        return build_skeleton(RandomBase(self.config, 0, deviation=0.1))

    @contextmanager
    def connected(
        self, skeleton: Skeleton, backend: str, lanes: int = 1,
        workers: Sequence[WorkerCipher] = (), ledger: WorkerLedger | None = None,
        hooks: Callable[[str], Hooks] = lambda side: Hooks(),
    ) -> Iterator[OwnerClient]:  # fmt: skip
        """The skeleton connected to an in-process worker, or to these."""
        prepared = self.prepared[backend]
        parameters = prepared.parameters
        owner = MlweOwner(parameters, prepared.public_matrix()) if parameters else ClearOwner()
        prepared.guard(owner)
        worker = MlweWorker() if parameters else ClearWorker()
        with (
            in_process(
                prepared, owner, workers or [worker], lanes=lanes, ledger=ledger, hooks=hooks
            ) as (client, _),
            skeleton.remote.connected(client.linear),
        ):
            yield client

    @contextmanager
    def requests(
        self,
    ) -> Iterator[tuple[PeftModel, Callable[[], None], list[tuple[int, int]]]]:
        """A connected model with adapters, what makes it forget a lane, and (matrix, tokens) of
        every request that its worker gets."""
        requests: list[tuple[int, int]] = []
        lock = threading.Lock()

        def on_task(task: int, work: Task, started: float, ended: float) -> None:
            assert isinstance(work, MultiplyCiphertext)
            with lock:
                requests.append((work.matrix, work.tokens))

        def hooks(side: str) -> Hooks:
            return Hooks() if side == "owner" else Hooks(on_task=on_task)

        skeleton = self.skeleton()
        model = add_lora(skeleton.model, 4, 8, seed=0)
        with self.connected(skeleton, "clear", hooks=hooks):
            yield model, skeleton.remote.forget_lane, requests


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Each architecture in turn."""
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The Llama alone."""
    return make_tiny("llama", tmp_path_factory.mktemp("llama-alone"))


def make_tiny(name: str, directory: Path) -> Tiny:
    """Prepare one architecture for `clear` and `mlwe`."""
    config = CONFIGS[name]
    skeleton = build_skeleton(BASES[name])
    prepared = {}
    for backend, parameters in (("clear", None), ("mlwe", preset("exact"))):
        prepared[backend] = prepare(
            directory / backend,
            skeleton.groups,
            skeleton.load_weight,
            parameters,
            lambda label, done: None,
        )
    return Tiny(config, prepared)


def tokens(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random int64[count, length]."""
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(seed))
