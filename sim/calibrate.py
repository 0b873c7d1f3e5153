"""Measure this machine and write the device profile that a simulated one runs on.

    python -m sim.calibrate [--out PROFILE.json] [--json FIGURES.json]

Small models of three widths take private training passes (see `sim.rehearsal`): the owner's
layers, encrypting, multiplying and decrypting are timed where they happen, at 64 and 256 tokens,
round after round, and fitted with rates, a bandwidth and overheads (see `sim.fitting`). Passes of
several lanes at once then tell how much of the machine a lane keeps from the others. What the fit
does not explain is printed beside it, case by case.

A machine that does something else at the time cannot be measured: when other processes are busy
it waits for them, for a while, and measurements they disturbed are left out as far as enough
others remain; of those that remain the faster half counts. Takes about 45 seconds.
"""

from __future__ import annotations

import sys

from backends.errors import UserError
from backends.options import Parser
from backends.places import output_file


def main() -> None:
    parser = Parser(__doc__, "sim.calibrate")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the profile here")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write cases and residuals here"
    )
    args = parser.parse()
    from sim.calibration import run  # which takes seconds to load

    try:
        run(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
