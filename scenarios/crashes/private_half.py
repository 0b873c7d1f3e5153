"""The quickstart's private half, and nothing else of it: its worker is at an address.

    python -m scenarios.crashes.private_half --out RUN --worker 127.0.0.1:PORT --tls DIR

Takes the options of `python -m scenarios.quickstart`. The losses of all steps and the held-out loss
are in RUN/private.json at the end, the adapter in RUN/adapter.
"""

from __future__ import annotations

from backends.files import write_json
from scenarios.cli import clean_exit, use_kernel
from scenarios.quickstart.__main__ import parse
from scenarios.quickstart.run import Quickstart
from scenarios.session import one_run


def main() -> None:
    args = parse()
    with clean_exit():
        use_kernel(args.kernel)
        with one_run(args.out):
            run = Quickstart(args)
            losses = run.private()
    write_json(
        args.out / "private.json",
        {"losses": losses, "held_out_loss": run.figures["private_loss"]},
    )


if __name__ == "__main__":
    main()
