"""Fine-tune your own model privately on your own text or chats.

    python -m scenarios.finetune --model DIR_OR_HUB_ID --data chats.jsonl
    python -m scenarios.finetune --model DIR_OR_HUB_ID --data chats.jsonl --preview
    python -m scenarios.finetune --model DIR_OR_HUB_ID --data chats.jsonl --dry-run
    python -m scenarios.finetune --config mine.yaml --steps 300
    python -m scenarios.finetune --model DIR_OR_HUB_ID --data notes/ \\
        --worker gpu.example:7443 --tls certs/owner --lanes 4

You keep the text, embeddings, attention, adapters, loss and optimiser; workers compute every frozen
linear on ciphertexts. Without --worker one in this process plays the worker, which shows what it
would be like, and is private anyway: nothing leaves the machine.

Before it starts it says what the run will take: bytes to and from workers, time, memory, disk. Then
it prepares the model's public set-up, once; measures the loss of the base model on documents that
are held out; trains, measuring that again every --evaluate-every steps; and writes to --out

    adapter/      a LoRA adapter that plain `peft` loads
    report.html   one page: losses, samples of both models, timeline, traffic, what a worker saw

Ctrl-C finishes the step in work and leaves an adapter of what was learned so far; the same command
goes on from there, with more or fewer --steps too. Text whose loss cannot be learned from (nothing
counted, most of it cut off, a loss above guessing) is refused before the first step.

--config takes YAML with the same options: `learning-rate: 1e-4`, `worker: [a:1, b:1]`, `yes` in
quotes. `python -m scenarios.merge` makes one checkpoint of base and adapter. docs/finetune.md has
more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from backends.options import Parser
from scenarios import record
from scenarios.cli import clean_exit, use_kernel
from scenarios.finetune.options import MODES, parsed


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.finetune", MODES)
    return parsed(parser, sys.argv[1:] if words is None else words)


def main() -> None:
    args = parse()
    from backends.net.owner import RemoteLinearError  # these take seconds to load
    from scenarios.finetune.run import Finetune
    from scenarios.finetune.told import print_report
    from scenarios.preparation import chosen_base
    from scenarios.session import one_run
    from scenarios.texts import preview

    with clean_exit(RemoteLinearError):
        if args.preview:
            preview(args, chosen_base(args))
            return
        use_kernel(args.kernel)
        with one_run(args.out):
            run = Finetune(args)
            figures = run.run()
        if figures is None:
            print("not started")
            return
        trained = "losses" in figures
        if trained:
            print_report(figures, args.weights)
        record.write(args.json, figures)
        if trained:
            run.write_trace()


if __name__ == "__main__":
    main()
