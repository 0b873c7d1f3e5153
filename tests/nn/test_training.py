"""Lanes, exact resume, adapters that plain `peft` loads, and data in a fixed order."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from backends.nn import checkpoint
from backends.nn.adapters import add_lora, save_adapter, trainable
from backends.nn.checkpoint import ResumeError, SaveError
from backends.nn.corpus import batch_indices
from backends.nn.local import localise
from backends.nn.losses import token_losses
from backends.nn.trainer import TrainConfig, Trainer, TrainingInterrupted, evaluate
from tests.nn.conftest import Tiny, tokens

CONFIG = TrainConfig(steps=4, batch=4, micro_batch=1, learning_rate=1e-2, warmup_steps=1)
DATA = tokens(10, 12)


def run(
    tiny: Tiny, backend: str, lanes: int = 1, directory: Path | None = None, stop_after: int = 0
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train; returns the adapter's weights and the losses. Stops by Ctrl-C when asked."""
    skeleton = tiny.skeleton()
    model = add_lora(skeleton.model, 4, 8, seed=0)
    trainer = Trainer(
        model, DATA, CONFIG, lanes=lanes, forget_lane=skeleton.remote.forget_lane,
        checkpoints=directory, checkpoint_every=100,
    )  # fmt: skip

    def on_step(step: int, loss: float) -> None:
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    with tiny.connected(skeleton, backend, lanes):
        try:
            losses = trainer.train(on_step)
        except TrainingInterrupted:
            losses = trainer.progress.losses
    return {name: p.detach().clone() for name, p in trainable(model).items()}, losses


def test_lanes_change_not_one_bit(llama: Tiny) -> None:
    """With `clear`, 1, 2 and 4 lanes give identical adapters."""
    expected, losses = run(llama, "clear", lanes=1)
    for lanes in (2, 4):
        found, other = run(llama, "clear", lanes=lanes)
        assert other == losses
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_private_training_follows_clear_training(llama: Tiny) -> None:
    """Losses of encrypted training stay close to those in clear."""
    _, clear = run(llama, "clear")
    _, private = run(llama, "mlwe", lanes=2)
    assert private == pytest.approx(clear, rel=2e-3)
    assert clear[-1] < clear[0]


def test_the_norm_of_each_gradient_is_kept(llama: Tiny, tmp_path: Path) -> None:
    """Before clipping, beside the losses, and through a resume."""
    skeleton = llama.skeleton()
    localise(skeleton, llama.prepared["clear"])
    model = add_lora(skeleton.model, 4, 8, seed=0, linears=list(skeleton.shapes))
    config = TrainConfig(2, 4, 4, learning_rate=1e-2, max_grad_norm=1e-3)
    ids = DATA[batch_indices(0, 4, len(DATA), 0)]
    loss = token_losses(model, ids) / (4 * 11)
    first = torch.autograd.grad(loss, list(trainable(model).values()))
    trainer = Trainer(model, DATA, config, checkpoints=tmp_path)
    trainer.train()
    norms = trainer.progress.gradient_norms
    assert norms[0] == pytest.approx(float(torch.cat([g.flatten() for g in first]).norm()))
    assert len(norms) == 2
    assert Trainer(model, DATA, config, checkpoints=tmp_path).progress.gradient_norms == norms


@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupt_and_resume_is_one_uninterrupted_run(
    llama: Tiny, tmp_path: Path, stop_after: int
) -> None:
    """Ctrl-C ends the step in work, and the next start goes on: bit-identical with `clear`."""
    expected, losses = run(llama, "clear")
    _, first = run(llama, "clear", directory=tmp_path, stop_after=stop_after)
    assert first == losses[:stop_after]
    found, resumed = run(llama, "clear", directory=tmp_path)
    assert resumed == losses
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpoints_hold_no_randomness_and_no_pickle(llama: Tiny, tmp_path: Path) -> None:
    """Four files, JSON and safetensors; at most two checkpoints are kept, and a key."""
    run(llama, "clear", directory=tmp_path, stop_after=1)
    run(llama, "clear", directory=tmp_path, stop_after=2)
    run(llama, "clear", directory=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.key", "step-000002", "step-000004"]
    names = sorted(p.name for p in (tmp_path / "step-000004").iterdir())
    assert names == [
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_a_half_written_checkpoint_is_never_seen(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while saving leaves the former checkpoint in force."""
    run(llama, "clear", directory=tmp_path, stop_after=1)

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "write_json", crash)
    with pytest.raises(SaveError, match=r"step 4 cannot be written.*disk full.*make room"):
        run(llama, "clear", directory=tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["data.key", "step-000000", "step-000001"]


def test_what_a_crash_left_unfinished_is_cleared_away(llama: Tiny, tmp_path: Path) -> None:
    """At the next start; and a checkpoint that was about to be replaced is there again."""
    _, losses = run(llama, "clear", directory=tmp_path, stop_after=2)
    (tmp_path / "step-000002").rename(tmp_path / f".step-000002.{'0' * 16}.old")
    for name in (f".step-000002.{'1' * 16}.tmp", f".step-000003.{'2' * 16}.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.safetensors").write_bytes(b"half")
    (tmp_path / f".data.key.{'3' * 16}.tmp").write_bytes(b"half")
    (tmp_path / ".notes.tmp").write_bytes(b"somebody else's")
    _, after = run(llama, "clear", directory=tmp_path)
    assert after[:2] == losses
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [".notes.tmp", "data.key", "step-000002", "step-000004"]


def test_a_half_deleted_checkpoint_is_never_seen(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while an old one is dropped leaves nothing that a resumed run stumbles over."""
    _, losses = run(llama, "clear", directory=tmp_path, stop_after=2)

    def crash(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        run(llama, "clear", directory=tmp_path)
    monkeypatch.undo()
    _, after = run(llama, "clear", directory=tmp_path)
    assert after[:2] == losses
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["data.key", "step-000002", "step-000004"]


def test_resuming_with_other_settings_is_refused(llama: Tiny, tmp_path: Path) -> None:
    """The error names what differs."""
    run(llama, "clear", directory=tmp_path, stop_after=1)
    skeleton = llama.skeleton()
    model = add_lora(skeleton.model, 4, 8, seed=0)
    other = TrainConfig(steps=4, batch=4, micro_batch=1, learning_rate=2e-2, warmup_steps=1)
    with pytest.raises(ResumeError, match=r"learning_rate.*--fresh"):
        Trainer(model, DATA, other, checkpoints=tmp_path)
    with pytest.raises(ResumeError, match=r"data.*--fresh"):
        Trainer(model, tokens(10, 12, seed=1), CONFIG, checkpoints=tmp_path)


def test_a_checkpoint_tells_nobody_whether_it_is_of_some_data(llama: Tiny, tmp_path: Path) -> None:
    """Two runs on the same data leave different tags, and each can be checked with its key only."""
    tags = []
    for name in ("one", "two"):
        run(llama, "clear", directory=tmp_path / name, stop_after=1)
        state = json.loads((tmp_path / name / "step-000001" / "state.json").read_text())
        tags.append(state["run"]["data"])
        key = tmp_path / name / "data.key"
        plain = json.dumps(list(DATA.shape)).encode() + DATA.numpy().tobytes()
        assert tags[-1] == hmac.new(key.read_bytes(), plain, "sha256").hexdigest()
        assert hashlib.sha256(plain).hexdigest() not in json.dumps(state)
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / name / "step-000001").stat().st_mode) == 0o700
    assert tags[0] != tags[1]


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), (b"short", "no key")])
def test_a_checkpoint_without_its_key_is_refused(
    llama: Tiny, tmp_path: Path, content: bytes | None, message: str
) -> None:
    """What is missing, and what can be done; nothing is overwritten."""
    run(llama, "clear", directory=tmp_path, stop_after=1)
    key = tmp_path / "data.key"
    key.unlink()
    if content is not None:
        key.write_bytes(content)
    with pytest.raises(ResumeError, match=f"data.key.*{message}.*--fresh"):
        run(llama, "clear", directory=tmp_path)
    assert key.exists() == (content is not None)
    assert (tmp_path / "step-000001").exists()


@pytest.mark.parametrize("backend", ["clear", "mlwe"])
def test_plain_peft_loads_the_adapter(tiny: Tiny, tmp_path: Path, backend: str) -> None:
    """A saved adapter on an ordinary model gives the logits of the owner's model in clear."""
    skeleton = tiny.skeleton()
    model = add_lora(skeleton.model, 4, 8, seed=0)
    trainer = Trainer(model, DATA, CONFIG)
    with tiny.connected(skeleton, backend):
        trainer.train()
    save_adapter(model, tmp_path / "adapter", "tiny")
    plain = tiny.skeleton()
    localise(plain, tiny.prepared[backend])
    loaded = PeftModel.from_pretrained(plain.model, tmp_path / "adapter").eval()
    ours = tiny.skeleton()
    localise(ours, tiny.prepared[backend])
    mine = add_lora(ours.model, 4, 8, seed=0).eval()
    with torch.no_grad():
        for name, parameter in trainable(mine).items():
            parameter.copy_(trainable(model)[name])
        expected = mine(input_ids=DATA).logits
        assert torch.equal(loaded(input_ids=DATA).logits, expected)
    with loaded.disable_adapter():
        before = evaluate(loaded, DATA, 4)
    assert evaluate(loaded, DATA, 4) < before
