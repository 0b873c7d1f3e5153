"""An endpoint in this process for tests: a tiny random Llama, and the same steps in clear."""

from __future__ import annotations

import copy
import http.client
import json
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import private_lora as pl
from backends.nn.local import localise
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import HeldBase
from backends.nn.tokenizer import ByteTokenizer
from scenarios.endpoint.__main__ import parse
from scenarios.endpoint.run import endpoint
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
# What tinker 0.38.0 sends for TEXTS, and for a PPO step, but for the model and its turn.
RECORDED = bytes.fromhex(
    "1a84010a180a160a1405000000110000002a000000080000005a00000012260a0777656967687473121b0a14000000"
    "00000000000000803f0000803f0000003f180122010512400a0d7461726765745f746f6b656e73122f0a2811000000"
    "000000002a0000000000000008000000000000005a00000000000000030000000000000018022201051a640a100a0e"
    "0a0c3d0000000200000002000000121e0a077765696768747312130a0c0000803f0000803f0000803f180122010312"
    "300a0d7461726765745f746f6b656e73121f0a18020000000000000002000000000000002100000000000000180222"
    "0103220d63726f73735f656e74726f7079"
)
PPO = bytes.fromhex(
    "1a88010a100a0e0a0c05000000110000002a00000012210a0a616476616e746167657312130a0c0000803f000080bf"
    "00000040180122010312300a0d7461726765745f746f6b656e73121f0a1811000000000000002a0000000000000008"
    "000000000000001802220103121f0a086c6f6770726f627312130a0c000090c0000090c0000090c018012201032203"
    "70706f2a1d0a12636c69705f6c6f775f7468726573686f6c6411cdccccccccccec3f3a1f0a12636c69705f6c6f775f"
    "7468726573686f6c64120909cdccccccccccec3f"
)
FORWARD_ONLY = b"\x30\x01"
ADAM = {"learning_rate": RATE, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0,
        "grad_clip_norm": 0.0}  # fmt: skip


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


def addressed(model_id: str, turn: int, rest: bytes) -> bytes:
    """A binary request of this client, in its turn."""
    return b"\x0a" + bytes([len(model_id)]) + model_id.encode() + b"\x10" + bytes([turn]) + rest


def loss_of(answer: bytes) -> float:
    """Of a ForwardBackwardOutput, whose last field is the metric."""
    assert b"loss:sum" in answer[-19:]
    return float(struct.unpack("<d", answer[-8:])[0])


def part(number: int, content: bytes) -> bytes:
    """A field of a binary message."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | 2]) + length + content


def datum(tokens: list[int], targets: list[int], loss: bytes = b"cross_entropy") -> bytes:
    """A request's data, with all weights one."""
    text = part(1, part(1, np.array(tokens, "<i4").tobytes()))
    tensor = part(1, np.array(targets, "<i8").tobytes()) + b"\x18\x02"
    inputs = part(1, b"target_tokens") + part(2, tensor)
    return part(3, part(1, text) + part(2, inputs)) + part(4, loss)


def prompt_of(tokens: list[int], **more: Any) -> dict[str, Any]:
    """Of a sample."""
    return {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "sampling_params": {"max_tokens": 4, "temperature": 0.0, "stop": []}, **more,
    }  # fmt: skip


@dataclass
class Workers:
    """What a session says of them."""

    served: frozenset[str]
    caught: dict[str, str]
