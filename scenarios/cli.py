"""How a scenario starts and ends: closed to others; when it cannot go on, one clear line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from backends.he.cuda.device import GpuError
from backends.he.interface import NonFiniteInputError
from backends.he.manifest import PreparationError
from backends.he.matmul.choice import NAMES, VARIABLE, KernelError, chosen_kernel
from backends.he.matmul.interface import Kernel
from backends.ledger import LedgerError
from backends.net.owner import RemoteLinearError
from backends.net.remote import AddressError
from backends.net.tls import CertificateError
from backends.nn.checkpoint import ResumeError, SaveError
from backends.nn.data import DataError
from backends.nn.sources import CheckpointError
from backends.nn.trainer import TaintedError, TrainingInterrupted
from scenarios.hardware import MEMORY_ADVICE
from scenarios.privacy import private_process


@contextmanager
def clean_exit(*mendable: type[Exception]) -> Iterator[None]:
    """Turns the errors a user can mend into `error: ...`, and Ctrl-C into exit status 130.

    Before anything else it makes this process private, for good (see `private_process`).

    mendable  more such errors, of what only some scenarios use
    """
    private_process()
    try:
        yield
    except TrainingInterrupted as stopped:
        print(f"\n{stopped}; the same command goes on from there")
        sys.exit(130)
    except KeyboardInterrupt:
        print("\ninterrupted; what was prepared or saved so far is kept")
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit(f"error: the GPU's memory is full; {MEMORY_ADVICE}")
    except (
        CheckpointError, DataError, PreparationError, ResumeError, SaveError,
        RemoteLinearError, NonFiniteInputError, FloatingPointError, GpuError, KernelError,
        LedgerError, TaintedError, CertificateError, AddressError, *mendable,
    ) as error:  # fmt: skip
        sys.exit(f"error: {error}")


def add_kernel_option(parser: argparse.ArgumentParser) -> None:
    """The `--kernel NAME` option."""
    parser.add_argument(
        "--kernel", choices=NAMES, type=str.lower, metavar="NAME",
        help="what multiplies int8 weights on this CPU: "
        f"{', '.join(NAMES)} (the fastest that this processor can run; same bits)",
    )  # fmt: skip


def use_kernel(name: str | None) -> Kernel:
    """Choose this process's kernel, and that of those it starts, and say which one it is.

    Raises KernelError when this processor cannot run it.
    """
    if name is not None:
        os.environ[VARIABLE] = name
    kernel = chosen_kernel()
    print(f"kernel: {kernel.name}{kernel.warning and f' (slow: {kernel.warning})'}")
    return kernel


def positive(text: str) -> int:
    """A whole number from 1, for an option's type."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def up_to(most: int) -> Callable[[str], int]:
    """A whole number from 1 to `most`, also as a power such as '2^30', for an option's type."""

    def parse(text: str) -> int:
        base, power, exponent = text.partition("^")
        parts = (base, exponent) if power else (base,)
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise argparse.ArgumentTypeError(f"{_shown(text)} is no whole number from 1 to {most}")
        # Refused by its length before it is computed: a power may have any number of digits.
        long = any(len(part.lstrip("0")) > 20 for part in parts)
        if long or (power and int(exponent) > most.bit_length()) or _power(parts) > most:
            raise argparse.ArgumentTypeError(f"{_shown(text)} is too large; at most {most}")
        if not _power(parts):
            raise argparse.ArgumentTypeError(f"{_shown(text)} is no whole number from 1 to {most}")
        return _power(parts)

    return parse


def _power(parts: tuple[str, ...]) -> int:
    value = int(parts[0])
    for exponent in parts[1:]:
        value = int(value ** int(exponent))
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
