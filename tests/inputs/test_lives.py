"""The lives of a run: begun, stopped, killed, gone on with, begun twice, on a disk that is full."""

from __future__ import annotations

import argparse
import errno
import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from backends.files import end_replacing, replacing_directory
from backends.he.manifest import PreparationError, is_finished
from backends.he.preparation import prepare
from backends.ledger import WorkerLedger
from backends.lock import HeldError, alone
from backends.net import dialling
from backends.net.dialling import Dialler
from backends.nn.adapters import AdapterError, add_lora, base_name, save_adapter, trainable
from backends.nn.checkpoint import ResumeError, SaveError
from backends.nn.corpus import corpus_of
from backends.nn.texts import DataError, find_texts
from backends.nn.tokenizer import ByteTokenizer
from backends.nn.trainer import TaintedError, TrainConfig, Trainer, TrainingInterrupted
from backends.places import PlaceError
from scenarios import report
from scenarios.llama1b import __main__ as llama1b
from scenarios.llama1b import run as llama1b_run
from scenarios.session import one_run, require_room_for_run, stopped_untainted
from scenarios.texts import Data
from sim.trace import write_perfetto
from tests.he.small_model import GROUPS, TAG, quiet, weight_of
from tests.inputs.full import full

CONFIG = TrainConfig(steps=4, batch=2, micro_batch=1, learning_rate=1e-2, warmup_steps=1)
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
DATA = torch.randint(0, 32, (6, 8), generator=torch.Generator().manual_seed(0))


def base() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LLAMA)


def adapted() -> PeftModel:
    return add_lora(base(), 2, 4, seed=0, base_model="/somewhere/base")


class Life:
    """One start of a run that trains in clear; Ctrl-C after a step when asked."""

    def __init__(
        self, place: Path, config: TrainConfig = CONFIG, ledger: WorkerLedger | None = None,
        **identity: str,
    ) -> None:  # fmt: skip
        self.model = adapted()
        self.said: list[str] = []
        self.rates: list[float] = []
        self.trainer = Trainer(
            self.model, DATA, config, checkpoints=place, checkpoint_every=1, ledger=ledger,
            identity={"rank": 2, **identity}, say=self.said.append,
        )  # fmt: skip

    def train(self, stop_after: int = 0) -> Life:
        def on_step(step: int, loss: float) -> None:
            self.rates.append(self.trainer._optimizer.param_groups[0]["lr"])
            if step == stop_after:
                os.kill(os.getpid(), signal.SIGINT)

        self.trainer.train(on_step)
        return self

    def outcome(self) -> tuple[list[float], dict[str, torch.Tensor]]:
        adapter = {name: p.detach().clone() for name, p in trainable(self.model).items()}
        return self.trainer.progress.losses, adapter


def stopped(place: Path, after: int) -> TrainingInterrupted:
    with pytest.raises(TrainingInterrupted) as told:
        Life(place).train(after)
    return told.value


def same(one: Life, other: Life) -> bool:
    (losses, mine), (expected, theirs) = one.outcome(), other.outcome()
    return losses == expected and all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """An undisturbed run."""
    return Life(tmp_path_factory.mktemp("whole")).train()


@pytest.fixture(scope="module")
def at_step_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run that was stopped after step 2."""
    place = tmp_path_factory.mktemp("stopped")
    stopped(place, after=2)
    return place


# --- one run a directory ----------------------------------------------------------------------

HOLDER = """
import fcntl, json, os, sys, time
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
os.write(lock, sys.argv[2].encode() or json.dumps(
    {"pid": os.getpid(), "host": "gpu1", "since": "2026-01-01 00:00:00 UTC"}).encode())
print("held", flush=True)
time.sleep(60)
"""


def holder(lock: Path, text: str = "") -> subprocess.Popen[str]:
    """A process of its own that holds a lock."""
    command = [sys.executable, "-S", "-c", HOLDER, str(lock), text]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    """The second is told who has it, since when, and what to do; a dead one is in nobody's way."""
    other = holder(tmp_path / "run.lock")
    try:
        with pytest.raises(HeldError) as refused, one_run(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    said = str(refused.value)
    assert f"process {other.pid} on gpu1 since 2026-01-01 00:00:00 UTC" in said
    assert "another --out" in said
    assert "\n" not in said
    own = f"process {os.getpid()} on this machine"
    with one_run(tmp_path), pytest.raises(HeldError, match=own), one_run(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "words"),
    [("finetune.__main__", "--model MODEL --data TEXT"), ("quickstart", ""),
     ("llama1b.__main__", "--real-cpu --data TEXT"), ("generate", "--model MODEL --prompt x"),
     ("endpoint.__main__", "--model MODEL")],
)  # fmt: skip
def test_a_run_beside_another_reads_and_writes_nothing(
    module: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything else that takes time, or takes the place of the other's."""
    tiny = Path(report.__file__).parent / "assets" / "tiny-llama"
    out, text = tmp_path / "out", tmp_path / "a.txt"
    text.write_text("words " * 400)
    for name in ("MODEL", "TEXT"):
        words = words.replace(name, str(tiny if name == "MODEL" else text))
    places = ["--out", str(out), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", [module, *words.split(), *places])
    monkeypatch.setattr("scenarios.cli.private_process", lambda: None)
    name = module.removesuffix(".__main__")
    command = importlib.import_module(f"scenarios.{name}.__main__")
    with one_run(out):
        with pytest.raises(SystemExit, match=f"{out} is in use by process"):
            command.main()
        assert [path.name for path in out.iterdir()] == ["run.lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


@pytest.mark.parametrize("text", ["no json", "[]", '{"pid": "x"}', '{"pid": 1, "host": "a\\nb"}'])
def test_whatever_a_lock_says_it_holds(tmp_path: Path, text: str) -> None:
    """Anyone may have written it."""
    other = holder(tmp_path / "lock", text)
    try:
        unknown = pytest.raises(HeldError, match="in use by another process; go")
        with unknown, alone(tmp_path / "lock", "go"):
            pass
    finally:
        other.kill()
        other.wait()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, the run goes on, and nothing is cleared up that may be another's."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    aside = tmp_path / f".adapter.{'1' * 16}.tmp"
    aside.mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    told: list[str] = []
    with alone(tmp_path / "lock", "go", warn=told.append) as certain:
        assert not certain
    assert "file system without locks (No locks available)" in told[0]
    with one_run(tmp_path):
        assert aside.exists()


def test_a_place_that_takes_no_lock(tmp_path: Path) -> None:
    """One line, and never through a link that somebody has put there."""
    (tmp_path / "run.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"run\.lock cannot be written"), one_run(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match="is a file"), one_run(tmp_path / "file" / "run"):
        pass


def test_what_a_dead_run_left_is_cleared_away(tmp_path: Path) -> None:
    """What it had moved aside comes back; what is not ours, or of a living process, stays."""
    (tmp_path / f".adapter.{'1' * 16}.old").mkdir()
    for name in ("adapter", "checkpoints", "corpus"):
        (tmp_path / f".{name}.{'2' * 16}.tmp").mkdir()
    for name in ("report.md", "report.html"):
        (tmp_path / f".{name}.{'3' * 16}.tmp").write_text("half")
    (tmp_path / f".notes.{'4' * 16}.tmp").write_text("somebody else's")
    with replacing_directory(tmp_path / "losses.png") as living, one_run(tmp_path):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"adapter", f".notes.{'4' * 16}.tmp", "run.lock", living.name}


@pytest.mark.parametrize(
    "name", ["corpus", "adapter", "adapter-comparison", "checkpoints", "checkpoints-private"]
)
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_no_run_has_written_is_not_replaced(tmp_path: Path, name: str, kind: str) -> None:
    """As of somebody who keeps texts in ./corpus, and says --data corpus --out ."""
    place = tmp_path / name
    if kind == "folder":
        place.mkdir()
        (place / "novel.txt").write_text("the only copy")
    elif kind == "file":
        place.write_text("the only copy")
    else:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(PlaceError, match=rf"{name} (holds|is a).*--out"), one_run(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_what_runs_have_written_is_replaced(tmp_path: Path, at_step_2: Path) -> None:
    """Checkpoints, those set aside, the adapter and the tokens."""
    shutil.copytree(at_step_2, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "damaged-step-000002-again").mkdir()
    save_adapter(adapted(), tmp_path / "adapter", "base")
    (tmp_path / "a.txt").write_text("text " * 100)
    corpus_of(find_texts([tmp_path / "a.txt"]), ByteTokenizer(), 8, 256, tmp_path / "corpus")
    with one_run(tmp_path):
        pass


# --- preparation ------------------------------------------------------------------------------


class Loader:
    """Weights, and how often each was asked for."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self.reads: list[str] = []
        self._wait_s = wait_s

    def __call__(self, module: str) -> torch.Tensor:
        self.reads.append(module)
        time.sleep(self._wait_s)
        return weight_of(module)


def make(place: Path, loader: Loader, told: list[str]) -> None:
    prepare(place, GROUPS, loader, None, quiet, owner_tag=TAG, on_wait=told.append)


def test_two_processes_prepare_one_model(tmp_path: Path) -> None:
    """The second waits with a line, and takes what the first has made."""
    loader, told = Loader(0.1), [[], []]  # type: ignore[var-annotated]
    threads = [threading.Thread(target=make, args=(tmp_path, loader, said)) for said in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loader.reads) == ["a.k", "a.o", "a.q"]
    (line,) = told[0] + told[1]
    # The other may have taken its place and not yet said who it is.
    assert re.search(rf"in use by (process {os.getpid()} on this machine|another process)", line)
    assert "waiting" in line
    assert is_finished(tmp_path)
    assert not (tmp_path / "preparing.lock").exists()


def test_preparation_goes_on_after_kill_9(tmp_path: Path) -> None:
    """What was being written goes, in every folder; that of a living process does not."""
    asides = [
        tmp_path / part / f".g0000.weight.npy.{'1' * 16}.tmp" for part in ("worker", "owner", ".")
    ]
    for aside in asides:
        aside.parent.mkdir(exist_ok=True)
        aside.write_bytes(b"half")
    (tmp_path / "preparing.lock").write_text("of the dead")
    with asides[1].open() as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        make(tmp_path, Loader(), [])
    assert [aside.exists() for aside in asides] == [False, True, False]


def test_a_disk_that_fills_while_preparing(tmp_path: Path) -> None:
    """One line, nothing half-written; then it goes on where it stopped."""
    loader = Loader()
    with full(700), pytest.raises(PreparationError) as failed:
        make(tmp_path, loader, [])
    said = str(failed.value)
    assert "File too large" in said
    assert "it goes on with" in said
    assert "\n" not in said
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".lock"))]
    make(tmp_path, loader, [])
    assert is_finished(tmp_path)


# --- a disk that fills ------------------------------------------------------------------------


def test_a_disk_that_fills_while_saving(tmp_path: Path) -> None:
    """A checkpoint: those before it are whole, and the same command goes on from them."""
    stopped(tmp_path, after=2)
    with full(2000), pytest.raises(SaveError, match=r"step 3 .*too large.*goes on from the newest"):
        Life(tmp_path).train()
    assert not list(tmp_path.glob(".*"))
    life = Life(tmp_path)
    assert life.trainer.progress.step == 2
    assert life.said == []


def test_a_disk_that_fills_at_the_end(tmp_path: Path) -> None:
    """An adapter, a trace, a report, a picture: what was there before is whole."""
    model = adapted()
    save_adapter(model, tmp_path / "adapter", "base")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with full(), pytest.raises(AdapterError, match=r"adapter .*too large.*in the checkpoints"):
        save_adapter(model, tmp_path / "adapter", "base")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    losses = {"base_loss": 3.0, "clear_loss": 2.0, "private_loss": 2.0}
    writers: dict[str, Callable[[Path], object]] = {
        "trace.json": lambda path: write_perfetto(path, [], "title" * 100),
        "report.md": lambda path: report.write_text(path, "text" * 100),
        "losses.png": lambda path: report.plot_losses(path, [3.0, 2.0], [3.0], losses),
    }
    for name, write in writers.items():
        with full(), pytest.raises(OSError, match=f"{name} cannot be written: File too large"):
            write(tmp_path / name)
        write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", *sorted(writers)]


def test_too_little_room_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both numbers; a run that has its checkpoints already needs less."""

    class Skeleton:
        groups = GROUPS

    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(PlaceError, match=r"needs \d+\.\d MB more in .* has 0\.0 MB free.*--out"):
        require_room_for_run(Skeleton(), 4, tmp_path, checkpoints)  # type: ignore[arg-type]
    checkpoints.mkdir()
    (checkpoints / "file").write_bytes(bytes(40_000))
    require_room_for_run(Skeleton(), 4, tmp_path, checkpoints)  # type: ignore[arg-type]


# --- whole and damaged checkpoints ------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def zeroed(path: Path) -> None:
    """Room that a copy had made for tensors, and had not filled."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + bytes(len(content) - start))


def emptied(path: Path) -> None:
    """A file of the right form that holds nothing."""
    path.write_bytes((2).to_bytes(8, "little") + b"{}")


SPOILS: dict[str, Callable[[Path], Any]] = {
    "no state": lambda place: (place / "state.json").unlink(),
    "state cut": lambda place: cut(place / "state.json"),
    "no adapter": lambda place: (place / "adapter_model.safetensors").unlink(),
    "adapter cut": lambda place: cut(place / "adapter_model.safetensors"),
    "no moments": lambda place: (place / "optimizer.safetensors").unlink(),
    "moments cut": lambda place: cut(place / "optimizer.safetensors"),
    "adapter zeroed": lambda place: zeroed(place / "adapter_model.safetensors"),
    "moments zeroed": lambda place: zeroed(place / "optimizer.safetensors"),
    "moments empty": lambda place: emptied(place / "optimizer.safetensors"),
    "nothing copied": lambda place: [path.unlink() for path in place.iterdir()],
    "a file": lambda place: (shutil.rmtree(place), place.write_text("x")),
    "of step 0": lambda place: shutil.copy2(
        place.with_name("step-000001") / "state.json", place / "state.json"
    ),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_the_newest_whole_checkpoint_is_used(
    tmp_path: Path, whole: Life, at_step_2: Path, spoil: str
) -> None:
    """It is said, and the damaged one is kept out of the way; the outcome is the same bits."""
    shutil.copytree(at_step_2, tmp_path, dirs_exist_ok=True)
    SPOILS[spoil](tmp_path / "step-000002")
    life = Life(tmp_path)
    assert life.trainer.progress.step == 1
    (line,) = life.said
    assert "step-000002" in line
    assert "is damaged" in line
    assert "going on from step-000001 instead" in line
    assert (tmp_path / "damaged-step-000002").exists()
    if spoil in ("state cut", "moments empty"):
        assert same(life.train(), whole)


def test_no_checkpoint_is_whole(tmp_path: Path) -> None:
    """An error, again and again: nobody starts over who wanted to go on."""
    stopped(tmp_path, after=2)
    for path in tmp_path.glob("step-*"):
        (path / "state.json").unlink()
    for _ in range(2):
        with pytest.raises(ResumeError, match=r"no checkpoint in .* is whole \(.*--fresh"):
            Life(tmp_path)


def test_damage_does_not_bring_a_liar_back(tmp_path: Path) -> None:
    """A damaged checkpoint before whole ones that rest on a caught worker: none is gone on from."""
    ledger = WorkerLedger()
    ledger.accepted("w")
    with pytest.raises(TrainingInterrupted):
        Life(tmp_path, ledger=ledger).train(2)
    (tmp_path / "step-000000" / "state.json").unlink()
    ledger.retire("w", "a lie")
    with pytest.raises(ResumeError, match=r"--fresh"):
        Life(tmp_path, ledger=ledger)
    assert not list(tmp_path.glob("step-00000[12]"))


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_strange_thing_where_checkpoints_are(tmp_path: Path, kind: str) -> None:
    """One line."""
    if kind == "file":
        (tmp_path / "checkpoints").write_text("x")
    else:
        (tmp_path / "checkpoints" / "data.key").mkdir(parents=True)
    with pytest.raises(ResumeError, match=r"is a file where|is no key"):
        Life(tmp_path / "checkpoints")


# --- stopping and going on --------------------------------------------------------------------


def test_after_ctrl_c_there_is_an_adapter(tmp_path: Path) -> None:
    """Its path is told; plain `peft` loads it, with the numbers of the step that was finished."""
    told = str(stopped(tmp_path, after=2))
    place = tmp_path / "step-000002"
    assert f"stopped after step 2 of 4; {place} is an adapter that peft loads" in told
    assert "the same command goes on from there" in told
    life = Life(tmp_path)
    assert life.trainer.progress.step == 2
    loaded = PeftModel.from_pretrained(base(), place).eval()
    with torch.no_grad():
        ours = life.model.eval()(input_ids=DATA).logits
        assert torch.equal(loaded(input_ids=DATA).logits, ours)
        assert not torch.equal(base().eval()(input_ids=DATA).logits, ours)
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "/somewhere/base"
    assert config["inference_mode"] is True


def test_what_rests_on_a_liar_is_no_adapter(tmp_path: Path) -> None:
    """Caught while the session closed, after Ctrl-C: it is said, and set aside."""
    ledger = WorkerLedger()
    ledger.accepted("w")
    life = Life(tmp_path, ledger=ledger)
    refused = pytest.raises(TaintedError, match=r"w was caught .*step 2.*not saved as a result")
    with refused, stopped_untainted(life.trainer):
        try:
            life.train(2)
        finally:
            ledger.retire("w", "a lie")
    assert sorted(path.name for path in tmp_path.glob("*step*")) == [
        "distrusted-step-000001", "distrusted-step-000002", "step-000000",
    ]  # fmt: skip


def test_more_steps_later(tmp_path: Path) -> None:
    """The schedule is that of a run of so many steps, from there on; it is said."""
    stopped(tmp_path, after=2)
    more = replace(CONFIG, steps=6, warmup_steps=2)
    life = Life(tmp_path, more)
    (line,) = life.said
    assert "was to have 4 steps and has 6 now: from step 3 on the learning rate" in line
    life.train()
    assert len(life.trainer.progress.losses) == 6
    assert life.rates == [more.rate(step) for step in range(2, 6)]
    again = Life(tmp_path, more)
    assert again.said == []


def test_a_finished_run_is_gone_on_with(tmp_path: Path) -> None:
    """As if it had been meant to be longer: the last step that is kept is where it goes on."""
    Life(tmp_path).train()
    life = Life(tmp_path, replace(CONFIG, steps=5)).train()
    assert len(life.trainer.progress.losses) == 5


def test_fewer_steps_than_are_done(tmp_path: Path) -> None:
    """It is finished, which is said; the adapter is that of what was done."""
    stopped(tmp_path, after=3)
    life = Life(tmp_path, replace(CONFIG, steps=2))
    assert life.said == [
        "3 steps are done, and 2 are asked for: nothing is left to train; the adapter is that of "
        "step 3"
    ]
    before = life.outcome()
    life.train()
    assert life.rates == []
    assert life.outcome()[0] == before[0]
    assert len(life.trainer.progress.losses) == 3
    assert Life(tmp_path).trainer.progress.step == 3


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    """More steps are no way around that."""
    stopped(tmp_path, after=1)
    for other, said in (
        (replace(CONFIG, learning_rate=2e-2), r"learning_rate 0\.01, not 0\.02\); use the same"),
        (replace(CONFIG, seed=1, batch=3, steps=9), r"batch 2, not 3; seed 0, not 1\)"),
        (replace(CONFIG, warmup_steps=2), r"warmup_steps 1, not 2"),
    ):
        with pytest.raises(ResumeError, match=said):
            Life(tmp_path, other)
    with pytest.raises(ResumeError, match=r"\(data: another text, or read otherwise\)"):
        Trainer(adapted(), DATA[:5], CONFIG, checkpoints=tmp_path, identity={"rank": 2})


def test_another_base_is_refused(tmp_path: Path) -> None:
    """By both their digests."""
    with pytest.raises(TrainingInterrupted):
        Life(tmp_path, base="one").train(2)
    with pytest.raises(ResumeError, match="base 'one', not 'other'"):
        Life(tmp_path, base="other")


def test_what_goes_to_no_worker_is_of_the_base_too(tmp_path: Path) -> None:
    """Norms and embeddings, which are not in the digest of a prepared model."""
    args = llama1b.parse(["--real-cpu", "--out", str(tmp_path)])
    prepared: Any = SimpleNamespace(model_digest=b"the same linears")

    def begun(base: str) -> Trainer:
        setup: Any = SimpleNamespace(
            hardware=SimpleNamespace(device="cpu"), data=Data(DATA), training=CONFIG,
            skeleton=SimpleNamespace(remote=SimpleNamespace(forget_lane=lambda: None)),
            base=SimpleNamespace(identity=lambda: base),
        )  # fmt: skip
        return llama1b_run.make_trainer(args, setup, prepared, adapted(), private=True)

    begun("one")._save()
    begun("one")
    with pytest.raises(ResumeError, match="base 'one', not 'other'"):
        begun("other")


def test_who_starts_over_and_is_refused_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(args: argparse.Namespace) -> None:
        raise DataError("no such text")

    (tmp_path / "checkpoints" / "step-000009").mkdir(parents=True)
    monkeypatch.setattr(llama1b_run, "set_up", refused)
    monkeypatch.setattr(llama1b, "clean_exit", lambda *errors: nullcontext())
    monkeypatch.setattr(sys, "argv", ["llama1b", "--real-cpu", "--fresh", "--out", str(tmp_path)])
    with pytest.raises(DataError):
        llama1b.main()
    assert (tmp_path / "checkpoints" / "step-000009").exists()


def test_a_million_steps(tmp_path: Path) -> None:
    """A checkpoint with a digit more is the newer one."""
    stopped(tmp_path, after=1)
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-1000000")
    life = Life(tmp_path)
    assert "step-1000000" in life.said[0]
    assert life.trainer.progress.step == 1


def test_the_base_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found from wherever the adapter is loaded, or by its name on the hub."""
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models")
    assert base_name("base") == base_name("../models/base") == str(tmp_path / "models" / "base")
    assert base_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


# --- Ctrl-C -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ordinary_interrupts() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt here, whatever a test before has made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_twice_waits_for_no_worker(tmp_path: Path) -> None:
    """The first one waits for the step; the second ends it, though a lane still waits."""
    life, free, asked = Life(tmp_path), threading.Event(), threading.Event()
    model = life.model
    model.register_forward_pre_hook(lambda *_: (asked.set(), free.wait(30), None)[-1])
    stops: list[float] = []

    def twice() -> None:
        asked.wait(30)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    threading.Thread(target=twice).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        life.trainer.train(on_stop=lambda: stops.append(time.monotonic()))
    assert time.monotonic() - start < 2
    assert len(stops) == 1
    free.set()
    assert Life(tmp_path).trainer.progress.step == 0


def test_ctrl_c_while_a_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or whatever else cannot be interrupted: nobody waits for it."""
    free = threading.Event()
    monkeypatch.setattr(dialling, "dial", lambda *_: free.wait(30))
    dialler = Dialler({"w": ("gpu.example", 1)}, None, 1, print, print, print)
    interrupted_after(0.3)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        dialler.require_somebody(30.0)
    dialler.close()
    assert time.monotonic() - start < 2
    free.set()


LOADING = """
import os, signal, sys, time
sys.argv = ["-m"]
import backends
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    except KeyboardInterrupt:
        print("as ever")
if sys.stdin.readline() == "main\\n":
    main()
else:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""


@pytest.mark.parametrize(
    ("when", "status", "said"), [("main", 0, "as ever"), ("loading", 130, "nothing was begun")]
)
def test_ctrl_c_while_a_command_loads(when: str, status: int, said: str) -> None:
    """A line and 130; once its `main` runs, it is that one's affair."""
    ended = subprocess.run(
        [sys.executable, "-c", LOADING], input=f"{when}\n", capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[2], timeout=30, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert ended.returncode == status, ended.stderr
    assert said in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_is_written_by_the_living_is_not_cleared(tmp_path: Path) -> None:
    """Whoever clears up, and whatever it is."""
    with replacing_directory(tmp_path / "adapter") as aside:
        (aside / "file").write_text("x")
        end_replacing(tmp_path)
    assert (tmp_path / "adapter" / "file").read_text() == "x"
