"""An endpoint in this process for tests: a tiny random Llama, and the same steps in clear."""

from __future__ import annotations

import copy
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import private_lora as pl
from backends.nn.local import localise
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import HeldBase
from backends.nn.tokenizer import ByteTokenizer
from scenarios.endpoint.__main__ import endpoint, parse
from scenarios.endpoint.server import PROTO, Server
from scenarios.endpoint.service import Service
from tests.nn.conftest import LLAMA

NAME = "tiny/llama"
SEQUENCE = 16
RATE = 5e-3
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]

Texts = Sequence[tuple[list[int], list[int], list[float]]]
"""Tokens, targets and weights of each."""
TEXTS: Texts = [
    ([5, 17, 42, 8, 90], [17, 42, 8, 90, 3], [0.0, 0.0, 1.0, 1.0, 0.5]),
    ([61, 2, 2], [2, 2, 33], [1.0, 1.0, 1.0]),
]


def theirs() -> PreTrainedModel:
    """A model that a user holds."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(LLAMA))


@dataclass
class Here:
    """An endpoint that answers."""

    server: Server
    service: Service
    public: pl.Public
    out: Path

    @property
    def key(self) -> str:
        """Of recipes."""
        return self.server.key.decode()

    def ask(
        self, method: str, path: str, body: bytes | dict[str, Any] = b"", **headers: str | None
    ) -> tuple[int, Any]:
        """(status, answer), as the client asks. headers: with '_' for '-'; None takes one away."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent: dict[str, str | None] = {
            "X-API-Key": self.key, "Host": f"127.0.0.1:{self.server.port}",
            "Content-Type": PROTO if path == "forward_backward" else "application/json",
            "Content-Length": str(len(raw)) if method == "POST" else None,
        }  # fmt: skip
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        line = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        line.putrequest(method, f"/api/v1/{path}", skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                line.putheader(name, value)
        line.endheaders(raw if method == "POST" else None)
        reply = line.getresponse()
        content, kind = reply.read(), reply.headers.get_content_type()
        line.close()
        return reply.status, content if kind == PROTO else json.loads(content)

    def post(self, path: str, body: bytes | dict[str, Any]) -> Any:
        """The answer of a call that is accepted; the result of one that is queued."""
        status, found = self.ask("POST", path, body)
        assert status == 200, found
        if isinstance(found, dict) and "request_id" in found:
            status, found = self.ask("POST", "retrieve_future", {"request_id": found["request_id"]})
            assert status == 200, found
        return found

    def client(self, rank: int = 4, seed: int = 7) -> str:
        """A new training client's model_id."""
        session = self.post("create_session", {"tags": [], "sdk_version": "0"})["session_id"]
        found = self.post("create_model", {
            "session_id": session, "model_seq_id": 0, "base_model": NAME,
            "lora_config": {"rank": rank, "seed": seed},
        })  # fmt: skip
        return str(found["model_id"])

    def leave(self, model_id: str) -> None:
        """Its client has ended."""
        self.post(f"sessions/{model_id.partition(':')[0]}/finish", {})


@contextmanager
def here(out: Path, cache: Path, preset: str = "exact", *more: str) -> Iterator[Here]:
    """An endpoint with a worker in this process."""
    model = theirs()
    public = pl.prepare(model, preset, cache=cache)
    args = parse([
        "--out", str(out), "--listen", "127.0.0.1:0", "--name", NAME, "--batch", "2",
        "--sequence", str(SEQUENCE), *more,
    ])  # fmt: skip
    tokenizer = ByteTokenizer((0,))
    with endpoint(pl.remote(model, public), public, tokenizer, args) as (server, service):
        computing = threading.Thread(target=service.queue.work)
        computing.start()
        try:
            yield Here(server, service, public, out)
        finally:
            service.queue.close()
            computing.join()


def clear_model(public: pl.Public, rank: int = 4, seed: int = 7) -> PeftModel:
    """The same base with the same int8 weights, in clear, and the same new adapter."""
    skeleton = build_skeleton(HeldBase(theirs()))
    localise(skeleton, public.prepared)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=LINEARS)
    model = get_peft_model(skeleton.model, config)
    assert isinstance(model, PeftModel)
    return model


def logprobs_of(model: PeftModel, tokens: list[int], targets: list[int]) -> torch.Tensor:
    """float32[n] of the targets, by the code of transformers and torch alone."""
    logits = model(input_ids=torch.tensor([tokens])).logits
    return torch.log_softmax(logits[0], -1)[torch.arange(len(tokens)), torch.tensor(targets)]


def clear_losses(model: PeftModel, steps: int, texts: Texts = TEXTS) -> list[float]:
    """Of each step of AdamW, and one more after the last."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], RATE, (0.9, 0.95), 1e-12, 0.0
    )
    found = []
    for step in range(steps + 1):
        loss = sum(
            -(torch.tensor(weights) * logprobs_of(model, tokens, targets)).sum()
            for tokens, targets, weights in texts
        )
        assert isinstance(loss, torch.Tensor)
        found.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return found
