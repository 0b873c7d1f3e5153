"""Private LoRA fine-tuning of open-source LLMs: everything a script of your own needs.

    import private_lora as pl

    model = AutoModelForCausalLM.from_pretrained(...)
    public = pl.prepare(model)                                # once; found in the cache afterwards
    model = get_peft_model(pl.remote(model, public), LoraConfig(target_modules="all-linear"))
    with pl.connect(model, workers=["gpu.example:7443"], tls="certs/owner") as session:
        transformers.Trainer(model, ...).train()              # or session.trainer(...).train()

    pl.serve("prepared-model", listen="0.0.0.0:7443", tls="certs/worker")   # on another machine

docs/library.md has all of it in order.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.door import OpenSession, Public, connect, prepare, remote
    from backends.errors import UserError as Error
    from backends.he.store import WorkerPart
    from backends.nn.dp import DifferentialPrivacy
    from backends.nn.trainer import TaintedError, TrainConfig
    from backends.serve import serve
    from backends.session import Usage
    from sim.device import DeviceProfile
    from sim.flows import Link
    from sim.workload import trace_step
    from sim.world import WorldConfig, simulate

__all__ = [
    "DeviceProfile", "DifferentialPrivacy", "Error", "Link", "OpenSession", "Public",
    "TaintedError", "TrainConfig", "Usage", "WorkerPart", "WorldConfig", "connect", "prepare",
    "remote", "serve", "simulate", "trace_step",
]  # fmt: skip

_WHERE = {
    "Error": ("backends.errors", "UserError"),
    "WorkerPart": ("backends.he.store", "WorkerPart"),
    "DifferentialPrivacy": ("backends.nn.dp", "DifferentialPrivacy"),
    "TaintedError": ("backends.ledger", "TaintedError"),
    "TrainConfig": ("backends.nn.trainer", "TrainConfig"),
    "serve": ("backends.serve", "serve"),
    "Usage": ("backends.session", "Usage"),
    "DeviceProfile": ("sim.device", "DeviceProfile"),
    "Link": ("sim.flows", "Link"),
    "trace_step": ("sim.workload", "trace_step"),
    "WorldConfig": ("sim.world", "WorldConfig"),
    "simulate": ("sim.world", "simulate"),
}


def __getattr__(name: str) -> Any:
    """Loaded when it is asked for: who serves needs nothing of what owners need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, known_as = _WHERE.get(name, ("backends.door", name))
    return getattr(import_module(module), known_as)
