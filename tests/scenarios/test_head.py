"""`--lm-head auto`: what it decides, from what, and what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import GPT2Config

from backends.door import place_of
from backends.hardware import CPU
from backends.he.manifest import NAME
from backends.he.params import preset
from backends.nn import head
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import RandomBase
from scenarios import head as head_module
from scenarios.estimate import Shape, workload_of
from scenarios.head import HeadChoice, compared, decided, estimated, prepared_one
from scenarios.llama1b.__main__ import parse
from scenarios.llama1b.world import setting_from
from scenarios.simulated import settled_head
from sim.device import DeviceProfile
from sim.flows import Link
from sim.world import WorldConfig

CONFIG = GPT2Config(
    vocab_size=4096, n_embd=512, n_layer=1, n_head=4, n_positions=64,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
SHAPE = Shape(CONFIG, 16, 16, 1, 4, "thin")
OWNER = replace(DeviceProfile.builtin("cpu-2core"), overhead_s=dict.fromkeys(
    ("local", "encrypt", "multiply", "decrypt", "update"), 1e-6))  # fmt: skip


def world(float_rate: float, bps: float, head: str) -> WorldConfig:
    """An owner so quick in clear, and a line so fast."""
    owner = replace(OWNER, rates={**OWNER.rates, "float": float_rate})
    return WorldConfig(
        workload_of(SHAPE, head == "remote", CPU), owner, DeviceProfile.builtin("h200"),
        access=Link(bps, 1e-5), steps=1, tcp=None,
    )  # fmt: skip


def test_the_slower_side_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow owner sends the head away over a fast line; a quick one keeps it from a slow line."""
    # Of the few words of this model, as of a real one's many.
    monkeypatch.setattr(head, "LARGEST", 2)
    monkeypatch.setattr(head, "SAMPLED", 2)
    slow = compared(lambda head: world(1e7, 1e10, head), "slow owner")
    assert (slow.head, slow.bottleneck) == ("remote", "owner")
    assert slow.step_s[1] < slow.step_s[0]
    thin = compared(lambda head: world(1e12, 1e7, head), "thin line")
    assert (thin.head, thin.bottleneck) == ("local", "line")
    assert thin.step_s[0] < thin.step_s[1]


def test_it_says_why() -> None:
    """In one line: the times, what limits, and what was assumed."""
    local = HeadChoice("local", (3.1, 3.9), "line", "assumed: 1 Gb/s")
    assert local.said() == (
        "head local: 3.1 s a step against 3.9 s with the head at the worker; the line is the "
        "bottleneck (assumed: 1 Gb/s)"
    )
    remote = replace(local, head="remote", bottleneck="owner")
    assert remote.said().startswith("head remote: 3.9 s a step against 3.1 s with the head here;")


def test_where_nothing_is_known_the_assumption_is_told() -> None:
    """Of a worker elsewhere; one in this process has no line."""
    assert "assumed: 1 lane of 16 tokens, 1 Gb/s and 20 ms to an H200" in (
        estimated(SHAPE, CPU, here=False).where
    )
    assert "assumed" not in estimated(SHAPE, CPU, here=True).where


def test_a_model_that_is_prepared_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the very place that preparing it would take; both of them, or none, decide nothing."""
    base = RandomBase(CONFIG, 0)
    monkeypatch.setattr(
        head_module, "estimated",
        lambda *_: HeadChoice("local", (1.0, 2.0), "line", "a test"),
    )  # fmt: skip
    given = (SHAPE, base, CPU, True, tmp_path, b"")
    assert decided(*given) == "local"
    assert capsys.readouterr().out.startswith("head local: 1 s a step against 2 s")
    for remote in (True, False):
        groups = build_skeleton(base, remote).groups
        place = place_of(base, groups, preset("thin"), tmp_path, b"")
        place.mkdir()
        (place / NAME).touch()
        if remote:
            assert decided(*given) == "remote"
            assert capsys.readouterr().out == "head remote: so the model is prepared already\n"
    assert prepared_one(SHAPE, base, CPU, tmp_path, b"") is None
    assert prepared_one(SHAPE, base, CPU, tmp_path, b"other") is None


def test_a_model_that_cannot_be_followed_keeps_its_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is said why."""
    short = replace(SHAPE, tokens=128, sequence=128)
    assert decided(short, RandomBase(CONFIG, 0), CPU, True, tmp_path, b"") == "local"
    assert "no estimate of a step (a sequence of 128 tokens" in capsys.readouterr().out


def test_a_simulated_run_decides_on_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A slow one keeps the head here; it is said for which line."""
    small = ["--model=gpt2", "--tokens=8", "--sequence=8", "--lanes=1", "--steps=1"]
    asked = parse(["--lm-head=auto", "--bandwidth=1Mb/s", *small])
    setting = settled_head(setting_from(asked))
    assert setting.head == "local"
    said = capsys.readouterr().out
    assert said.startswith("head local: ")
    assert said.endswith(
        "the line is the bottleneck (gpt2 on H200, over 1 Mb/s, 20 ms round trip)\n"
    )
