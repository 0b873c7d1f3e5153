"""Compiles the CUDA C++ in `kernels/` and launches it on torch tensors.

On a GPU, CuPy compiles (NVRTC), and `driver.py` launches on torch's current stream. Without one,
for tests, g++ compiles the same text and one thread plays a thread block at a time, phase by
phase: see `kernels/platform.cuh`. The text itself declares every kernel's threads and argument
types; what a caller passes is checked against it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from backends.he.cuda.device import Gpu, GpuError
from backends.he.cuda.driver import Driver, Launch
from backends.he.epilogue import FOLD
from backends.he.params import NTT_PRIME, RING_DEGREE
from backends.he.ring import EVALUATION_EXPONENTS, PSI

_Q, _D = NTT_PRIME, RING_DEGREE
_FOLDER = Path(__file__).with_name("kernels")
_BEFORE_TABLES, _AFTER_TABLES = "platform.cuh", ("ring.cuh", "chacha.cuh", "owner.cu", "check.cu")
_DECLARATION = re.compile(r"^KERNEL\((\w+),\s*(\d+),\s*([^)]*)\)", re.MULTILINE)
_TENSORS = {
    "i8*": torch.int8, "u16*": torch.uint16, "i32*": torch.int32, "u32*": torch.uint32,
    "f32*": torch.float32, "f64*": torch.float64,
}  # fmt: skip
_SCALARS: dict[str, type[np.generic]] = {
    "i32": np.int32, "u32": np.uint32, "u64": np.uint64, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
_CODES = {"i32": "i", "u32": "I", "u64": "Q", "f32": "f", "f64": "d"}  # of struct; pointers are Q
HOST_FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fwrapv", "-Wall", "-Wextra")
DEVICE_FLAGS = ("-std=c++17", "-fmad=false")


@dataclass(frozen=True)
class Signature:
    """A kernel's threads in a block, and (type, name) of each argument."""

    threads: int
    arguments: tuple[tuple[str, str], ...]


def _tables() -> str:
    """The modulus, the factors of roundings and of secrets, and both twiddle tables as C++ text."""
    # Slot i evaluates at PSI^(2*rev(i) + 1); twiddle i is PSI^rev(i).
    zeta = [pow(PSI, (e - 1) // 2, _Q) for e in EVALUATION_EXPONENTS]
    factor = (1 << 32) * pow(_D, -1, _Q) % _Q
    lines = [
        f"const u32 Q = {_Q}u;",
        f"const u32 Q_INVERSE = {pow(_Q, -1, 1 << 32)}u;",
        f"const u32 FOLD = {FOLD}u;",
        f"const u32 SECRET_FACTOR = {factor}u;",
        f"const u32 SECRET_FACTOR_SHOUP = {(factor << 32) // _Q}u;",
    ]
    for name, values in (("FORWARD", zeta), ("INVERSE", [pow(z, -1, _Q) for z in zeta])):
        pairs = ", ".join(f"{w}u, {(w << 32) // _Q}u" for w in values)
        lines.append(f"TABLE u32 {name}[{2 * _D}] = {{{pairs}}};")
    return "\n".join(lines) + "\n"


def source(probes: str = "") -> str:
    """The whole program as one text. `probes` is appended: kernels that only tests need."""
    # One text, no include: CuPy's cache of compiled programs knows no included file.
    parts = [f'#line 1 "{name}"\n' + (_FOLDER / name).read_text() for name in _AFTER_TABLES]
    before = f'#line 1 "{_BEFORE_TABLES}"\n' + (_FOLDER / _BEFORE_TABLES).read_text()
    return "\n".join([before, _tables(), *parts, '#line 1 "probes"', probes])


def constants(rank: int, limbs: int) -> tuple[str, ...]:
    """Compiler options for one module rank and number of limbs."""
    return (f"-DRANK={rank}", f"-DLIMBS={limbs}")


def signatures(text: str) -> dict[str, Signature]:
    """Every kernel that a source declares, by name."""
    found = {}
    for name, threads, arguments in _DECLARATION.findall(text):
        pairs = []
        for argument in arguments.split(","):
            kind, _, label = argument.strip().removeprefix("const ").rpartition(" ")
            pairs.append((kind, label))
        found[name] = Signature(int(threads), tuple(pairs))
    return found


class _Module(Protocol):
    """Compiled kernels."""

    def launcher(self, name: str, threads: int) -> Launch:
        """What launches one of them."""


class _CudaModule:
    """Compiled by CuPy for one device."""

    def __init__(self, device: torch.device, text: str, options: tuple[str, ...]) -> None:
        self._device = device
        cupy = _import_cupy()
        self._module = cupy.RawModule(code=text, options=(*DEVICE_FLAGS, *options))
        with torch.cuda.device(device), _library_errors():
            self._module.compile()
        self._driver = Driver(device)

    def launcher(self, name: str, threads: int) -> Launch:
        with torch.cuda.device(self._device):
            function = self._module.get_function(name).kernel
        return self._driver.launcher(function.ptr, threads)


class _HostModule:
    """Compiled by g++; threads of a block run one after the other."""

    def __init__(self, text: str, options: tuple[str, ...]) -> None:
        self._library = ctypes.CDLL(str(_host_library(text, options)))

    def choose_order(self, order: int) -> None:
        """0: first thread to last, 1: last to first, more: shuffled by that seed."""
        self._library.choose_order(ctypes.c_int(order))

    def launcher(self, name: str, threads: int) -> Launch:
        function: Any = self._library[name]
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
        return cast(Launch, function)


class _Slots:
    """Memory for the arguments of one launch at a time, and the pointers to them."""

    def __init__(self, size: int, offsets: Sequence[int]) -> None:
        self.bytes = bytearray(size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self.pointers = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))


class _Launcher:
    """One kernel of one device: checks arguments, lays them out, launches."""

    def __init__(self, name: str, signature: Signature, device: torch.device, call: Launch) -> None:
        self._name, self._signature, self._device, self._call = name, signature, device, call
        kinds = [kind for kind, _ in signature.arguments]
        self._tensors = [(at, _TENSORS[kind]) for at, kind in enumerate(kinds) if kind in _TENSORS]
        self._numbers = [at for at, kind in enumerate(kinds) if kind in _SCALARS]
        codes = [_CODES.get(kind, "Q") for kind in kinds]
        layout = struct.Struct("".join(codes))
        self._pack, self._size, self._zeros = layout.pack_into, layout.size, bytes(layout.size)
        self._offsets = [
            struct.calcsize("".join(codes[: at + 1])) - struct.calcsize(code)
            for at, code in enumerate(codes)
        ]
        self._free: list[_Slots] = []

    def __call__(self, grid: tuple[int, int], arguments: Sequence[torch.Tensor | float]) -> None:
        # Threads launch at once: each takes slots of its own, and gives them back.
        try:
            slots = self._free.pop()
        except IndexError:
            slots = _Slots(self._size, self._offsets)
        try:
            self._fill(slots, arguments)
            self._call(*grid, slots.pointers)
        finally:
            slots.bytes[:] = self._zeros  # a key may have been among them
            self._free.append(slots)

    def _fill(self, slots: _Slots, arguments: Sequence[torch.Tensor | float]) -> None:
        """Lay the arguments out. Raises TypeError or OverflowError for one that does not fit."""
        values: list[Any] = list(arguments)
        device, right = self._device, len(values) == len(self._offsets)
        try:
            for at in self._numbers:
                right = right and not isinstance(values[at], torch.Tensor)
            for at, dtype in self._tensors:
                tensor = values[at]
                right = (
                    right
                    and tensor.dtype is dtype
                    and tensor.device == device
                    and tensor.is_contiguous()
                )
                values[at] = tensor.data_ptr()
            if right:
                self._pack(slots.bytes, 0, *values)
                return
        except (AttributeError, IndexError, struct.error) as error:
            self._complain(arguments)
            raise TypeError(f"{self._name}: {error}") from error
        self._complain(arguments)

    def _complain(self, arguments: Sequence[torch.Tensor | float]) -> None:
        """Raise TypeError or OverflowError that says which argument is wrong, and how."""
        wanted = self._signature.arguments
        if len(arguments) != len(wanted):
            raise TypeError(f"{self._name} takes {len(wanted)} arguments")
        for (kind, label), argument in zip(wanted, arguments, strict=True):
            what = f"{self._name}: {label}"
            if kind in _SCALARS:
                if isinstance(argument, torch.Tensor):
                    raise TypeError(f"{what} is a number ({kind}), got a tensor")
                _SCALARS[kind](argument)
            elif not isinstance(argument, torch.Tensor):
                raise TypeError(f"{what} is a tensor ({kind}), got {type(argument).__name__}")
            elif argument.dtype != _TENSORS[kind] or argument.device != self._device:
                raise TypeError(
                    f"{what} is {_TENSORS[kind]} on {self._device}, got {argument.dtype} on "
                    f"{argument.device}"
                )
            elif not argument.is_contiguous():
                raise TypeError(f"{what} is not contiguous")


class Kernels:
    """The compiled kernels of one module rank and number of limbs on one device.

    Raises GpuError when they cannot be compiled: CuPy missing, for another CUDA than torch's, or
    without its libraries.
    """

    def __init__(self, gpu: Gpu, rank: int, limbs: int, probes: str = "") -> None:
        text, device = source(probes), gpu.device
        self._module: _Module
        if device.type == "cuda":
            self._module = _CudaModule(device, text, constants(rank, limbs))
        else:
            self._module = _HostModule(text, constants(rank, limbs))
        self._launchers = {
            name: _Launcher(name, found, device, self._module.launcher(name, found.threads))
            for name, found in signatures(text).items()
        }

    def launch(self, name: str, grid: tuple[int, int], *arguments: torch.Tensor | float) -> None:
        """Queue kernel `name` on torch's current stream.

        Raises TypeError when an argument is not what the kernel declares: a contiguous tensor of
        that dtype on this device, or a number; OverflowError when a number does not fit its type.
        """
        self._launchers[name](grid, arguments)


@cache
def kernels(gpu: Gpu, rank: int, limbs: int) -> Kernels:
    """The same `Kernels` for everyone who asks: compiling takes seconds."""
    return Kernels(gpu, rank, limbs)


@cache
def _host_folder() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="private-lora-kernels-")


@cache
def _host_library(text: str, options: tuple[str, ...]) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_host_folder().name))
    program, library = folder / "kernels.cpp", folder / "kernels.so"
    program.write_text(text)
    compile_text(("g++", *HOST_FLAGS, "-shared", "-fPIC", *options, str(program)), library)
    return library


def compile_text(command: Sequence[str], output: Path) -> str:
    """Run a compiler; returns what it said. Raises GpuError when it fails or is not there."""
    try:
        done = subprocess.run(
            [*command, "-o", str(output)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise GpuError(f"{command[0]} is missing") from error
    said = done.stdout + done.stderr
    if done.returncode != 0:
        raise GpuError(f"{command[0]} failed:\n{said}")
    return said


def _import_cupy() -> Any:
    """CuPy, once it is certain to be the one for torch's CUDA."""
    wanted = f"cupy-cuda{(torch.version.cuda or '13').partition('.')[0]}x"
    installed = _installed_cupy()
    if installed is None:
        raise GpuError(
            f"CuPy is missing, which compiles the owner's kernels: pip install '{wanted}>=14', "
            f"which fits torch's CUDA {torch.version.cuda}"
        )
    if installed not in (wanted, "cupy"):
        raise GpuError(
            f"{installed} is installed, but torch is built for CUDA {torch.version.cuda}: "
            f"pip uninstall {installed}, then pip install {wanted}"
        )
    with _library_errors():
        import cupy

        return cupy


def _installed_cupy() -> str | None:
    """Name of the CuPy package, e.g. "cupy-cuda13x"; "cupy" when it was built from source."""
    for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return None


@contextmanager
def _library_errors() -> Iterator[None]:
    """CuPy's complaints about CUDA libraries, with what to do about them."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "lib" not in str(error):
            raise  # of the device, not of a library
        installed = _installed_cupy() or "cupy"
        raise GpuError(
            f"{installed} cannot load what it needs of CUDA {torch.version.cuda} ({error}); "
            f"pip install '{installed}[ctk]' brings the CUDA libraries, NVRTC among them"
        ) from error
