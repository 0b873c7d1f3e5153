"""One part of the benchmark, in a process of its own: python -m benchmarks.gpu.child FOLDER

FOLDER/job.json says which; figures go to FOLDER/figures.json, warnings of the backends to
FOLDER/warnings.txt, and whatever goes wrong to stderr. FOLDER/done, written last, tells a part
that came to its end from one whose process a library ended with status 0. The process ends
without cleaning up: after a fault, or behind a kernel that does not end, that could take for ever.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import traceback
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from backends.files import write_json
from benchmarks.gpu.task import Task

_LAST_WORDS = 0.8  # of the deadline: then every thread says where it is, in case it hangs


def keep(path: Path, figures: Any) -> None:
    """Write figures. Raises ValueError when one of them is no number: JSON has no NaN."""
    try:
        json.dumps(figures, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"figures that JSON cannot hold: {error}") from error
    write_json(path, figures)


def main(folder: Path) -> None:
    """Run the part; exit status 0 when it came to its end."""
    job = json.loads((folder / "job.json").read_text())
    faulthandler.enable()
    faulthandler.dump_traceback_later(_LAST_WORDS * job["task"]["deadline_s"])
    logging.basicConfig()
    warnings = logging.FileHandler(folder / "warnings.txt", delay=True)
    warnings.setLevel(logging.WARNING)
    logging.getLogger("backends").addHandler(warnings)
    module, _, function = job["call"].partition(":")
    task = Task(**job["task"], keep=partial(keep, folder / "figures.json"))
    status = 0
    try:
        task.keep(getattr(import_module(module), function)(task))
        (folder / "done").touch()
    except BaseException:  # whatever it is, the process has to end below
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
