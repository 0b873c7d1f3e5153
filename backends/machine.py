"""This machine and this checkout, for whoever records where figures come from."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from backends.threads import core_count

_TELLING_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip

COMMIT_VARIABLE = "PRIVATE_LORA_COMMIT"


def _cpuinfo() -> dict[str, str]:
    """The last processor's lines of /proc/cpuinfo; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in fields.items()}


def cpu_flags() -> list[str]:
    """The processor's vector instructions that matter here, as Linux names them."""
    facts = _cpuinfo()
    flags = facts.get("flags", facts.get("Features", "")).split()
    return [flag for flag in _TELLING_FLAGS if flag in flags]


def processor() -> str:
    """The processor's model and the vector instructions that matter here."""
    facts = _cpuinfo()
    if not facts:
        return platform.processor() or platform.machine()
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.machine())} ({family}; {' '.join(cpu_flags())})"


def machine() -> dict[str, Any]:
    """Where figures come from. Holds no host name and no path."""
    import torch  # which takes seconds: most commands come here at their end, if at all

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": core_count(),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["cuda"] = torch.version.cuda
    return facts


def commit() -> str:
    """The commit of this checkout, '-dirty' when the tree has changes.

    Where git does not answer, as in a copy without its .git, the environment variable
    PRIVATE_LORA_COMMIT says it; else it is 'unknown'. Recorded results are no change: one run may
    write several.
    """
    root = Path(__file__).resolve().parent.parent
    try:
        name = subprocess.run(
            ["git", "-C", root, "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
        status = subprocess.run(
            ["git", "--no-optional-locks", "-C", root, "status", "--porcelain",
             "--untracked-files=no", "--", ".", ":!benchmarks/results"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(COMMIT_VARIABLE, "unknown")
    return name + ("-dirty" if status else "")


def busy_elsewhere_s() -> float:
    """CPU seconds that others have used on this machine so far: processes, and the host (steal).

    Two readings tell how much a measurement between them was disturbed. Always 0 where there is
    no /proc/stat.
    """
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return 0.0
    ticks = [int(field) for field in first[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    own = os.times()
    total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return total - own.user - own.system
