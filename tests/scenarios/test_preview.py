"""`--preview`: what would be trained on, without training."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.nn.base import open_base
from backends.nn.checkpoint import ResumeError, data_tag
from backends.nn.texts import DataError
from backends.options import Parser
from scenarios.finetune import __main__ as finetune
from scenarios.llama1b import __main__ as llama1b
from scenarios.llama1b.run import run_settings, set_up
from scenarios.texts import _own, load_texts

TINY = Path(__file__).parents[2] / "scenarios" / "assets" / "tiny-llama"


def preview(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """`python -m scenarios.llama1b --preview ...`, in this process."""
    monkeypatch.setattr("scenarios.cli.private_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["llama1b", "--preview", *arguments])
    llama1b.main()


def test_a_preview_shows_texts_and_tokens_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was read and left out, then 200 tokens apart; signs of several tokens stay whole."""
    data, out = tmp_path / "texts", tmp_path / "texts" / "run"
    out.mkdir(parents=True)
    (out / "report.md").write_text("own")
    (data / "a.txt").write_text("def f(x):\n    return '日本'\x1b[0m\n" * 50)
    preview(
        monkeypatch, "--weights", str(TINY), "--data", str(data), "--out", str(out),
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "read 1 file, " in said
    assert "left out 1: 1 under --out" in said
    assert "the first 200 tokens" in said
    assert "日" in said
    assert "\ufffd" not in said.rsplit("|", 1)[0]
    assert "\x1b" not in said
    assert "\\n\n" in said
    assert [path.name for path in out.iterdir()] == ["report.md"]


def test_a_preview_of_nothing_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte a token without a model, and Python's own library without a text."""
    preview(monkeypatch)
    said = capsys.readouterr().out
    assert "one token a byte" in said
    assert "Python's own library" in said
    assert "the first 200 tokens" in said


@pytest.mark.parametrize("parse", [finetune.parse, llama1b.parse])
def test_all_places_of_a_run_are_its_own(
    parse: Callable[[list[str]], argparse.Namespace], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever option of the command names a file or folder: that is no text to train on."""
    seen: list[Parser] = []
    real = Parser.parse
    monkeypatch.setattr(Parser, "parse", lambda self, *_: seen.append(self) or real(self, *_))
    parse([f"--data={tmp_path}", "--weights=x", "--preview"])
    paths = [
        action for action in dict.fromkeys(seen[0].options().values())
        if getattr(action.type, "__annotations__", {}).get("return") == "Path"
    ]  # fmt: skip
    assert len(paths) > 5
    args = parse([f"--data={tmp_path}", "--weights=x", "--preview"])
    for action in paths:
        setattr(args, action.dest, tmp_path / action.dest)
    own = set(_own(args, TINY).values())
    assert own == {tmp_path / action.dest for action in paths if action.dest != "data"} | {TINY}


def test_what_cannot_be_trained_on_is_refused_in_a_preview_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same line."""
    (tmp_path / "a.txt").write_bytes("straße".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"error: .*not UTF-8"):
        preview(monkeypatch, "--data", str(tmp_path))


def test_sequences_are_kept_in_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And unknown tokens are said; here there are none."""
    (tmp_path / "a.txt").write_text("The owner keeps the text.\n" * 50)
    args = llama1b.parse(
        ["--real-cpu", "--data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"),
         "--sequence", "32"]
    )  # fmt: skip
    data = load_texts(args, open_base(TINY), apart=True, held_out=0.0)
    assert data.train.shape[1] == 32
    assert data.held_out is None
    assert (tmp_path / "out" / "corpus" / "tokens.int32").exists()
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "run", "refused"),
    [("--rank 3", {"rank": 4}, "rank 4, not 3"), ("--seed 1", {}, "seed 0, not 1"),
     ("", {"data": "other"}, "data: another text"), ("", {"base": "other"}, "base 'other'"),
     ("--sequence 32 --learning-rate 0.5", {}, "learning_rate 0.0002, not 0.5")],
)  # fmt: skip
def test_another_run_leaves_the_tokens_of_the_one_that_is_there(
    words: str, run: dict[str, object], refused: str, tmp_path: Path
) -> None:
    """It is refused before anything is prepared, or replaced; with --fresh it is not."""
    (tmp_path / "a.txt").write_text("The owner keeps the text.\n" * 50)
    out = tmp_path / "out"
    usual = ["--real-cpu", f"--data={tmp_path / 'a.txt'}", f"--weights={TINY}", f"--out={out}",
             "--tokens=64", "--sequence=64", f"--cache={tmp_path / 'cache'}"]  # fmt: skip
    args = llama1b.parse(usual)
    setup = set_up(args)
    found = setup.training.settings(len(setup.data.train)) | run_settings(args, setup.base)
    checkpoints = out / "checkpoints"
    found |= {"data": data_tag(checkpoints, setup.data.train)}
    state = {"step": 1, "losses": [1.0], "gradient_norms": [1.0], "served": []}
    (checkpoints / "step-000001").mkdir()
    place = checkpoints / "step-000001" / "state.json"
    place.write_text(json.dumps(state | {"run": found | {"model": "x"}}))
    set_up(args)  # is the same run
    place.write_text(json.dumps(state | {"run": found | run}))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match=refused):
        set_up(llama1b.parse([*usual, *words.split()]))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    set_up(llama1b.parse([*usual, *words.split(), "--fresh"]))


CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}[assistant] {% endif %}"


def chat_model(place: Path, template: str) -> Path:
    """The tiny Llama with a chat template."""
    place.mkdir()
    for path in TINY.iterdir():
        shutil.copy(path, place)
    (place / "chat_template.jinja").write_text(template)
    return place


def chats(tmp_path: Path) -> Path:
    """Some records of one question and its answer."""
    path = tmp_path / "chats.jsonl"
    record = {
        "messages": [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "a \x1b[31mword"},
        ]
    }
    path.write_text("\n".join([json.dumps(record)] * 5))
    return path


@pytest.mark.parametrize("terminal", [False, True])
def test_three_samples_show_what_is_counted(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In brackets, or in green on a terminal, which obeys nothing of the text itself."""
    model = chat_model(tmp_path / "model", CHAT + ASKS)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: terminal, raising=False)
    preview(monkeypatch, "--weights", str(model), "--data", str(chats(tmp_path)))
    said = capsys.readouterr().out
    assert "loss: on what the assistant says" in said
    begin, end = ("\x1b[32m", "\x1b[0m") if terminal else ("[[", "]]")
    shown = said.partition("stands between tokens")[2].replace("|", "")
    assert shown.count(f"{begin} a \\x1b[31mword") == 3
    assert shown.count(end) == 3
    assert "What is it?" in shown.partition(begin)[0]
    assert said.count("\x1b") == (6 if terminal else 0)


def test_loss_on_all_or_where_answers_cannot_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said, and refused where completions were asked for."""
    model = chat_model(tmp_path / "model", CHAT + ASKS)
    arguments = ["--weights", str(model), "--data", str(chats(tmp_path))]
    preview(monkeypatch, *arguments, "--loss-on", "all")
    assert "loss: on all tokens (as --loss-on all says)" in capsys.readouterr().out
    (model / "chat_template.jinja").write_text("{{ messages | length }}" + CHAT + ASKS)
    preview(monkeypatch, *arguments)
    said = capsys.readouterr().out
    assert "loss: on all tokens (the tokenizer's chat template writes a turn otherwise" in said
    with pytest.raises(SystemExit, match="--loss-on completions: the tokenizer's chat template"):
        preview(monkeypatch, *arguments, "--loss-on", "completions")
    (tmp_path / "a.txt").write_text("plain " * 99)
    arguments[-1] = str(tmp_path / "a.txt")
    with pytest.raises(SystemExit, match="this text holds no conversations"):
        preview(monkeypatch, *arguments, "--loss-on", "completions")


def test_data_are_counted_packed_and_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each said in a line; what is longer than a sequence by much is refused."""
    model = chat_model(tmp_path / "model", CHAT + ASKS)
    path = chats(tmp_path)
    path.write_text(path.read_text() + "\n" + path.read_text().replace("it?", "that?"))
    args = llama1b.parse(
        ["--real-cpu", "--data", str(path), "--out", str(tmp_path / "out"), "--sequence", "64"]
    )
    data = load_texts(args, open_base(model), apart=False)
    assert data.held_out is not None
    assert len(data.held_out) >= 1
    assert data.facts.documents == 10
    said = capsys.readouterr().out
    assert all(line in said for line in data.said)
    told = "\n".join(data.said)
    assert "loss: on what the assistant says" in told
    assert "10 documents" in told
    assert "0.0% of all tokens are cut off" in told
    assert "cannot keep documents apart" in told
    assert "held out: " in told
    assert len(load_texts(args, open_base(model), True, 0.0).train) > len(data.train)
    args.sequence = 8
    with pytest.raises(DataError, match=r"cut off|no conversation has a token"):
        load_texts(args, open_base(model), apart=True)
