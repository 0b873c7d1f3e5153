"""The training that is attacked: a tiny model, private, over the line, a checkpoint every step.

    python -m scenarios.crashes.owner --model DIR --prepare
    python -m scenarios.crashes.owner --model DIR --out RUN --worker 127.0.0.1:PORT [--tls DIR]

It is put together from the parts that the scenarios use, and like them it goes on, when started
again, with the step after the newest checkpoint in RUN. Text and weights are drawn from seeds, as
nothing here is worth a secret; the cipher's randomness is the operating system's, as ever.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig

from backends.he.mlwe_owner import MlweOwner
from backends.he.params import preset
from backends.he.preparation import prepare
from backends.he.store import PreparedModel
from backends.net.remote import connected
from backends.nn.adapters import add_lora, save_adapter
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import RandomBase
from backends.nn.trainer import TrainConfig, Trainer
from backends.options import ALL, STEPS, Modes, Parser, place
from backends.places import output_directory
from protocol.owner_memory import OwnerConfig
from scenarios.cli import clean_exit
from scenarios.options import add_worker_options
from scenarios.session import chosen_workers, open_ledger

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
BASE = RandomBase(CONFIG, 0, deviation=0.1)
# The line is cut and workers die all the time, and come back: in a second, or, on a machine that is
# busy with other things, in a minute.
PATIENCE = OwnerConfig(
    hello_timeout_s=0.2,
    request_timeout_s=3.0,
    timeout_s_max=3.0,
    attempts_max=60,
    greetings_max=60,
    revive_s=1.0,
    revive_s_max=2.0,
)
LANES, RANK, SEQUENCES, LENGTH = 2, 8, 64, 32

MODES = Modes(
    {"training": "training (without --prepare)"},
    lambda args: () if args.prepare else ("training",),
    {"--model": ALL, "--prepare": ALL}
    | dict.fromkeys(("--out", "--steps", "--worker", "--tls"), ("training",)),
)


def prepared_model(directory: Path, skeleton: Skeleton) -> PreparedModel:
    """The public set-up, made or found. Raises PreparationError when it is damaged."""
    return prepare(
        directory, skeleton.groups, skeleton.load_weight,
        preset("exact"), lambda label, done: None,
    )  # fmt: skip


def train(args: argparse.Namespace) -> None:
    """Train what is left to train; the adapter is in `--out` at the end."""
    workers = chosen_workers(args)
    checkpoints: Path = args.out / "checkpoints"
    ledger = open_ledger(args.out, checkpoints, workers)
    skeleton = build_skeleton(BASE)
    prepared = prepared_model(args.model, skeleton)
    cipher = MlweOwner(preset("exact"), prepared.public_matrix())
    prepared.guard(cipher)
    model = add_lora(skeleton.model, RANK, 2 * RANK, seed=0)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, CONFIG.vocab_size, (SEQUENCES, LENGTH), generator=generator)
    # Warm-up to the end: every step moves the adapter more than the one before, so that one step
    # too few or too many is never hidden in noise.
    config = TrainConfig(
        args.steps, batch=4, micro_batch=2, learning_rate=1e-2, warmup_steps=args.steps
    )
    trainer = Trainer(
        model, text, config, LANES, skeleton.remote.forget_lane, checkpoints, 1, ledger=ledger
    )
    print(f"begins after step {trainer.progress.step}", flush=True)
    with (
        connected(
            prepared, cipher, workers.addresses, workers.tls, PATIENCE, LANES, ledger=ledger
        ) as client,
        skeleton.remote.connected(client.linear),
    ):
        trainer.train(lambda step, loss: print(f"step {step}", flush=True))
    trainer.require_untainted()
    save_adapter(model, args.out / "adapter", "none")
    print("done", flush=True)


def main() -> None:
    parser = Parser(__doc__, "scenarios.crashes.owner", MODES)
    add = parser.add_argument
    add("--model", type=place, required=True, metavar="DIR", help="the prepared model")
    add("--prepare", action="store_true", help="make the prepared model, and nothing else")
    add("--out", type=output_directory, default="runs/crashes", help="checkpoints and adapter")
    add("--steps", type=STEPS, default=24, help="optimiser steps (24)")
    add_worker_options(parser)
    args = parser.parse()
    if not (args.prepare or args.worker):
        parser.error("training needs a --worker")
    with clean_exit():
        if args.prepare:
            prepared_model(args.model, build_skeleton(BASE))
        else:
            train(args)


if __name__ == "__main__":
    main()
