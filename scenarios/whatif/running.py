"""All settings of a study, simulated on all cores."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from backends.nn.sources import CheckpointError
from scenarios.options import HEADS
from scenarios.whatif.knobs import KEYS, Prices, Setting, SettingError, profile_of
from scenarios.whatif.patience import watched
from scenarios.whatif.setting import clear_for, measure, workload_for
from sim.device import ProfileError
from sim.tally import NoNumbersError
from sim.workload import WorkloadError
from sim.world import WorldError


def prepare(settings: Sequence[Setting]) -> Iterator[str]:
    """Trace each distinct workload once, so that forked processes have them; yields each's name.

    Raises SettingError for what no run could mend.
    """
    seen = set()
    for setting in settings:
        for knob, choice in (("gpu", setting.gpu), ("owner-device", setting.owner_device)):
            _checked(f"{knob}={choice!r}", lambda choice=choice: profile_of(choice))  # type: ignore[misc]
        heads = HEADS if setting.head == "auto" else (setting.head,)
        key = (setting.model, setting.tokens, setting.sequence, setting.head)
        if key not in seen:
            seen.add(key)
            yield f"{setting.model}, {setting.tokens} tokens"
            name = f"model={setting.model!r} with tokens={setting.tokens}"
            for head in heads:
                one = replace(setting, head=head)
                _checked(name, lambda one=one: workload_for(one))  # type: ignore[misc]
        _checked(f"owner-device={setting.owner_device!r}", lambda s=setting: clear_for(s))  # type: ignore[misc]


def _checked(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except (ProfileError, WorkloadError, CheckpointError, NoNumbersError) as error:
        raise SettingError(f"{what}: {error}") from None


def run_all(
    settings: Sequence[Setting], prices: Prices, processes: int
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """(index, row) of every setting, as they come, from so many processes.

    A setting whose training cannot go on gives a row with its knobs and "error". Closing the
    iterator ends the processes.
    """
    # What takes longest first, so that the last ones to end are short.
    order = sorted(range(len(settings)), key=lambda i: -_effort(settings[i]))
    if processes == 1:
        for index in order:
            yield index, _row(settings[index], prices)
        return
    # Forked children have the traces and all imports; elsewhere each makes its own.
    method = "fork" if sys.platform == "linux" else "spawn"
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context(method), initializer=_deaf
    ) as pool:
        futures: dict[Future[dict[str, Any]], int] = {
            pool.submit(_row, settings[index], prices): index for index in order
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            # Nobody waits for a world that takes minutes: nothing of it would be kept.
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if child not in others:
                    child.kill()
                    child.join()
            raise


def _deaf() -> None:
    """Ctrl-C goes to the parent, which ends the children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _effort(setting: Setting) -> float:
    """Grows with the events a setting takes to simulate."""
    layers = len(workload_for(setting).matrices)
    return float(setting.owners * setting.lanes * setting.steps * layers)


def _row(setting: Setting, prices: Prices) -> dict[str, Any]:
    try:
        return measure(setting, prices, watched)
    except WorldError as error:
        knobs = {key.field: getattr(setting, key.field) for key in KEYS.values()}
        return knobs | {"error": str(error)}
