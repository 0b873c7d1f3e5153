"""Complete prompts privately: the workers see neither what is asked nor what is answered.

    python -m scenarios.generate --prompt "def shortest_path(G, source"
    python -m scenarios.generate --adapter runs/quickstart/adapter --prompt "    >>> G = nx."
    python -m scenarios.generate --weights DIR_OR_HUB_ID --prompts FILE --tokens 128 --json F
    python -m scenarios.generate --worker gpu.example:7443 --tls certs/owner --prompt TEXT

Without --weights it is the small Llama of this repository, which needs no download and knows
Python's standard library; with --adapter it is what a run has made of it. Every frozen linear of
each new token is computed by the worker on a ciphertext of one token; embeddings, attention,
adapters and, unless --lm-head remote, the head stay here. Decoding is greedy: always the most
likely token.

A worker can count. So each prompt takes --tokens passes, wherever its answer ends, and what comes
after the end is thrown away; how many prompts there are, and how many tokens each has, it sees.

`python -m benchmarks.generation` measures what a token takes, against clear. The first run of a
model prepares the public set-up, once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from backends.defaults import LEAST_REMOTE
from backends.options import TOKENS, Number, Parser, place
from backends.places import output_directory
from scenarios import record
from scenarios.cli import add_kernel_option, clean_exit, use_kernel
from scenarios.options import (
    HEADS,
    TINY_LLAMA,
    add_preparation_options,
    add_worker_options,
    modes_with_workers,
    weights_text,
)

MODES = modes_with_workers(
    (
        "--weights", "--model", "--adapter", "--prompt", "--prompts", "--tokens", "--lm-head",
        "--least-remote", "--preset", "--owner-tag", "--cache", "--out", "--worker",
        "--kernel", "--json",
    )
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.generate", MODES)
    add = parser.add_argument
    add("--model", "--weights", dest="weights", type=weights_text, default=str(TINY_LLAMA),
        metavar="DIR|FILE|ID",
        help="checkpoint: a directory, a GGUF file, or an id of the hub (the small Llama of this "
        "repository)")  # fmt: skip
    add("--adapter", type=place, metavar="DIR",
        help="LoRA adapter, as a run or `peft` has saved it; the base alone without")  # fmt: skip
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="what to complete (several times)")  # fmt: skip
    add("--prompts", type=place, metavar="FILE",
        help="more of them, a line each; .jsonl: strings, or records with `prompt`")  # fmt: skip
    add("--tokens", type=TOKENS, default=64,
        help="passes, and so the most tokens, of each answer (64)")  # fmt: skip
    add("--lm-head", choices=HEADS, default="local",
        help="who multiplies by the head")  # fmt: skip
    add("--least-remote", type=Number(0, 1), default=LEAST_REMOTE, metavar="SHARE",
        help="refuse a model of whose frozen weights workers can compute less than this "
        f"({LEAST_REMOTE:g})")  # fmt: skip
    add_preparation_options(parser, usual="exact")
    add("--out", type=output_directory, default="runs/generate",
        help="where workers that were caught are remembered (runs/generate)")  # fmt: skip
    add_worker_options(parser)
    add_kernel_option(parser)
    record.add_json_option(parser)
    return parser.parse(arguments)


def main() -> None:
    args = parse()
    from backends.net.owner import RemoteLinearError  # these take seconds to load
    from scenarios.generate.run import Generation, print_report
    from scenarios.session import one_run

    with clean_exit(RemoteLinearError):
        use_kernel(args.kernel)
        with one_run(args.out):
            figures = Generation(args).run()
        print_report(figures)
        record.write(args.json, figures)


if __name__ == "__main__":
    main()
