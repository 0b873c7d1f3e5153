"""The simulated run of `python -m scenarios.llama1b`: the same protocol, modelled time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backends.units import human_bytes
from scenarios.estimate import spoken
from scenarios.head import compared
from scenarios.timeline import WORDS, headline, plot_timeline
from scenarios.whatif import quantities
from scenarios.whatif.knobs import Prices, Setting, device_name, profile_of, provenance
from scenarios.whatif.patience import (
    SAID_FROM_S,
    TRIALS,
    TRIED_S,
    expected_s,
    passes,
    watched,
)
from scenarios.whatif.remedies import Remedy, lines, remedies
from scenarios.whatif.setting import MENDABLE, figures, world_of
from sim.device import DeviceProfile
from sim.trace import PARTS, write_perfetto
from sim.world import WorldResult

__all__ = ["MENDABLE", "print_assumptions", "print_report", "run"]


def settled_head(setting: Setting) -> Setting:
    """With a local or a remote head where it is `auto`: both are simulated, and it is said."""
    if setting.head != "auto":
        return setting
    choice = compared(
        lambda head: world_of(replace(setting, head=head)),
        f"{setting.label}, {line_of(setting)}",
    )
    print(choice.said())
    return replace(setting, head=choice.head)


def line_of(setting: Setting) -> str:
    """The way to the worker, in words."""
    if setting.worker == "here":
        return "in one process"
    rate = quantities.show_bandwidth(setting.bandwidth_bps)
    return f"over {rate}, {quantities.show_duration(setting.rtt_s)} round trip"


def describe_profile(profile: DeviceProfile) -> str:
    """Its name, and whether its figures were measured."""
    origin = profile.origin
    name = device_name(profile.name)
    if origin.kind == "measured":
        text = f"{name}: measured on {origin.where}, {origin.when}"
        return text + (f", commit {origin.commit}" if origin.commit else "")
    counts = f", {len(origin.published)} figures published, {len(origin.assumed)} assumed"
    return f"{name}: data sheet{counts}, NOT MEASURED ({origin.where})"


def print_assumptions(f: dict[str, Any]) -> None:
    """What the answer rests on, figure by figure."""
    print("\nit rests on")
    if f["setting"]["worker"] == "elsewhere":
        _print_profile("GPU", profile_of(f["setting"]["gpu"]))
    _print_profile("owner", profile_of(f["setting"]["owner_device"]))


def _print_profile(side: str, profile: DeviceProfile) -> None:
    """A profile, and where each of its figures is from."""
    print(f"  {side:<6} {describe_profile(profile)}")
    for what in ("published", "assumed"):
        for text in getattr(profile.origin, what):
            print(f"         {what}: {text}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate, write the picture and the trace; returns the figures."""
    print(f"simulating {args.setting.label}; nothing is computed, time is modelled")
    setting = settled_head(args.setting)
    gpu, owner = profile_of(setting.gpu), profile_of(setting.owner_device)
    config = world_of(setting, seed=args.seed)
    expected = expected_s([setting])
    if expected > SAID_FROM_S:
        print(f"{passes(setting):,} micro-batches to simulate: about {spoken(expected)}")
    result = watched(replace(config, record_owners=None) if setting.owners <= 8 else config)
    found = figures(setting, result, Prices(gpu_hour=0.0))
    found = {k: v for k, v in found.items() if not k.startswith("cost")}
    line = line_of(setting)
    pictures = _write(args.out, setting, result, found, line)
    return {
        "simulated": True,
        "setting": {f: getattr(setting, f) for f in setting.__dataclass_fields__},
        "gpu_profile": describe_profile(gpu),
        "owner_profile": describe_profile(owner),
        "line": line,
        **found,
        **pictures,
        "remedies": [asdict(remedy) for remedy in _remedies(setting, args.seed, expected)],
    }


def _remedies(setting: Setting, seed: int, expected: float) -> list[Remedy]:
    """None where they would take too long to try."""
    return [] if TRIALS * expected > TRIED_S else remedies(setting, seed)


def _write(
    out: Path, setting: Setting, result: WorldResult, found: dict[str, Any], line: str
) -> dict[str, str]:
    """The timeline of the last counted step of the first owner, and the trace of all steps."""
    step = [s for s in result.steps if s.owner == "owner0"][-1]
    spans = [s for s in result.trace.spans if _of_first_owner(s.track, s.lane)]
    parts = {part: found[f"path_{part}"] for part in PARTS}
    lanes = f"{setting.lanes} lane{'s' if setting.lanes > 1 else ''} of {setting.tokens} tokens"
    subtitle = (
        f"simulated: {setting.label} ({provenance(setting.gpu)}), {lanes}, owner on "
        f"{device_name(setting.owner_device)} ({provenance(setting.owner_device)}), {line}"
    )
    plot_timeline(out / "timeline.png", spans, (step.start_s, step.end_s), parts, subtitle)
    write_perfetto(out / "trace.json", result.trace.spans, subtitle)
    return {"timeline": str(out / "timeline.png"), "trace": str(out / "trace.json")}


def _of_first_owner(track: str, lane: str) -> bool:
    return lane.startswith("owner0/") or track.startswith("owner0/")


def print_report(f: dict[str, Any]) -> None:
    """What a person wants to know of a simulated run."""
    parts: Sequence[str] = sorted(PARTS, key=lambda part: -f[f"path_{part}"])
    parts_of = {part: f[f"path_{part}"] for part in PARTS}
    print(f"\n{f['line']}: {headline(parts_of, f['step_p50_s'])}")
    print(f"step                {f['step_p50_s']:10.2f} s   {f['tokens_per_step']} tokens an owner")
    print(f"speed               {f['tokens_per_s_owner']:10.1f} tokens/s an owner")
    print("a step waits for")
    for part in parts:
        if f[f"path_{part}"] >= 0.0005:
            share = f[f"path_{part}"]
            print(f"  {WORDS[part]:<22}{100 * share:6.1f} %  {share * f['step_p50_s']:8.2f} s")
    up, down = (1e9 * f[f"gb_{way}_per_step"] / f["tokens_per_step"] for way in ("up", "down"))
    print(
        f"traffic per token   {human_bytes(up)} up + {human_bytes(down)} down = "
        f"{human_bytes(up + down)}; {f['gb_per_step']:.2f} GB a step"
    )
    print(f"worker busy         {100 * f['gpu_utilisation']:10.2f} %")
    if f["resent"]:
        print(f"sent again          {f['resent']:10d} requests, for want of an answer in time")
    if f["remedies"]:
        print("\n".join(lines([Remedy(**found) for found in f["remedies"]])))
    print(f"picture: {f['timeline']}")
    print(f"every span: {f['trace']} (drop it on https://ui.perfetto.dev)")
