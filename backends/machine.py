"""This machine and this checkout, for whoever records where figures come from."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from backends.threads import core_count

COMMIT_VARIABLE = "PRIVATE_LORA_COMMIT"


def processor() -> str:
    """The processor's model and the vector instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    flags = facts.get("flags", "").split()
    useful = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if f in flags]
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.machine())} ({family}; {' '.join(useful)})"


def machine() -> dict[str, Any]:
    """Where figures come from. Holds no host name and no path."""
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
            ["git", "-C", root, "status", "--porcelain", "--untracked-files=no", "--", ".",
             ":!benchmarks/results"],
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
