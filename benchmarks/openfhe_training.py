"""A small model fine-tuned through every scheme and in clear, over the whole protocol.

    python -m benchmarks.openfhe_training --json F         clear, mlwe, OpenFHE's BFV and CKKS
    python -m benchmarks.openfhe_training --schemes mlwe   what needs no OpenFHE

A Llama of two layers with random weights and the quickstart's tokenizer learns the quickstart's
text: few enough weights for a scheme that takes tens of microseconds for each of them. All runs
start from the same adapters and the same int8 weights, and see the same text in the same order.
`final_loss` is the held-out loss as a private run measures it, through encrypted products.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import AutoTokenizer, LlamaConfig

from backends.defaults import SCHEMES
from backends.hardware import CPU
from backends.he.params import preset
from backends.he.preparation import prepare
from backends.he.store import PreparedModel
from backends.nn.adapters import add_lora
from backends.nn.local import localise
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import RandomBase
from backends.nn.trainer import TrainConfig, Trainer, evaluate
from backends.options import STEPS, Parser
from backends.session import HERE, Session, opened, require_scheme
from scenarios import record
from scenarios.cli import clean_exit
from scenarios.options import TINY_LLAMA
from scenarios.quickstart.run import SEQUENCE, Private, private_text
from scenarios.session import train_with_bar

HIDDEN, LAYERS, RANK, HELD_OUT = 64, 2, 8, 4
CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=HIDDEN, intermediate_size=160, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


class Runs:
    """The same training by several schemes.

    prepared  weights in int8; its hints are for `mlwe`
    """

    def __init__(self, steps: int, directory: Path) -> None:
        self.text: Private = private_text(AutoTokenizer.from_pretrained(TINY_LLAMA), HELD_OUT)
        self.training = TrainConfig(
            steps=steps, batch=4, micro_batch=4, learning_rate=1e-2, warmup_steps=1, seed=0
        )
        skeleton = self._skeleton()
        self.prepared: PreparedModel = prepare(
            directory, skeleton.groups, skeleton.load_weight, preset("exact"), lambda *_: None
        )
        self._clear_norms: list[float] = []

    def _skeleton(self) -> Skeleton:
        return build_skeleton(RandomBase(CONFIG, 0, deviation=0.1), least_remote=0.0)

    def _trained(self, skeleton: Skeleton, label: str) -> tuple[dict[str, Any], list[float]]:
        model = add_lora(skeleton.model, RANK, 2 * RANK, 0)
        trainer = Trainer(
            model, self.text.train, self.training, forget_lane=skeleton.remote.forget_lane
        )
        losses = train_with_bar(trainer, label)
        norms = list(trainer.progress.gradient_norms)
        seconds = sum(trainer.step_seconds)
        found = evaluate(model, self.text.held_out, 4, HELD_OUT)
        return {"name": label, "final_loss": found, "losses": losses, "steps_s": seconds}, norms

    def clear(self) -> dict[str, Any]:
        """Plain torch on the same int8 weights."""
        skeleton = self._skeleton()
        localise(skeleton, self.prepared)
        start = evaluate(skeleton.model, self.text.held_out, 4, HELD_OUT)
        figures, self._clear_norms = self._trained(skeleton, "clear")
        return figures | {"base_loss": start, "gradient_norm_ratio": 1.0}

    def private(self, scheme: str) -> dict[str, Any]:
        """Through the whole protocol, a worker in this process."""
        skeleton = self._skeleton()
        with opened(skeleton, self.prepared, scheme=scheme) as session:
            figures, norms = self._trained(skeleton, scheme)
            return figures | _used(session, self.training) | {
                "gradient_norm_ratio": fmean(
                    ours / theirs for ours, theirs in zip(norms, self._clear_norms, strict=True)
                )
            }  # fmt: skip


def _used(session: Session, training: TrainConfig) -> dict[str, Any]:
    """Totals of a session, its evaluation and a first product included."""
    used = session.usage()
    exactness = session.exactness()
    assert exactness is not None
    return {
        "owner_s": used.owner_s, "worker_s": used.worker_s, "bytes_up": used.bytes_up,
        "bytes_down": used.bytes_down, "answers": used.answers,
        "trained_tokens": training.steps * training.batch * SEQUENCE,
        "predicted_error": exactness.largest,
    }  # fmt: skip


def table(runs: Sequence[dict[str, Any]]) -> str:
    """For people."""
    clear = runs[0]["final_loss"]
    lines = [
        f"{run['name']:13} {run['final_loss']:.4f} {run['final_loss'] / clear - 1:+.3%}  "
        f"gradients {run['gradient_norm_ratio']:.4f}  steps {run['steps_s']:.1f} s"
        for run in runs
    ]
    return "\n".join([f"held-out loss {runs[0]['base_loss']:.4f} before training", *lines])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.openfhe_training")
    add = parser.add_argument
    add("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES, help="which (all)")
    add("--steps", type=STEPS, default=8, help="of 4 x 256 tokens (8)")
    record.add_json_option(parser)
    return parser.parse(arguments)


def main() -> None:
    args = parse()
    with clean_exit(), tempfile.TemporaryDirectory() as directory:
        for scheme in args.schemes:
            require_scheme(scheme, CPU, HERE)
        runs = Runs(args.steps, Path(directory))
        figures = [runs.clear(), *(runs.private(scheme) for scheme in args.schemes)]
        print(table(figures))
        record.write(args.json, {"steps": args.steps, "hidden": HIDDEN, "runs": figures})


if __name__ == "__main__":
    main()
