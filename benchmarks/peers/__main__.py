"""One 2048x2048 linear over encrypted activations: by this project, by other libraries, in clear.

    make peers                                    installs the other libraries, beside this one
    python -m benchmarks.peers --json FILE        a quarter of an hour on two cores
    python -m benchmarks.peers --only ours concrete_ml

Server and owner seconds, bytes up and down, all for each token; bytes of keys that the server must
be given; the relative error against the same weights in clear. Every library runs in a process of
its own, one after the other on all cores, at 128-bit security: tokens packed where it can, a
process for each core where its products take one. Ours and torch are medians of seven rounds after
two, the others, which take up to half a minute, one. Where only some of the outputs are computed,
and the time of all is reckoned from them, the row says so. What is not installed is said and left
out; nothing of this project needs any of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backends.options import Parser
from benchmarks.peers import PEERS
from scenarios import record
from scenarios.cli import clean_exit

ROOT = Path(__file__).parents[2]
HOMES = {"openfhe_packed": ROOT / ".venv-openfhe", "ours": Path(sys.prefix)}
"""Environments with a peer's library, where it is not that of the others."""
OTHERS = ROOT / ".venv-peers"


def home(peer: str) -> Path:
    """The interpreter that runs a peer: its environment's, or this one."""
    found = HOMES.get(peer, OTHERS) / "bin" / "python"
    return found if found.exists() else Path(sys.executable)


def rows_of(peer: str) -> Iterator[dict[str, Any]]:
    """What a peer measures. Raises RuntimeError, with its reason, when it ended early."""
    # What a library says goes into a file: a pipe that nobody reads would stop it when full.
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with subprocess.Popen(
            [home(peer), "-m", "benchmarks.peers.one", peer],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=said,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for text in process.stdout:
                if text.startswith("{"):
                    yield json.loads(text)
        said.seek(0)
        reason = said.read().strip().rpartition("\n")[2]
    if process.returncode:
        raise RuntimeError(reason or f"ended with status {process.returncode}")


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Our default against the best of each kind among the others, and against clear."""
    ours = [row for row in rows if row["name"] == "ours"]
    clear = [row for row in rows if row["name"].startswith("clear")]
    peers = [row for row in rows if row not in ours and row not in clear]
    if not ours or not peers:
        return {}
    # Rows of a preset come fastest kernel first: the one that a worker takes here.
    mine = next(row for row in ours if row["scheme"].endswith("thin"))
    size = lambda row: row["up_bytes_per_token"] + row["down_bytes_per_token"]  # noqa: E731
    fastest = min(peers, key=lambda row: row["server_s_per_token"])
    smallest = min(peers, key=size)
    found = {
        "server_times_less": fastest["server_s_per_token"] / mine["server_s_per_token"],
        "fastest_peer": f"{fastest['name']} {fastest['scheme']}",
        "bytes_ratio": size(mine) / size(smallest),
        "smallest_peer": f"{smallest['name']} {smallest['scheme']}",
    }
    if clear:
        best = min(row["server_s_per_token"] for row in clear)
        found["server_over_clear"] = mine["server_s_per_token"] / best
    return found


def line(row: dict[str, Any]) -> str:
    """One row, for people."""
    return (
        f"{row['name']:<23}{row['scheme']:<26}{row['server_s_per_token']:>11.2e} s server"
        f"{row['owner_s_per_token']:>10.1e} s owner{row['up_bytes_per_token']:>9.0f} B up"
        f"{row['down_bytes_per_token']:>9.0f} B down{row['key_bytes'] / 1e6:>7.1f} MB keys"
        f"{row['relative_error']:>9.2%} error{', extrapolated' if row['extrapolated'] else ''}; "
        f"{row['note']}"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All peers; what is found is written after each row."""
    figures: dict[str, Any] = {"rows": [], "left_out": {}}
    for peer in args.only:
        try:
            for row in rows_of(peer):
                print(line(row), flush=True)
                figures["rows"].append(row)
                figures |= summary(figures["rows"])
                record.write(args.json, figures, quiet=True)
        except RuntimeError as error:
            print(f"{peer} left out: {error}", flush=True)
            figures["left_out"][peer] = str(error)
    return figures


def main() -> None:
    parser = Parser(__doc__, "benchmarks.peers")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER",
        help=f"some of {', '.join(PEERS)}")  # fmt: skip
    record.add_json_option(parser)
    args = parser.parse()
    with clean_exit():
        figures = measure(args)
        if "bytes_ratio" in figures:
            print(
                f"a worker of ours (thin) computes {figures['server_times_less']:,.0f} times less "
                f"than {figures['fastest_peer']}, and {figures['bytes_ratio']:.2f} of the bytes of "
                f"{figures['smallest_peer']} travel"
            )
        record.write(args.json, figures)


if __name__ == "__main__":
    main()
