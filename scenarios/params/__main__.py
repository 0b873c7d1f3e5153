"""How secure are these parameters, how exact, and how many bytes? Seconds, and nothing is run.

    python -m scenarios.params --preset exact --in 2048 --out 2048 --tokens 256
    python -m scenarios.params --rank 6 --owners 1000 --blocks 2^24 --json params.json

Costs the known lattice attacks on one encrypted block (primal uSVP; dual hybrid with guessing and
FFT) and on many blocks that share the public matrix, each under the field's cost models: ADPS16
(core-SVP), BDGL16, MATZOV. Figures of different models count different things. Twice: without
counting the public rounding from q to p, which is the line that parameters are judged by, and with
the rounding as the noise that it is to an attacker. `backends/he/estimate` has the sources.

Then the guideline's line, why no result can wrap, the error to expect against the same int8
weights, and the bytes on the wire. Parameters that are insecure are refused in one line that names
the nearest secure choice, with exit status 1.
"""

from __future__ import annotations

import argparse
import sys

from backends.defaults import MAX_INPUTS, SHARED_BLOCKS
from backends.he.params import PRESETS, InsecureParametersError
from backends.options import Parser, Whole
from scenarios import record
from scenarios.cli import clean_exit

MOST_BLOCKS = 1 << 64
"""Blocks that share A, at most: a block has 0.2 MB at least, and nobody sends so many. Far beyond
it the law of `primal_any_of`'s luck no longer holds."""
_MOST_TOKENS = 1 << 40


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.params")
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", default="thin", choices=PRESETS, help="(thin)")
    which.add_argument("--rank", type=Whole(1, 8), metavar="R", help="another module rank, 1 to 8")
    width = Whole(1, MAX_INPUTS, powers=True)
    add("--in", dest="inputs", type=width, default=2048, metavar="K", help="inputs (2048)")
    add("--out", dest="outputs", type=width, metavar="N", help="outputs (as many as inputs)")
    tokens = Whole(1, _MOST_TOKENS, powers=True)
    add("--tokens", type=tokens, default=256, help="tokens of a request (256)")
    count = Whole(1, MOST_BLOCKS, powers=True)
    add("--owners", type=count, default=1, help="owners who share the public matrix (1)")
    add("--blocks", type=count, default=SHARED_BLOCKS, help="blocks that each encrypts (2^30)")
    record.add_json_option(parser)
    args = parser.parse()
    if args.owners * args.blocks < 2:
        parser.error("--owners times --blocks is at least 2")
    if args.owners * args.blocks > MOST_BLOCKS:
        parser.error(f"--owners times --blocks is at most {MOST_BLOCKS} (2^64)")
    return args


def main() -> None:
    args = parsed()
    from scenarios.params.run import Shape, chosen, figures_of, refusal, summary  # take seconds

    blocks = args.owners * args.blocks
    shape = Shape(args.inputs, args.outputs or args.inputs, args.tokens)
    with clean_exit(ValueError):
        try:
            parameters = chosen(args.preset, args.rank)
            figures = figures_of(parameters, shape, blocks)
        except InsecureParametersError as error:
            sys.exit(refusal(error, args.rank or PRESETS[args.preset].rank, blocks))
    print(summary(parameters, shape, figures))
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
