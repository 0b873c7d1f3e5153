"""Kill real processes over a real line, and watch from outside what becomes of a training.

Owner and worker are processes of their own on this machine; every byte between them goes through a
line of the harness, which can be cut and heals. Nothing is shared with the simulated chaos.

    python -m scenarios.chaos --processes --kills 200 --json kills.json

Small private trainings, one after the other, half of them over TLS and half in plain text (on
loopback), with a checkpoint after every step. At moments drawn from the seed the owner is killed
(kill -9; also while it writes a checkpoint) and started again, the worker is killed and started
again, the line is cut, and the disk fills up while a checkpoint is written. Expected: `lost_steps`,
`doubled_steps`, `other_adapters` and `reused_secrets` 0, within 15 minutes on two idle cores. They
are told from what lies on the disk, from the adapter's bits beside those of undisturbed trainings,
and from the requests on the line where they are plain text (scenarios/crashes/verdict.py, wire.py).
Power cuts are not played: what a killed process wrote, the system still has. The "full" disk is a
limit on the size of the owner's files, which needs no privilege.

    python -m scenarios.chaos --processes --quickstart --json quickstart.json

The private half of the quickstart over TLS, three times: twice undisturbed, to see how far two runs
are apart by the noise of the cipher, and once while its worker is killed twice and the line cut
twice. Expected: no farther than twice that, within 15 minutes on two idle cores.

The same --seed draws the same faults; what the processes do at that moment is up to them. A finding
ends the run with one line that names the seed and where the logs are, and with exit status 1.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from backends.options import ALL, SEED, STEPS, Modes, Parser, Whole
from scenarios import record

MODES = Modes(
    {"kills": "killing small trainings (without --quickstart)"},
    lambda options: () if options.quickstart else ("kills",),
    {"--kills": ("kills",)} | dict.fromkeys(("--quickstart", "--steps", "--seed", "--json"), ALL),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.chaos --processes", MODES)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kills", type=Whole(1, 100_000), default=200, metavar="N",
        help="so many kills (200)")  # fmt: skip
    what.add_argument("--quickstart", action="store_true", help="disturb the quickstart instead")
    parser.add_argument("--steps", type=Whole(8, STEPS.most), metavar="N",
        help="of each training (24; 120)")  # fmt: skip
    parser.add_argument("--seed", type=SEED, default=0, metavar="S", help="draws the faults (0)")
    record.add_json_option(parser)
    return parser.parse(arguments)


def certificates(place: Path) -> Path:
    """An owner's and a worker's, for this machine's own address."""
    from scenarios.certs import Authority
    from scenarios.crashes.line import HOST

    authority = Authority()
    authority.issue(place / "owner")
    authority.issue(place / "worker", [HOST])
    return place


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parse(arguments)
    from scenarios.crashes import campaign, quickstart  # these take a second to load
    from scenarios.crashes.training import Failure
    from scenarios.crashes.zygote import Zygote

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = Path(tempfile.mkdtemp(prefix="private-lora-crashes-"))
    kept = certificates(place / "certificates")
    try:
        if options.quickstart:
            figures, found = quickstart.run(
                kept, place / "runs", options.seed, options.steps or 120
            )
        else:
            with Zygote(place / "zygote.log") as zygote:
                figures, found = campaign.run(
                    zygote, kept, place / "runs", options.seed, options.kills,
                    steps=options.steps or campaign.STEPS,
                )  # fmt: skip
    except Failure as failure:
        sys.exit(f"FOUND at seed {options.seed}: {failure}; logs in {place}")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; what there is lies in {place}")
    for name, value in figures.items():
        print(f"{name}: {value}")
    record.write(options.json, figures)
    if found is not None:
        sys.exit(f"FOUND at seed {options.seed}: {found}; logs in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
