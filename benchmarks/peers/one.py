"""One library's rows as JSON lines: `python -m benchmarks.peers.one MODULE`.

It runs in the interpreter that has the library, which need have nothing else but numpy.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict

from benchmarks.peers import PEERS


def main() -> None:
    name = sys.argv[-1]
    if name not in PEERS:
        sys.exit(f"no peer {name!r}; there are {', '.join(PEERS)}")
    try:
        module = importlib.import_module(f"benchmarks.peers.{name}")
    except ImportError as error:
        sys.exit(f"not installed: {str(error).partition(chr(10))[0]}")
    for row in module.rows():
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
