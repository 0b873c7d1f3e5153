"""The commands, their parsers, and where in each of them everything has been checked."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from unittest.mock import patch

SIMULATED_S = 2.0
"""A simulation is not cut at once: what cannot be shows in its numbers. Seconds until it is."""


class Passed(BaseException):
    """All checks of a command are behind: from here on it would work, maybe for hours."""


class _Seen(BaseException):
    """The parser that was about to parse."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@dataclass(frozen=True)
class Entry:
    """One command.

    name    what comes after `python -m`, with words of its own where it needs them
    module  that has its `main`
    cuts    MODULE:NAME of functions from which on it only works
    weight  how often it is drawn
    """

    name: str
    module: str
    cuts: tuple[str, ...]
    weight: int = 1

    @property
    def words(self) -> list[str]:
        """Those that come before all options."""
        return self.name.split()[1:]

    def main(self) -> Any:
        """Its entry point, imported now."""
        return importlib.import_module(self.module).main

    def load(self) -> None:
        """Import here what its program takes seconds to: who is forked from here need not."""
        for target in (self.module, *self.cuts, *COMMON):
            importlib.import_module(target.partition(":")[0])
        _smaller(self)

    def parser(self) -> argparse.ArgumentParser:
        """What it parses its command line with, as it is when it does."""

        def seen(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
            raise _Seen(parser)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            with (
                patch.object(argparse.ArgumentParser, "parse_args", seen),
                patch.object(sys, "argv", [self.name, *self.words]),
            ):
                self.main()()
        except _Seen as found:
            return found.parser
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        raise AssertionError(f"{self.name} parses no command line")


def _entry(name: str, *cuts: str, module: str = "", weight: int = 1) -> Entry:
    return Entry(name, module or name.split()[0], cuts, weight)


ENTRIES = (
    _entry(
        "scenarios.quickstart",
        "scenarios.quickstart.run:private_session",
        module="scenarios.quickstart.__main__",
        weight=4,
    ),
    _entry(
        "scenarios.llama1b",
        "scenarios.llama1b.run:private_session",
        "scenarios.llama1b.run:clear_times_ms",
        module="scenarios.llama1b.__main__",
        weight=12,
    ),
    _entry(
        "scenarios.generate",
        "scenarios.generate.run:opened",
        module="scenarios.generate.__main__",
        weight=3,
    ),
    _entry(
        "scenarios.finetune",
        "scenarios.finetune.run:private_session",
        module="scenarios.finetune.__main__",
        weight=6,
    ),
    _entry(
        "scenarios.endpoint",
        "scenarios.endpoint.run:endpoint",
        module="scenarios.endpoint.__main__",
        weight=2,
    ),
    _entry(
        "scenarios.merge",
        "scenarios.merge.run:_loaded",
        module="scenarios.merge.__main__",
        weight=2,
    ),
    _entry("scenarios.prepare", module="scenarios.prepare.__main__", weight=5),
    _entry(
        "scenarios.params", "scenarios.params.run:estimates", module="scenarios.params.__main__"
    ),
    _entry("scenarios.certs", weight=2),
    _entry(
        "scenarios.worker",
        "scenarios.worker.run:serving",
        module="scenarios.worker.__main__",
        weight=4,
    ),
    _entry("scenarios.whatif", module="scenarios.whatif.__main__", weight=8),
    _entry(
        "scenarios.chaos",
        "scenarios.chaos.run:search",
        "scenarios.chaos.search:Bench.run",
        "scenarios.chaos.planted:copy_tree",
        "scenarios.chaos.mutants:_judged",
        module="scenarios.chaos.__main__",
    ),
    _entry(
        "scenarios.chaos --processes",
        "scenarios.crashes.__main__:certificates",
        module="scenarios.chaos.__main__",
    ),
    _entry("scenarios.crashes.owner", "scenarios.crashes.owner:connected"),
    _entry(
        "scenarios.make_tiny_llama",
        "scenarios.make_tiny_llama.run:read_corpus",
        module="scenarios.make_tiny_llama.__main__",
    ),
    _entry("sim.calibrate", "sim.calibration:calibrate"),
    _entry(
        "benchmarks.fidelity",
        "benchmarks.fidelity:real_cases",
        "benchmarks.fidelity_network:require_line",
    ),
    _entry("benchmarks.network_owner", "benchmarks.network_owner:wait_for_quiet"),
    _entry("benchmarks.everything", "benchmarks.everything:take"),
    _entry("benchmarks.floors", "benchmarks.floors:measure"),
    _entry("benchmarks.fuzz", "benchmarks.fuzz.__main__:run", module="benchmarks.fuzz.__main__"),
    _entry(
        "benchmarks.gpu", "benchmarks.gpu.__main__:find_device", module="benchmarks.gpu.__main__"
    ),
    _entry("benchmarks.gpu_fidelity", weight=2),
    _entry("benchmarks.generation", "benchmarks.generation:measure"),
    _entry("benchmarks.gpu_host", "benchmarks.gpu_host:measure"),
    _entry("benchmarks.he_linear", "benchmarks.he_linear:Layer"),
    _entry("benchmarks.integrity", "benchmarks.integrity:attacks"),
    _entry(
        "benchmarks.load", "benchmarks.load.__main__:measure", module="benchmarks.load.__main__"
    ),
    _entry("benchmarks.noise", "benchmarks.noise:measure"),
    _entry("benchmarks.openfhe_training", "benchmarks.openfhe_training:Runs"),
    _entry(
        "benchmarks.peers", "benchmarks.peers.__main__:measure", module="benchmarks.peers.__main__"
    ),
    _entry("benchmarks.quality", "benchmarks.quality:measure"),
    _entry(
        "benchmarks.sim_speed", "benchmarks.sim_speed:measure", "benchmarks.sim_speed:measure_site"
    ),
    _entry("benchmarks.startup", "benchmarks.startup:measure"),
    _entry("benchmarks.training", "benchmarks.training:measure"),
    _entry(
        "benchmarks.thin", "benchmarks.thin.__main__:measure", module="benchmarks.thin.__main__"
    ),
    _entry("benchmarks.transport", "benchmarks.transport:run", "benchmarks.two_processes:measure"),
    _entry(
        "benchmarks.inputs", "benchmarks.inputs.__main__:run", module="benchmarks.inputs.__main__"
    ),
    _entry("benchmarks.zoo", "benchmarks.zoo.__main__:each", module="benchmarks.zoo.__main__"),
)
COMMON = (
    "backends.he.preparation:_make",
    "backends.he.verification:verify",
    "backends.nn.trainer:Trainer.train",
)
"""Where any of them begins to work."""


def _passed(*_: Any, **__: Any) -> NoReturn:
    raise Passed


@contextmanager
def cut(entry: Entry) -> Iterator[None]:
    """Inside, this process's command ends with Passed once it only has work left to do."""
    wanted = (*entry.cuts, *COMMON)
    patches = [_patch(target) for target in wanted]
    patches += _smaller(entry)
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in reversed(patches):
            each.stop()


def _patch(target: str) -> Any:
    module, _, name = target.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return patch.object(owner, last, _passed)


def _smaller(entry: Entry) -> list[Any]:
    """The same programs on models that take no time, where a command has no option for it."""
    from transformers import LlamaConfig

    def tiny(name: str = "") -> LlamaConfig:
        return LlamaConfig(
            vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=131_072,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip

    if entry.name == "scenarios.quickstart":
        return [patch("scenarios.quickstart.run.PRIVATE_PACKAGE", "asyncio")]
    if entry.name in ("scenarios.llama1b", "scenarios.prepare"):
        found = [patch("scenarios.preparation.model_config", tiny)]
        return [*found, *_simulations()] if entry.name == "scenarios.llama1b" else found
    if entry.module in ("scenarios.whatif.__main__", "benchmarks.gpu_fidelity"):
        return _simulations()
    return []


def _simulations() -> list[Any]:
    """GPT-2, whichever model is asked for; what is simulated ends after a while."""
    from scenarios.whatif import running
    from sim import world
    from sim.models import MODELS

    real = world.simulate

    def timed(config: world.WorldConfig, told: Any = None) -> world.WorldResult:
        def over(number: int, frame: Any) -> NoReturn:
            raise Passed

        signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, SIMULATED_S)
        try:
            return real(config, told)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def in_turn(settings: Any, prices: Any, processes: int) -> Any:
        for index, each in list(enumerate(settings))[:3]:
            yield index, running._row(each, prices)
        if len(settings) > 3:
            raise Passed

    small = dict.fromkeys(MODELS, MODELS["gpt2"])
    return [
        patch("scenarios.whatif.setting.MODELS", small),
        patch("scenarios.whatif.setting.simulate", timed),
        patch("scenarios.whatif.remedies.simulate", timed),
        patch("scenarios.whatif.patience.simulate", timed),
        patch("sim.world.simulate", timed),
        patch("scenarios.whatif.sweep.run_all", in_turn),
    ]
