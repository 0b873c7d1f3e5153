"""A recorded step of a GPU beside its simulated twin: the same parts on both sides, and no more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_fidelity
from sim.device import DeviceProfile

FIGURES = Path(gpu_fidelity.__file__).parent / "results" / "gpu-h100.json"


@pytest.fixture(scope="module")
def step() -> dict[str, Any]:
    """The recorded training step."""
    found: dict[str, Any] = json.loads(FIGURES.read_text())["step"]
    return found


def test_parts_add_up_on_both_sides(step: dict[str, Any]) -> None:
    """One lane on one device: nothing overlaps; and both sides make the same requests."""
    case = gpu_fidelity.compare(step, DeviceProfile.builtin("h100"))
    assert sum(case["real_parts_s"].values()) == pytest.approx(case["real_s"])
    assert sum(case["simulated_parts_s"].values()) == pytest.approx(case["simulated_s"])
    blocks_a_request = -(-case["tokens"] // 256)
    assert case["requests"] * blocks_a_request == step["blocks_per_step"]
    assert case["error"] == pytest.approx(case["simulated_s"] / step["private_step_s"] - 1)


def test_lanes_that_overlap_are_refused(step: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="several lanes"):
        gpu_fidelity.compare(step | {"lanes": 2}, DeviceProfile.builtin("h100"))


def test_the_command_writes_a_case_for_each_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With where the real side was measured; what cannot be compared is one clear line."""
    argv = ["gpu_fidelity", "--figures", str(FIGURES), "--json", str(tmp_path / "f.json")]
    monkeypatch.setattr(sys, "argv", [*argv, "--gpu", "h100", "h200"])
    gpu_fidelity.main()
    found = json.loads((tmp_path / "f.json").read_text())
    assert [case["kind"] for case in found["cases"]] == ["measured", "datasheet"]
    assert found["measured"]["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert capsys.readouterr().out.count("error ") == 2
    monkeypatch.setattr(sys, "argv", [*argv, "--gpu", "tpu"])
    with pytest.raises(SystemExit, match="error: no device profile 'tpu'"):
        gpu_fidelity.main()
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["", "--figures", str(empty), "--gpu", "h100"])
    with pytest.raises(SystemExit, match=r"error: .*empty\.json holds no training step"):
        gpu_fidelity.main()
