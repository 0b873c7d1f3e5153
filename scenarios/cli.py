"""How a scenario starts and ends: closed to others; when it cannot go on, one clear line.

A worker comes through here too, so this imports nothing that could hold a secret (a test walks its
imports), and nothing that takes long to load before it is needed.
"""

from __future__ import annotations

import argparse
import errno
import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from backends.defaults import KERNELS
from backends.errors import Interrupted, UserError
from backends.interrupts import INTERRUPTED
from scenarios.privacy import private_process

if TYPE_CHECKING:
    from backends.he.matmul.interface import Kernel

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def clean_exit(*mendable: type[Exception]) -> Iterator[None]:
    """Turns the errors a user can mend into `error: ...`, and Ctrl-C into exit status 130.

    Before anything else it makes this process private, for good (see `private_process`).

    mendable  more errors that a user can mend, beside every UserError
    """
    private_process()
    told: tuple[type[Exception], ...] = (UserError, FloatingPointError, *mendable)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may be any bytes
    try:
        yield
    except Interrupted as stopped:
        _leave(f"\n{stopped}")
    except KeyboardInterrupt:
        _leave("\ninterrupted; what was prepared or saved so far is kept")
    except told as error:
        sys.exit(f"error: {one_line(str(error))}")
    except OSError as error:
        if error.errno == errno.EPIPE and _stdout_is_gone():
            sys.exit(1)
        if error.errno not in _FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(f"error: {error.strerror}{where}; make room: what was saved so far is whole")
    except RuntimeError as error:
        if not _device_memory_is_full(error):
            raise
        from backends.hardware import MEMORY_ADVICE  # which imports torch

        sys.exit(f"error: the GPU's memory is full; {MEMORY_ADVICE}")


def one_line(text: str) -> str:
    """Without line ends, or anything that a terminal would obey: names of files may hold it."""
    line = " ".join(text.splitlines())
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)


def _leave(text: str) -> NoReturn:
    """End as after Ctrl-C."""
    print(text)
    gc.freeze()  # taking all that torch has loaded apart would last longer than the rest
    sys.exit(INTERRUPTED)


def _stdout_is_gone() -> bool:
    """Whether nobody reads what is printed any more, as after `| head`; then it goes nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _device_memory_is_full(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # nobody who has not imported it can have raised this
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def add_kernel_option(parser: argparse.ArgumentParser) -> None:
    """The `--kernel NAME` option."""
    parser.add_argument(
        "--kernel", choices=KERNELS, type=str.lower, metavar="NAME",
        help="what multiplies int8 weights on this CPU: "
        f"{', '.join(KERNELS)} (the fastest that this processor can run; same bits)",
    )  # fmt: skip


def choose_kernel(name: str | None) -> Kernel:
    """Choose this process's kernel, and that of those it starts.

    Raises KernelError when this processor cannot run it.
    """
    from backends.he.matmul.choice import VARIABLE, chosen_kernel

    if name is not None:
        os.environ[VARIABLE] = name
    return chosen_kernel()


def use_kernel(name: str | None) -> Kernel:
    """`choose_kernel`, and say which one it is."""
    kernel = choose_kernel(name)
    print(f"kernel: {kernel.name}{kernel.warning and f' (slow: {kernel.warning})'}")
    return kernel
