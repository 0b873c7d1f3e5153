"""Pre-train a tiny but genuine Llama on the Python source that ships with Python.

What it shows: a base model that the scenarios can fine-tune with no model hub and no network.
It is a plain ``LlamaForCausalLM`` (about 4.5 M weights, tied embeddings, grouped-query
attention) with its own lossless byte-level BPE vocabulary of 4096 tokens, trained from random
weights on the standard library of the interpreter that runs this file.

Run it from the root of the repository, with torch, transformers, tokenizers and tqdm installed::

    python -m scenarios.make_tiny_llama

Expected result: ``scenarios/assets/tiny-llama/`` holds under 9.9 MB: bf16 weights, tokenizer,
configuration, and a README with the losses reached. The held-out loss falls from about 8.3 (a
uniform guess over 4096 tokens) to 3.73 nats per token in about 20 minutes on two CPU cores.
Nothing is written before the run is complete: an interrupted run leaves the old files alone.
"""

from __future__ import annotations

import argparse

from backends.options import SEED, STEPS, Number, Parser
from backends.places import replaced_directory

BATCH, SEQ_LEN = 4, 256
"""Of a step: texts, and tokens of each."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        "Pre-train a tiny Llama, from random weights, on the source of the standard library of "
        "this Python. It needs no network and no GPU.",
        "scenarios.make_tiny_llama",
    )
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.epilog = (
        "To try it out: --minutes 1 --out my-tiny-llama. The same --steps and --seed train in the "
        "same way each time; --minutes depends on the speed of the machine."
    )
    steps_help = f"optimizer steps, each on {BATCH} x {SEQ_LEN} tokens"
    minutes_help = "train for this long instead; the learning rate follows the clock"
    precision_help = "matrix products; choose fp32 on CPUs that do bf16 slowly"
    out_help = "folder to make; a model already there is replaced at the end"
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=STEPS, default=4500, help=steps_help)
    length.add_argument(
        "--minutes", type=Number(0.01, 10_080), default=argparse.SUPPRESS, help=minutes_help
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the weights and the order")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help=precision_help
    )
    parser.add_argument(
        "--out", type=replaced_directory, default="scenarios/assets/tiny-llama", help=out_help
    )
    args = parser.parse()
    args.minutes = getattr(args, "minutes", None)
    if args.out.exists() and not (args.out / "config.json").exists():
        parser.error(f"{args.out} exists and holds no model: name another folder")
    return args


def main() -> None:
    args = parse_args()
    from scenarios.make_tiny_llama.run import make  # which takes seconds to load

    make(args)


if __name__ == "__main__":
    main()
