"""Prepare a model, once, for private fine-tuning; or verify one that lies there.

    python -m scenarios.prepare                               the 1B shape, seeded random weights
    python -m scenarios.prepare --weights meta-llama/Llama-3.2-1B
    python -m scenarios.prepare --weights DIR_OR_HUB_ID --verify --json F
    python -m scenarios.prepare --weights DIR --preset paranoid --owner-tag "a text of your own"

Every scenario prepares what it needs by itself; this does that and nothing else, so that it can be
done before, elsewhere, or once for several people, who then point --cache at a copy. Give the same
--weights, --lm-head, --preset and --owner-tag as the run will have: they are the model's place in
the cache. Interrupting is safe: the same command goes on with the file after the last finished one.

What is made is public: int8 weights for workers; for owners scales, plans (how far inputs may be
scaled up before results could wrap) and hints (the weights times a public matrix). They are as good
as whoever made them. Wrong ones would turn answers into garbage or let results wrap, so a model
is verified when it has been made, and when one is found that you have not verified before: plans
are computed again, hints compared with the weights by a fresh random combination, which a wrong
hint survives with probability 1/q. The verdict is then kept under a key of yours in
$XDG_STATE_HOME/private-lora or ~/.local/state/private-lora, and later runs only compare digests.
--verify verifies in any case.

Expected for the 1B shape on two cores with AVX2: 4.1 GB on disk, made in under 4 minutes, verified
in under 15 seconds. Afterwards:

    python -m scenarios.llama1b --real-cpu --weights DIR_OR_HUB_ID --data DIR_OR_FILE

A worker on another machine needs a part of it, manifest.json and the folder worker/ (1 GB for the
1B); the end of the output says how to copy that, and --worker-part DIR puts it apart. The owner
needs all of it.
"""

from __future__ import annotations

from backends.options import ALL, SEED, Modes, Parser
from backends.places import replaced_directory
from scenarios import record
from scenarios.cli import add_kernel_option, clean_exit, use_kernel
from scenarios.options import add_model_options

MODES = Modes(
    {"random": "random weights (without --weights)"},
    lambda args: ("random",) if args.weights is None else (),
    {"--seed": ("random",)}
    | dict.fromkeys(
        (
            "--weights", "--lm-head", "--least-remote", "--preset", "--owner-tag", "--cache",
            "--verify",
            "--worker-part", "--kernel", "--json",
        ),
        ALL,
    ),
)  # fmt: skip


def main() -> None:
    parser = Parser(__doc__, "scenarios.prepare", MODES)
    add_model_options(parser)
    parser.add_argument("--seed", type=SEED, default=0, help="seed of random weights (0)")
    parser.add_argument(
        "--verify", action="store_true", help="verify plans and hints, whatever was found before"
    )
    parser.add_argument(
        "--worker-part", type=replaced_directory, metavar="DIR",
        help="also put what a worker needs into DIR, for copying it to another machine",
    )  # fmt: skip
    add_kernel_option(parser)
    record.add_json_option(parser)
    args = parser.parse()
    from scenarios.prepare.run import print_report, run  # which takes seconds to load

    with clean_exit():
        use_kernel(args.kernel)
        figures = run(args)
        print_report(figures, args.worker_part)
        record.write(args.json, figures)


if __name__ == "__main__":
    main()
