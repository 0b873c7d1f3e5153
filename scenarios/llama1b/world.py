"""The simulated world that a command line asks for."""

from __future__ import annotations

import argparse
from dataclasses import replace

from scenarios.whatif.knobs import (
    ASSUMED_BPS,
    ASSUMED_RTT_S,
    KEYS,
    Setting,
    SettingError,
    changed,
    profile_of,
    require_elsewhere,
    values_of,
)

# name: (bits/s of the owner's line, round trip in s, what it stands for)
NETWORKS = {
    "lan": (10e9, 0.0002, "the same building"),
    "datacenter": (25e9, 0.001, "the same data centre"),
    "default": (ASSUMED_BPS, ASSUMED_RTT_S, "an office with a gigabit line"),
    "fibre": (1e9, 0.010, "fibre at home, 1 Gb/s both ways"),
    "home": (100e6, 0.020, "100 Mb/s both ways"),
    "dsl": (40e6, 0.030, "VDSL by its upload, 40 Mb/s"),
    "here": (ASSUMED_BPS, ASSUMED_RTT_S, "none: a worker in the owner's process, on its device"),
}
_KNOBS = (
    "bandwidth", "rtt", "loss", "jitter", "workers", "owners", "gpu", "owner-device", "model",
)  # fmt: skip
HERE = "here"
OPTIONS = tuple(f"--{name}" for name in _KNOBS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What only the simulated run takes."""
    group = parser.add_argument_group("the simulated run (neither --real-cpu nor --real-gpu)")
    known = ", ".join(f"{name}: {what[2]}" for name, what in NETWORKS.items())
    group.add_argument("--network", choices=tuple(NETWORKS), default="default", help=known)
    for name in _KNOBS:
        meaning = KEYS[name].meaning
        group.add_argument(f"--{name}", metavar=name.upper(), help=meaning.replace("%", "%%"))


def setting_from(args: argparse.Namespace) -> Setting:
    """The world of a command line. Raises SettingError, ProfileError."""
    bandwidth_bps, rtt_s, _ = NETWORKS[args.network]
    setting = Setting(
        tokens=args.tokens, sequence=args.sequence, lanes=args.lanes, steps=args.steps,
        bandwidth_bps=bandwidth_bps, rtt_s=rtt_s,
    )  # fmt: skip
    if args.network == HERE:
        setting = replace(setting, worker=HERE)
        require_elsewhere(name for name in _KNOBS if _given(args, name) is not None)
    for name in _KNOBS:
        text = _given(args, name)
        if text is not None:
            values = values_of(name, text)
            if len(values) != 1:
                raise SettingError(f"--{name} takes one value here; `scenarios.whatif` sweeps")
            setting = changed(setting, {name: values[0]})
    for device in (setting.gpu, setting.owner_device):
        profile_of(device)
    return replace(setting, head=args.lm_head)


def _given(args: argparse.Namespace, name: str) -> str | None:
    text: str | None = getattr(args, name.replace("-", "_"))
    return text
