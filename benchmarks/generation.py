"""Private generation: are the tokens right, what travels, how much longer does it take?

    python -m benchmarks.generation --json FILE                some minutes on two cores
    python -m benchmarks.generation --prompts 4 --tokens 16    that it runs

tokens   greedy completions of held-out text by the quickstart's model, private against clear on the
         same int8 base: `equal_share` of all tokens at their place, where one that differs changes
         what follows; `choice_share` of the private choices that clear makes after the same prefix
bytes    of one generated token at Llama-3.2-1B's shape, head local, with the frames around them
time     of a token, private over clear, prompt by prompt in turns: with the worker in this process,
         and with one in a process of its own over mutual TLS on loopback
handing  voluntary changes of thread for each remote linear in one process (the system's count)

Times and their ratio depend on who else uses the machine: its load is told beside them.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import AutoTokenizer

from backends.door import place_of, prepared_at
from backends.he.params import PRESETS, preset
from backends.he.store import PreparedModel
from backends.net.tls import Tls
from backends.nn.base import open_base
from backends.nn.generate import complete
from backends.nn.local import localise
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.options import TIMES, Parser, Whole
from backends.session import HERE, Workers, opened
from benchmarks.two_processes import worker_at
from protocol.messages import SESSION_BYTES, Multiply, Product, encode
from scenarios import record
from scenarios.certs import Authority
from scenarios.cli import clean_exit, use_kernel
from scenarios.options import TINY_LLAMA, add_cache_option
from scenarios.quickstart.run import private_text
from sim.models import model_config
from sim.workload import trace_step

MODEL = "llama-3.2-1b"
PROMPT_TOKENS = 32
WARM_UP = 2
"""Prompts before any that count: they compile kernels, map hints and teach scales."""


def token_bytes(name: str) -> dict[str, int]:
    """Bytes of one generated token of MODEL under a preset, its head local."""
    work = trace_step(model_config(MODEL), 2, preset=name)
    forward = [work.matrices[index] for index in range(0, len(work.matrices), 2)]
    up = sum(shape.up_bytes(1) for shape in forward)
    down = sum(shape.down_bytes(1) for shape in forward)
    empty = bytes(SESSION_BYTES)
    frames = len(encode(Multiply(empty, 1, 0, 1, b""))) + len(encode(Product(empty, 1, b"")))
    around = frames * len(forward)
    return {
        "linears": len(forward), "up": up, "down": down, "frames": around,
        "total": up + down + around,
    }  # fmt: skip


def prompts(tokenizer: Any, count: int) -> torch.Tensor:
    """int64[count, PROMPT_TOKENS]: how that many held-out sequences begin."""
    return private_text(tokenizer, count).held_out[:count, :PROMPT_TOKENS]


def choices(model: torch.nn.Module, prompt: torch.Tensor, found: list[int]) -> list[int]:
    """What a model would have chosen at each place after a prompt, int64[1, S], and `found`."""
    whole = torch.cat([prompt, torch.tensor([found])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=whole).logits[0, prompt.shape[1] - 1 : -1]
    return [int(token) for token in logits.argmax(-1)]


class Measured:
    """One preset: its model, private and clear, and what was found."""

    def __init__(self, name: str, cache: Path, asked: torch.Tensor, tokens: int) -> None:
        self.name, self._asked, self._tokens = name, asked, tokens
        base, parameters = open_base(TINY_LLAMA), preset(name)
        self._private, clear = build_skeleton(base), build_skeleton(base)
        place = place_of(base, self._private.groups, parameters, cache, b"")
        self._prepared: PreparedModel = prepared_at(place, self._private, parameters)
        localise(clear, self._prepared)
        self._clear: Skeleton = clear

    def run(self, certs: Path) -> dict[str, Any]:
        """The figures of this preset."""
        found: dict[str, Any] = {"bytes_of_a_1b_token": token_bytes(self.name)}
        found["in_process"] = self._over(HERE)
        with worker_at(self._prepared.directory, certs) as address:
            tls = Tls(certs / "owner")
            found["loopback"] = self._over(Workers((address,), tls))
        return found

    def _over(self, workers: Workers) -> dict[str, Any]:
        private_s: list[float] = []
        clear_s: list[float] = []
        equal: list[bool] = []
        chosen: list[bool] = []
        with opened(self._private, self._prepared, workers=workers) as session:
            for prompt in self._asked[:WARM_UP]:
                self._timed(self._private, prompt)
                self._timed(self._clear, prompt)
            before, waits = session.usage(), 0
            for prompt in self._asked:
                waits -= resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
                ours, seconds = self._timed(self._private, prompt)
                waits += resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
                private_s.append(seconds)
                theirs, seconds = self._timed(self._clear, prompt)
                clear_s.append(seconds)
                equal += [a == b for a, b in zip(ours, theirs, strict=True)]
                wanted = choices(self._clear.model, prompt[None], ours)
                chosen += [a == b for a, b in zip(ours, wanted, strict=True)]
            used = session.usage().since(before)
        tokens = len(self._asked) * self._tokens
        ratios = [ours / theirs for ours, theirs in zip(private_s, clear_s, strict=True)]
        return {
            "equal_share": fmean(equal),
            "choice_share": fmean(chosen),
            "private_s": median(private_s),
            "clear_s": median(clear_s),
            "private_over_clear": median(ratios),
            "owner_s": used.owner_s / tokens,
            "worker_s": used.worker_s / tokens,
            "waited_s": used.waited_s / tokens,
            "switches_per_linear": waits / tokens / len(self._private.groups),
            "load": os.getloadavg()[0],
        }

    def _timed(self, skeleton: Skeleton, prompt: torch.Tensor) -> tuple[list[int], float]:
        """The completion of int64[S], and the median seconds of a token after the first."""
        times: list[float] = []
        found = complete(
            skeleton.model, prompt[None], self._tokens, None,
            lambda token: times.append(time.perf_counter()),
        )  # fmt: skip
        return found, median(b - a for a, b in pairwise(times))


def line(name: str, found: dict[str, Any]) -> str:
    """What was found of one preset, for people."""
    told = [f"{name}: {found['bytes_of_a_1b_token']['total'] / 1e6:.2f} MB a token of {MODEL}"]
    for way in ("in_process", "loopback"):
        f = found[way]
        told.append(
            f"  {way}: {f['equal_share']:.1%} of tokens as in clear ({f['choice_share']:.1%} after "
            f"the same prefix), {1e3 * f['private_s']:.1f} ms a token against "
            f"{1e3 * f['clear_s']:.1f} ms, {f['private_over_clear']:.2f} times "
            f"(load {f['load']:.1f}); {f['switches_per_linear']:.1f} waits a linear"
        )
    return "\n".join(told)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.generation")
    add = parser.add_argument
    add("--preset", action="append", choices=sorted(PRESETS),
        help="cipher parameters (thin and exact; several times)")  # fmt: skip
    add("--prompts", type=TIMES, default=20, help="completions of each (20)")
    add("--tokens", type=Whole(2, 400), default=64, help="of a completion (64)")
    add_cache_option(parser)
    record.add_json_option(parser)
    args = parser.parse(arguments)
    args.preset = list(dict.fromkeys(args.preset or ("thin", "exact")))
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All presets, one after the other; what is found is written after each."""
    asked = prompts(AutoTokenizer.from_pretrained(TINY_LLAMA), args.prompts)
    figures: dict[str, Any] = {
        "prompts": len(asked), "prompt_tokens": PROMPT_TOKENS, "tokens": args.tokens,
        "kernel": use_kernel(None).name,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="generation-") as directory:
        certs = Path(directory)
        authority = Authority()
        authority.issue(certs / "owner")
        authority.issue(certs / "worker", ["localhost"])
        for name in args.preset:
            figures[name] = Measured(name, args.cache, asked, args.tokens).run(certs)
            print(line(name, figures[name]), flush=True)
            record.write(args.json, figures)
    return figures


def main() -> None:
    args = parse()
    with clean_exit():
        measure(args)


if __name__ == "__main__":
    main()
