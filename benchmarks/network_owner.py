"""The owner's process of `python -m benchmarks.fidelity --network`: real steps over a real line.

Trains the model of `network_model` through a worker elsewhere, session after session with other
numbers of lanes, and prints one JSON object a line: {"cell": {...}} when a session is over.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from backends.he.params import preset
from backends.machine import busy_elsewhere_s
from backends.net.addresses import address_of
from backends.net.tls import Tls
from backends.nn.adapters import add_lora
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import RandomBase
from backends.nn.trainer import TrainConfig, Trainer
from backends.options import LANES, SECONDS, Parser, Whole, place
from backends.session import Workers
from benchmarks.steps import Steps
from scenarios.cli import clean_exit, use_kernel
from scenarios.estimate import Shape
from scenarios.options import add_cache_option
from scenarios.preparation import prepared_for
from scenarios.session import private_session
from sim.calibration import DISTURBED

RANK = 16
PRESET = "exact"
"""Of the cipher, in both worlds; the simulator is calibrated with it."""
TOKENS = 256
STEPS = (3, 12)
"""Steps of a session that count, at least and at most, after one that does not."""
GLANCE_S = 1.0


def network_model() -> LlamaConfig:
    """Two layers, half as wide as the Llama-3.2-1B: about 21 MB a step and lane."""
    return LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def busy_s(pids: Sequence[int]) -> float:
    """Processor seconds that these processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(patience_s: float) -> None:
    """Until other processes have been idle for a moment, or so long."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        before = busy_elsewhere_s()
        time.sleep(GLANCE_S)
        if busy_elsewhere_s() - before <= DISTURBED * GLANCE_S:
            return


def session(args: argparse.Namespace, lanes: int) -> dict[str, Any]:
    """Steps of one session: seconds each took, what was sent, what else the machine did."""
    config = network_model()
    base = RandomBase(config, 0)
    skeleton = build_skeleton(base)
    prepared, _ = prepared_for(skeleton, preset(PRESET), args.cache)
    model = add_lora(skeleton.model, RANK, 2 * RANK, 0)
    workers = Workers((args.worker,), Tls(args.tls))
    text = torch.randint(
        config.vocab_size, (64, TOKENS), generator=torch.Generator().manual_seed(0)
    )
    training = TrainConfig(steps=1_000_000, batch=lanes, micro_batch=1, learning_rate=1e-4)
    others_s = lambda: busy_elsewhere_s() - busy_s(args.ours)  # noqa: E731
    with private_session(skeleton, prepared, lanes, workers=workers) as opened:
        trainer = Trainer(model, text, training, lanes, forget_lane=skeleton.remote.forget_lane)
        shape = Shape(config, TOKENS, TOKENS, lanes, RANK, PRESET)
        estimated = opened.say_estimate(shape, 1)
        steps = Steps(trainer)
        steps.take()
        rows: list[dict[str, float]] = []
        start = time.perf_counter()
        while len(rows) < STEPS[0] or (
            len(rows) < STEPS[1] and time.perf_counter() - start < args.seconds
        ):
            before, elsewhere = opened.usage(), others_s()
            seconds = steps.take()
            used = opened.usage().since(before)
            rows.append(
                {
                    "seconds": seconds,
                    "elsewhere": max(0.0, others_s() - elsewhere) / seconds,
                    "owner_s": used.owner_s,
                    "bytes_up": used.bytes_up,
                    "bytes_down": used.bytes_down,
                }
            )
    return {"lanes": lanes, "steps": rows, "estimates": list(estimated.values())}


def main() -> None:
    parser = Parser(__doc__, "benchmarks.network_owner")
    parser.add_argument("--worker", required=True, metavar="HOST:PORT")
    parser.add_argument("--tls", type=place, required=True, metavar="DIR")
    parser.add_argument("--lanes", type=LANES, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=SECONDS, default=25.0, help="of a session, about")
    parser.add_argument("--patience", type=SECONDS, default=0.0, help="seconds to wait for others")
    parser.add_argument("--ours", type=Whole(1, 1 << 22), nargs="*", default=[], metavar="PID",
        help="processes whose work is no disturbance")  # fmt: skip
    add_cache_option(parser)
    args = parser.parse()
    with clean_exit():
        address_of(args.worker)
        Tls(args.tls).require_current()
        use_kernel(None)
        for lanes in args.lanes:
            wait_for_quiet(args.patience)
            print(json.dumps({"cell": session(args, lanes)}), flush=True)


if __name__ == "__main__":
    main()
