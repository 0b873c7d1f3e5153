"""Merge an adapter into its base model: one checkpoint, for whatever reads those.

    python -m scenarios.merge --model DIR_OR_HUB_ID --adapter runs/finetune/adapter --into merged
    python -m scenarios.merge --model DIR --adapter DIR --into merged --dtype float32

`peft` does it (`merge_and_unload`), on the base as it was published: a private run has trained on
8-bit weights of the same base, which are closer to it than people's usual 4-bit bases. Nothing is
encrypted and no worker is asked. The base is in memory whole, in the type of numbers it has, or in
that of --dtype.

--into gets config.json, safetensors, and the base's tokenizer files as they are. It loads with
transformers, and is what llama.cpp's converter takes:

    python convert_hf_to_gguf.py merged --outfile merged.gguf

An adapter of another model is refused: by the names and shapes of its numbers, and, where it names
another base that is on this machine (a directory, or what was downloaded of a hub's id), by that
base's files. Where those cannot be compared, a line says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from backends.options import ALL, Modes, Parser, place
from backends.places import replaced_directory
from backends.units import human_bytes
from scenarios import record
from scenarios.cli import clean_exit
from scenarios.options import weights_text

DTYPES = ("float32", "bfloat16", "float16")

MODES = Modes(
    {},
    lambda args: (),
    dict.fromkeys(("--model", "--weights", "--adapter", "--into", "--dtype", "--json"), ALL),
)  # fmt: skip


def _new_directory(text: str) -> Path:
    """For an option's type: a place for a directory where nothing is."""
    found = replaced_directory(text)
    if found.exists() and any(found.iterdir()):
        raise argparse.ArgumentTypeError(f"{found} holds something already; name a new directory")
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.merge", MODES)
    add = parser.add_argument
    add("--model", "--weights", dest="weights", type=weights_text, required=True,
        metavar="DIR|ID", help="the base: a checkpoint's directory, or an id of the hub",
    )  # fmt: skip
    add("--adapter", type=place, required=True, metavar="DIR",
        help="LoRA adapter, as a run or `peft` has saved it")  # fmt: skip
    add("--into", type=_new_directory, required=True, metavar="DIR",
        help="a new directory for the merged checkpoint")  # fmt: skip
    add("--dtype", choices=DTYPES, help="type of its numbers (that of the base)")
    record.add_json_option(parser)
    return parser.parse(arguments)


def main() -> None:
    args = parse(sys.argv[1:])
    import torch  # this and the next take seconds to load

    from scenarios.merge.run import merge

    with clean_exit():
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        figures = merge(args.weights, args.adapter, args.into, dtype)
        print(
            f"{figures['into']}: {figures['tensors']} tensors in {figures['dtype']}, "
            f"{human_bytes(figures['bytes'])}; {', '.join(figures['files'])}"
        )
        print("for llama.cpp: python convert_hf_to_gguf.py " + figures["into"])
        record.write(args.json, figures)


if __name__ == "__main__":
    main()
