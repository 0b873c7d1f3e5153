"""`scenarios.llama1b --real-gpu`, whole, on a tiny checkpoint; emulated where there is no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from backends.hardware import Hardware
from backends.he.cuda.device import Gpu
from scenarios.llama1b import __main__ as llama1b
from scenarios.llama1b import run
from scenarios.texts import Data
from tests.nn.conftest import LLAMA

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved as `transformers` does."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("host_frames", [False, True])
def test_a_run_trains_reports_and_leaves_an_adapter(
    host_frames: bool, checkpoint: Path, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """bf16, two lanes: figures with the split of device time, and what `peft` loads."""
    place = Hardware(gpu.device, torch.bfloat16, gpu, host_frames)
    monkeypatch.setattr(run, "chosen", lambda *_: place)
    data = Data(torch.arange(64).remainder(90).view(4, 16))
    monkeypatch.setattr(run, "load_texts", lambda *_, **__: data)
    monkeypatch.setattr(
        sys, "argv",
        ["llama1b", "--real-gpu", "--weights", str(checkpoint), "--steps", "2", "--tokens", "16",
         "--sequence", "16", "--lanes", "2", "--rank", "2", "--out", str(tmp_path / "out"),
         "--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "f.json")],
    )  # fmt: skip
    llama1b.main()
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["hardware"].startswith("bf16 on ")
    assert figures["host_frames"] == host_frames
    if host_frames:
        assert figures["copied_s"] > 0
    assert len(figures["losses"]) == 2
    assert figures["owner_s"] > 0
    assert figures["worker_s"] > 0
    assert figures["blocks_per_step"] > 0
    said = capsys.readouterr().out
    for part in ("tok/s", "owner: cipher", "worker", "traffic per token"):
        assert part in said
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert any("lora" in name for name, _ in adapted.named_parameters())
