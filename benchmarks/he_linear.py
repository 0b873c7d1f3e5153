"""One frozen linear layer: worker and owner under encryption against clear torch.

    python -m benchmarks.he_linear --json FILE                        all cases, some minutes
    python -m benchmarks.he_linear --tokens 256 --shape 2048x2048     one case
    python -m benchmarks.he_linear --format 16,8                      not the planner's format
    python -m benchmarks.he_linear --kernel generic --tokens 256      another kernel

For every shape and token count the sides are timed in turn, round after round, and each figure
is the median over rounds, so that a machine that changes speed changes all of them. Clear torch
is measured in fp32 and in bf16: the honest alternative is the faster of the two. The check of
answers is part of encrypting and decrypting, and costs what an owner without it is faster.

Values travel in the format that the planner chooses for the preset and the matrix: a case says
which. The predicted error is that of a first request; an owner of `thin` learns a larger scale from
its answers, and the error is that of the last round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.interface import OwnerMatrix
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import PRESETS, Parameters, preset
from backends.he.plan import plan_matrix
from backends.he.public import HintBuilder, PublicMatrix, public_seed
from backends.he.quantise import dequantise, quantise
from backends.he.wire import DOWN_BITS, UP_BITS, Format
from backends.machine import cpu_flags
from backends.options import TIMES, Parser, Whole, shown
from scenarios import record
from scenarios.cli import add_kernel_option, clean_exit, use_kernel

SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048), (2048, 512))
TOKENS = (1, 64, 256, 1024)
_SIDE = Whole(1, 1 << 17)
_MOST_WEIGHTS = 1 << 28  # in four copies: 5 GB


def heavy_tailed(tokens: int, inputs: int, seed: int) -> NDArray[np.float32]:
    """Activations like a transformer's: Student t, with a few outlier channels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, size=(tokens, inputs))
    x[:, rng.choice(inputs, max(1, inputs // 256), replace=False)] *= 8
    return x.astype(np.float32)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """(milliseconds, result)."""
    start = time.perf_counter()
    result = action()
    return (time.perf_counter() - start) * 1e3, result


class Layer:
    """One layer in all its forms: prepared for the cipher, and in clear fp32 and bf16."""

    def __init__(
        self, inputs: int, outputs: int, parameters: Parameters, format: Format | None
    ) -> None:
        torch.manual_seed(inputs + outputs)
        self.fp32 = torch.randn(outputs, inputs) * 0.02
        self.bf16 = self.fp32.bfloat16()
        self.codes, scale = quantise(self.fp32, limit=parameters.weight_limit)
        self.public = PublicMatrix(public_seed(bytes(32), parameters), parameters.rank)
        hint = HintBuilder(self.public).build(self.codes, True)
        ones = np.ones(inputs, np.float32)
        plan = plan_matrix(self.codes, scale, parameters)
        if format is not None:
            plan = replace(plan, **asdict(format))
        self.matrix = OwnerMatrix(f"{inputs}x{outputs}", ones, scale, plan, hint)
        self.exact = dequantise(self.codes, scale).double().numpy()


def measure(layer: Layer, tokens: int, parameters: Parameters, rounds: int) -> dict[str, Any]:
    """One case of the report."""
    x = heavy_tailed(tokens, layer.matrix.in_features, seed=tokens)
    x32, x16 = torch.from_numpy(x), torch.from_numpy(x).bfloat16()
    owner, worker = MlweOwner(parameters, layer.public), MlweWorker()
    owner.guard(layer.matrix, layer.codes, True)  # as real runs do
    trusting = MlweOwner(parameters, layer.public, unverified=True)
    loaded = worker.load(layer.codes, True, layer.matrix.plan.format)
    times: dict[str, list[float]] = {
        k: []
        for k in ("worker", "owner_encrypt", "owner_decrypt", "check", "clear_fp32", "clear_bf16")
    }
    for turn in range(rounds + 2):
        spent, owner_spent = {}, {}
        # In turn: who goes first finds the caches as clear torch has left them.
        for cipher in (owner, trusting) if turn % 2 else (trusting, owner):
            encrypt_ms, sent = timed(lambda c=cipher: c.encrypt(x, layer.matrix))
            payload = memoryview(sent.payload)
            spent["worker"], answer = timed(lambda p=payload: worker.multiply(p, tokens, loaded))
            decrypt_ms, y = timed(
                lambda c=cipher, s=sent, a=answer: c.decrypt(s.sealed, a, layer.matrix)
            )
            owner_spent[cipher] = encrypt_ms + decrypt_ms
            if cipher is owner:
                spent["owner_encrypt"], spent["owner_decrypt"] = encrypt_ms, decrypt_ms
        spent["check"] = owner_spent[owner] - owner_spent[trusting]
        spent["clear_fp32"], _ = timed(lambda: torch.nn.functional.linear(x32, layer.fp32))
        spent["clear_bf16"], _ = timed(lambda: torch.nn.functional.linear(x16, layer.bf16))
        if turn >= 2:  # the first rounds compile and fill caches
            for name, value in spent.items():
                times[name].append(value)
    expected = x.astype(np.float64) @ layer.exact.T
    error = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
    case = {
        "in": layer.matrix.in_features,
        "out": layer.matrix.out_features,
        "tokens": tokens,
        "format": asdict(layer.matrix.plan.format),
        **{f"{name}_ms": median(values) for name, values in times.items()},
        "relative_error": error,
        "predicted_error": layer.matrix.plan.predicted_error(parameters),
        "bytes_up_per_value": len(sent.payload) / x.size,
        "bytes_down_per_value": len(answer) / y.size,
    }
    owner_ms = case["owner_encrypt_ms"] + case["owner_decrypt_ms"]
    case["worker_over_fp32"] = median(_ratios(times, "worker", "clear_fp32"))
    case["worker_over_bf16"] = median(_ratios(times, "worker", "clear_bf16"))
    case["owner_over_fp32"] = owner_ms / case["clear_fp32_ms"]
    case["check_over_fp32"] = median(_ratios(times, "check", "clear_fp32"))
    case["owner_over_bf16"] = owner_ms / case["clear_bf16_ms"]
    faster = min(("fp32", "bf16"), key=lambda name: case[f"clear_{name}_ms"])
    case["clear_dtype"] = faster
    case["worker_over_clear"] = case[f"worker_over_{faster}"]
    case["owner_over_clear"] = case[f"owner_over_{faster}"]
    return case


def _ratios(times: dict[str, list[float]], over: str, under: str) -> list[float]:
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def print_table(cases: list[dict[str, Any]]) -> None:
    """The cases as a table."""
    head = ("in", "out", "tokens", "bits", "worker", "encrypt", "decrypt", "fp32", "bf16")
    head += ("worker/fp32", "/bf16", "owner/fp32", "/bf16", "check/fp32", "error", "predicted")
    print("  ".join(f"{h:>9}" for h in head), "  (times in ms)")
    for c in cases:
        cells = [f"{c['in']:>9}", f"{c['out']:>9}", f"{c['tokens']:>9}"]
        cells += [f"{c['format']['up_bits']},{c['format']['down_bits']}".rjust(9)]
        for key in ("worker", "owner_encrypt", "owner_decrypt", "clear_fp32", "clear_bf16"):
            cells.append(f"{c[key + '_ms']:>9.2f}")
        cells += [f"{c['worker_over_fp32']:>11.2f}", f"{c['worker_over_bf16']:>9.2f}"]
        cells += [f"{c['owner_over_fp32']:>10.2f}", f"{c['owner_over_bf16']:>9.2f}"]
        cells += [f"{c['check_over_fp32']:>10.3f}"]
        cells += [f"{c['relative_error']:>9.3%}", f"{c['predicted_error']:>9.3%}"]
        print("  ".join(cells))


def shape(text: str) -> tuple[int, int]:
    """(inputs, outputs) of "2048x8192"."""
    inputs, _, outputs = text.partition("x")
    try:
        sides = _SIDE(inputs), _SIDE(outputs)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no shape; write INPUTSxOUTPUTS, as in 2048x8192: {error}"
        ) from error
    if sides[0] * sides[1] > _MOST_WEIGHTS:
        raise argparse.ArgumentTypeError(f"{shown(text)} has more than {_MOST_WEIGHTS} weights")
    return sides


def wire_format(text: str) -> Format:
    """Bits up and down of "16,8"."""
    try:
        up, down = (int(part) for part in text.split(","))
        return Format(up, down)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no format; write UP,DOWN, as in 16,8, with bits up of "
            f"{', '.join(map(str, UP_BITS))} and down of {', '.join(map(str, DOWN_BITS))}"
        ) from error


def main() -> None:
    parser = Parser(__doc__, "benchmarks.he_linear")
    add = parser.add_argument
    add("--preset", default="thin", choices=sorted(PRESETS), help="cipher parameters (thin)")
    add("--format", type=wire_format, metavar="UP,DOWN",
        help="bits of a value up and down, in place of the planner's")  # fmt: skip
    add("--rounds", type=TIMES, default=15, help="rounds per case (15)")
    add("--tokens", type=Whole(1, 1 << 16), nargs="+", default=TOKENS, metavar="N",
        help=f"tokens of a request ({' '.join(map(str, TOKENS))})")  # fmt: skip
    add("--shape", type=shape, nargs="+", default=SHAPES, metavar="INxOUT",
        help=f"layers ({' '.join(f'{i}x{o}' for i, o in SHAPES)})")  # fmt: skip
    add_kernel_option(parser)
    record.add_json_option(parser)
    args = parser.parse()
    parameters = preset(args.preset)
    cases = []
    with clean_exit():
        kernel = use_kernel(args.kernel)
        for inputs, outputs in args.shape:
            layer = Layer(inputs, outputs, parameters, args.format)
            for tokens in args.tokens:
                cases.append(measure(layer, tokens, parameters, args.rounds))
                print(f"measured {inputs} -> {outputs}, {tokens} tokens", flush=True)
    print_table(cases)
    figures = {"kernel": kernel.name, "cpu_flags": cpu_flags(), "preset": args.preset}
    record.write(args.json, figures | {"rounds": args.rounds, "cases": cases})


if __name__ == "__main__":
    main()
