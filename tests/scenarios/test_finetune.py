"""`python -m scenarios.finetune`: one's own chats, through interruptions, to an adapter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from backends.ledger import TaintedError
from backends.nn.base import open_base
from backends.nn.checkpoint import data_tag
from backends.nn.marks import APART, UNCOUNTED
from backends.nn.skeleton import build_skeleton
from backends.nn.trainer import Trainer
from scenarios.finetune import __main__ as command
from scenarios.finetune.held import HeldOut, beginnings
from scenarios.finetune.setting import FinetuneError, chosen_linears
from tests.scenarios.commands import ROOT, readable_by_others
from tests.scenarios.spoilt import spoilt_later
from tests.scenarios.worker_process import running

TINY = ROOT / "scenarios" / "assets" / "tiny-llama"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SMALL = {
    "sequence": 64, "batch": 2, "rank": 2, "targets": ["q_proj", "v_proj"], "learning-rate": 1e-2,
    "held-out": 0.2, "evaluate-every": 2, "evaluate-on": 2, "sample-tokens": 4,
}  # fmt: skip
NAMES = ("asyncio", "json", "email", "http", "random", "os", "re", "socket")


@pytest.fixture(scope="module")
def bring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, some chats, and a cache that all tests share."""
    place = tmp_path_factory.mktemp("brought")
    shutil.copytree(TINY, place / "model")
    (place / "model" / "chat_template.jinja").write_text(TEMPLATE)
    asks = "Please show me how a program in this language begins that is going to use {}"
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{asks.format(name)} {number}?"},
                {
                    "role": "assistant",
                    "content": f"import {name}\n\n\nclass C{number}:\n    pass\n"
                    + "\n\n    def f(self, x):\n        pass\n",
                },
            ]
        }
        for number in range(5)
        for name in NAMES
    ]
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    return place


@pytest.fixture
def finetune(
    bring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:  # fmt: skip
    """`python -m scenarios.finetune` in this process: (exit status or None, what it said)."""
    monkeypatch.setattr("scenarios.cli.private_process", lambda: os.umask(0o077))
    before = os.umask(0o022)
    settings: dict[str, Any] = SMALL | {
        "model": str(bring / "model"), "data": str(bring / "chats.jsonl"),
        "cache": str(bring / "cache"), "out": str(tmp_path / "out"),
    }  # fmt: skip

    def run(*words: str, **changed: Any) -> tuple[Any, str]:
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings | changed))
        monkeypatch.setattr(sys, "argv", ["finetune", "--config", str(config), *words])
        try:
            command.main()
            status: Any = None
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return status, f"{said.out}{said.err}"

    yield run
    os.umask(before)


def figures(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


@pytest.mark.slow
def test_chats_to_an_adapter_and_a_page(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would take is said first and holds; the loss falls; the adapter is plain peft's. A
    trace that can no longer be written at the end costs none of it."""
    trace = tmp_path / "traces" / "t.json"
    spoilt_later(monkeypatch, "scenarios.finetune.run", trace, "a directory")
    status, said = finetune(
        "--steps", "3", "--json", str(tmp_path / "f.json"), "--trace", str(trace), steps=9
    )
    assert str(status).startswith("error: "), said
    assert str(trace) in str(status)
    assert "\n" not in str(status)
    assert "loss: on what the assistant says" in said
    for first, then in (
        ("to do: 3 steps", "traffic: about"), ("traffic: about", "preparing the public set-up"),
        ("held-out loss of the base", "step 2: held-out loss"), ("step 2", "adapter: "),
    ):  # fmt: skip
        assert said.index(first) < said.index(then)
    found = figures(tmp_path / "f.json")
    assert [step for step, _ in found["held_out"]] == [0, 2, 3]
    assert found["private_loss"] < found["base_loss"]
    sent = (found["bytes_per_token_up"] + found["bytes_per_token_down"]) * 128 / 1e6
    assert found["cost"]["step_mb"] == pytest.approx(sent, rel=0.03)
    assert found["cost"]["seconds"] > 0
    out = tmp_path / "out"
    assert not readable_by_others(out)
    page = (out / "report.html").read_text()
    assert "Private fine-tuning of model on chats.jsonl" in page
    assert str(tmp_path) not in page
    assert len(found["samples"]) == 2
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, str(out / "adapter"))
    adapted = {name.split(".")[-4] for name, _ in tuned.named_parameters() if "lora_B" in name}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.slow
def test_ctrl_c_then_more_then_fewer_steps(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is there each time, and the held-out losses are those of one run."""
    real, out, stop = HeldOut.look, tmp_path / "out", [2]

    def look(self: HeldOut, model: Any, step: int) -> float:
        if step in stop:
            stop.clear()
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, model, step)

    monkeypatch.setattr(HeldOut, "look", look)
    status, said = finetune(steps=4)
    assert status == 130, said
    assert "stopped after step 2 of 4" in said
    weights = out / "adapter" / "adapter_model.safetensors"
    stopped = weights.read_bytes()
    status, said = finetune("--steps", "3", "--json", str(tmp_path / "f.json"))
    assert status is None, said
    assert "going on after step 2" in said
    found = figures(tmp_path / "f.json")
    assert (len(found["losses"]), found["steps_this_run"]) == (3, 1)
    assert [step for step, _ in found["held_out"]] == [0, 2, 3]
    assert weights.read_bytes() != stopped
    shutil.rmtree(out / "adapter")
    status, said = finetune("--steps", "1", "--json", str(tmp_path / "f.json"))
    assert "3 steps are done, and 1 are asked for" in said
    assert figures(tmp_path / "f.json")["steps_this_run"] == 0
    assert weights.exists()


def test_a_dry_run_prepares_nothing(finetune: Any, tmp_path: Path) -> None:
    """It says what the run would take, and how much of it is for preparing."""
    status, said = finetune("--dry-run", cache=str(tmp_path / "cache"))
    assert status is None, said
    assert "to do: 100 steps of 128 tokens" in said
    assert "for preparing the model, once" in said
    assert "time: about" in said
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


@pytest.mark.parametrize("answer", ["n", EOFError()])
def test_whoever_sits_at_a_terminal_may_decline(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str | Exception
) -> None:
    """After what it takes was said, and before anything is prepared."""

    def ask(question: str) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(type(sys.stdin), "isatty", lambda self: True, raising=False)
    monkeypatch.setattr("builtins.input", ask)
    status, said = finetune(cache=str(tmp_path / "cache"), steps=1)
    assert status is None, said
    assert said.index("time: about") < said.index("not started")
    assert not list((tmp_path / "cache").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"sequence": 35}, "of all tokens would be cut off"),
        ({"targets": "q_proj,z_proj"}, "no linear that workers compute is called 'z_proj'"),
        ({"model": "nobody/nothing"}, "neither a directory here nor a model"),
        ({"rank": 4096}, "give --rank"),
        ({"sample": ["x" * 4000]}, "shorten it, or give fewer --sample-tokens"),
    ],
)
def test_what_cannot_be_is_refused_before_preparing(
    finetune: Any, tmp_path: Path, changed: dict[str, Any], refused: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In one line."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, said = finetune(cache=str(tmp_path / "cache"), steps=1, **changed)
    assert refused in str(status), said
    assert len(str(status).splitlines()) == 1
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def contents(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_another_run_in_the_same_place_is_refused_before_it_spoils_anything(
    finetune: Any, bring: Path, tmp_path: Path
) -> None:
    """Another text, or other settings: nothing is prepared, and the first run's tokens stay."""
    assert finetune(steps=1)[0] is None
    other = tmp_path / "other.jsonl"
    other.write_text((bring / "chats.jsonl").read_text().replace("import", "from"))
    short = tmp_path / "short.jsonl"
    short.write_text((bring / "chats.jsonl").read_text().splitlines()[0])
    before = contents(tmp_path / "out")
    for changed, refused in (
        ({"data": str(other)}, "other settings (data: another text"),
        ({"data": str(other), "rank": 3}, "other settings (rank 2, not 3; alpha 4, not 6; data"),
        ({"sequence": 96, "seed": 1}, "other settings (seed 0, not 1; data: another text"),
        ({"data": str(short), "fresh": True}, "too short to hold any of it out"),
    ):  # fmt: skip
        status, said = finetune(cache=str(tmp_path / "cache"), **{"steps": 1} | changed)
        assert refused in str(status), said
        assert contents(tmp_path / "out") == before
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    status, said = finetune("--dry-run", "--fresh", data=str(other), steps=1)
    assert status is None, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "what"),
    [("loss", KeyboardInterrupt()), ("samples", KeyboardInterrupt()),
     ("loss", FloatingPointError("x")), ("samples", TaintedError("x"))],
)  # fmt: skip
def test_the_adapter_is_there_before_the_last_loss_and_the_samples(
    moment: str, what: BaseException, finetune: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And goes again when the worker that computed those is caught, on whom it rests."""
    real = HeldOut.look

    def fail() -> None:
        if isinstance(what, TaintedError):
            monkeypatch.setattr(Trainer, "require_untainted", lambda self: raised(what))
        raised(what)

    def look(self: HeldOut, model: Any, step: int) -> float:
        if step == 1 and moment == "loss":
            fail()
        return real(self, model, step)

    monkeypatch.setattr(HeldOut, "look", look)
    if moment == "samples":
        monkeypatch.setattr("scenarios.finetune.run.complete", lambda *_: fail())
    status, said = finetune(steps=1)
    adapter = tmp_path / "out" / "adapter"
    if isinstance(what, KeyboardInterrupt):
        assert status == 130, said
        assert f"{adapter} is the adapter" in said
    else:
        assert "error: x" in str(status)
    assert adapter.exists() != isinstance(what, TaintedError)


def raised(what: BaseException) -> None:
    raise what


@pytest.mark.slow
def test_over_a_line_the_time_is_said_once_it_is_probed(
    finetune: Any, bring: Path, tmp_path: Path
) -> None:
    """In a dry run, too, which trains nothing; the line's estimate counts the same bytes."""
    if not list((bring / "cache").glob("llama-thin-*")):
        assert finetune(steps=1)[0] is None
        shutil.rmtree(tmp_path / "out")
    (model,) = (bring / "cache").glob("llama-thin-*")
    kept = tmp_path / "out" / "checkpoints" / "data.key"
    kept.parent.mkdir(parents=True, mode=0o700)
    kept.write_text("of an earlier run")
    with running(model) as worker:
        status, said = finetune(
            "--fresh",
            "--dry-run",
            "--json",
            str(tmp_path / "f.json"),
            worker=[worker.address],
            lanes=2,
        )
    assert status is None, said
    first, then, last = (
        said.index(text)
        for text in ("traffic: about", "the line: ", "with held-out losses and samples: about")
    )
    assert first < then < last
    found = figures(tmp_path / "f.json")
    step_mb = (found["estimate"]["bytes_up"] + found["estimate"]["bytes_down"]) / 100 / 1e6
    assert step_mb == pytest.approx(found["cost"]["step_mb"], rel=0.1)
    assert found["estimate"]["seconds_in_all"] > found["estimate"]["seconds"]
    assert not (tmp_path / "out" / "checkpoints" / "step-000001").exists()
    assert not (tmp_path / "out" / "adapter").exists()
    assert kept.exists()


@pytest.mark.slow
def test_a_base_that_only_guesses_is_not_trained(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate is in the way of the first step."""
    monkeypatch.setattr("backends.nn.gates.evaluate", lambda *_: 9.0)
    status, said = finetune(steps=2)
    assert "the base model's loss on this text is 9.00" in str(status), said
    assert not list((tmp_path / "out" / "checkpoints").glob("step-000001"))
    assert not (tmp_path / "out" / "adapter").exists()


# --- what is typed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("rang: 3", "no option is called 'rang'; did you mean 'rank'?"),
        ("learning_rate: 1", "did you mean 'learning-rate'?"),
        ("rank: 1.5", "argument --rank: '1.5' is no whole number"),
        ("rank: [1, 2]", "rank takes one value, not a list"),
        ("steps: true", "steps takes one value, not true or false"),
        ("fresh: 1", "fresh is true or false, not '1'"),
        ("out:", "out takes one value, not nothing"),
        ("yes: true", "no option is called 'True'"),
        ("config: x", "no option is called 'config'"),
        ("model: a\nweights: b", "'weights' is there under two names"),
        ("a: [", "line 1: it is no YAML"),
        ("steps: 1\nsteps: 2", "it is no YAML (a name is there twice)"),
        ("steps: !!int 0x" + "f" * 5000, "argument --steps"),
        ("<<: {steps: 1}", "no option is called '<<'"),
        ("- a", "it holds no `name: value` lines"),
        ("!!python/object:os.system {}", "it is no YAML"),
        ("[" * 500, "it is no YAML"),
        ("a: " + "x" * (1 << 16), "longer than"),
        ("steps: 3\nepochs: 1", "not allowed with argument"),
        ("tls: certs", "--tls is for a run with --worker"),
        ("rank: 2", "--model is needed"),
        ("model: m", "--data is needed"),
    ],
)
def test_a_file_of_options_is_checked(
    text: str, refused: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in one line, which names what is wrong."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        command.parse(["--config", str(tmp_path / "c.yaml")])
    assert refused in capsys.readouterr().err.splitlines()[-1]


def test_values_are_as_they_are_written(tmp_path: Path) -> None:
    """Not what YAML takes them for: octal numbers, minutes, numbers with another spelling."""
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: 010\ndata: 1_000\nowner-tag: 0123\nseed: 0777\nsample: [12:30, 1.50, 2026-01-01]\n"
    )
    typed = ["--model=010", "--data=1_000", "--owner-tag=0123", "--seed=0777"]
    samples = ["--sample=12:30", "--sample=1.50", "--sample=2026-01-01"]
    told, wanted = command.parse(["--config", str(config)]), command.parse([*typed, *samples])
    assert vars(told) | {"config": None} == vars(wanted)


def test_what_is_typed_wins(tmp_path: Path) -> None:
    """Of lists, and of options that exclude each other, too."""
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: m\ndata: d\nsteps: 7\nrank: 3\nlearning-rate: 1e-4\nfresh: true\n"
        'train-on-all: false\nworker: ["a:1", "b:1"]\ntargets: [q_proj, v_proj]\n'
    )
    args = command.parse([f"--config={config}"])
    assert (args.steps, args.rank, args.alpha, args.learning_rate) == (7, 3, 6, 1e-4)
    assert (args.fresh, args.train_on_all, args.worker) == (True, False, ["a:1", "b:1"])
    assert args.targets == ("q_proj", "v_proj")
    args = command.parse(["--epochs", "2", "--worker=c:1", "--config", str(config), "--weights=w"])
    assert (args.steps, args.epochs, args.worker, args.weights) == (None, 2.0, ["c:1"], "w")


@pytest.mark.parametrize(
    ("words", "micro_batch"),
    [("", 4), ("--lanes=2", 2), ("--lanes=4", 1), ("--sequence=2048", 2), ("--batch=3", 3),
     ("--batch=6 --sequence=1024 --lanes=1", 3), ("--micro-batch=1", 1)],
)  # fmt: skip
def test_passes_fill_what_a_worker_takes(words: str, micro_batch: int) -> None:
    """As few as the lanes need."""
    args = command.parse(["--model=m", "--data=d", *words.split()])
    assert args.micro_batch == micro_batch


@pytest.mark.parametrize(
    ("words", "refused"),
    [("--lanes=5", "more than the 4 sequences"), ("--micro-batch=3", "does not divide"),
     ("--micro-batch=4 --sequence=2048", "2 fit"), ("--micro-batch=2 --lanes=3", "2 passes"),
     ("--steps=1 --epochs=1", "not allowed with"), ("--targets=q,,v", "names of modules")],
)  # fmt: skip
def test_passes_that_cannot_be(
    words: str, refused: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded."""
    with pytest.raises(SystemExit, match="2"):
        command.parse(["--model=m", "--data=d", *words.split()])
    assert refused in capsys.readouterr().err.splitlines()[-1]


# --- parts ----------------------------------------------------------------------------------------


SIGNS = st.tuples(st.integers(2, 99), st.booleans(), st.booleans())
"""A token, whether a document begins with it, and whether it is counted."""


@given(st.lists(st.lists(SIGNS, min_size=16, max_size=16), min_size=1, max_size=4))
def test_workers_are_asked_for_the_same_prompts_whatever_the_text(
    drawn: list[list[tuple[int, bool, bool]]],
) -> None:
    """So many, so long; and of a conversation nothing that is counted, nor of another document."""
    marks = [[t | APART * b | UNCOUNTED * (b or not c) for t, b, c in row] for row in drawn]
    found = beginnings(torch.tensor(marks), 1, 3, 8)
    assert [prompt.shape for prompt in found] == [(1, 8)] * 3
    documents: list[list[tuple[int, bool]]] = []
    for row in drawn:
        for place, (token, begins, counts) in enumerate(row):
            if begins or not place:
                documents.append([])
            documents[-1].append((token, counts and not begins))
    possible = {()}
    for document in documents:
        ids = [token for token, _ in document]
        first = next((place for place, (_, counts) in enumerate(document) if counts), None)
        if first is not None:
            end = first if first > 1 else min(8, len(ids) - 1)
            possible.add(tuple(ids[max(0, end - 8) : end]))
    best = max(map(len, possible))
    for number, prompt in enumerate(found):
        ids = tuple(token for token in prompt[0].tolist() if token != 1)
        assert prompt[0].tolist() == [1] * (8 - len(ids)) + list(ids)
        assert ids in possible
        assert number or len(ids) == best


def test_prompts_have_one_length_and_end_before_answers() -> None:
    """The end of a long question, all of a short one after ends of text, the begin of a text."""
    row = torch.arange(40) | UNCOUNTED
    row[0] |= APART
    row[12:20] = torch.arange(12, 20)  # an answer
    row[20] |= APART
    row[22:24] = torch.arange(22, 24)  # and another, to a question of two tokens
    plain = torch.arange(100, 140)
    found = beginnings(torch.stack((row, plain)), 7, 3, 8)
    assert [prompt.tolist() for prompt in found] == [
        [list(range(4, 12))], [list(range(100, 108))], [[7] * 6 + [20, 21]],
    ]  # fmt: skip


def test_losses_of_damaged_or_other_files_are_not_believed(tmp_path: Path) -> None:
    """And those after the step that a run went back to are dropped."""
    rows, path = torch.zeros(3, 4, dtype=torch.int64), tmp_path / "held-out.json"
    checkpoints = tmp_path / "checkpoints"
    good = {"of": data_tag(checkpoints, rows[:2]), "points": [[0, 5.0], [2, 4.0], [4, 3.0]]}
    for content, points in (
        (good, [(0, 5.0), (2, 4.0)]), (good | {"of": "x"}, []), ({"points": 3}, []),
        (good | {"points": [[0, "x"]]}, []), (good | {"points": [[0, 1e999]]}, []), ([], []),
    ):  # fmt: skip
        path.write_text(json.dumps(content))
        assert HeldOut(rows, 1, 2, checkpoints, done=3).points == points
    assert HeldOut(rows, 1, 2, checkpoints, done=0).points == []


@pytest.mark.parametrize(
    ("change", "believed"),
    [("a token", False), ("what is counted", False), ("how many are asked for", False),
     ("the key", False), ("the order", False), ("what is not asked for", True), ("", True)],
)  # fmt: skip
def test_losses_on_other_sequences_are_not_believed(
    change: str, believed: bool, tmp_path: Path
) -> None:
    """They are a function of what was held out, all of it, and of nothing else of the text."""
    checkpoints = tmp_path / "checkpoints"
    rows, asked = torch.arange(24).reshape(6, 4), 4
    held = HeldOut(rows, 1, asked, checkpoints, done=0)
    held.points = [(0, 5.0)]
    held.keep()
    if change == "a token":
        rows[3, 3] += 1
    elif change == "what is counted":
        rows[0, 1] |= UNCOUNTED
    elif change == "how many are asked for":
        asked = 5
    elif change == "the key":
        shutil.rmtree(checkpoints)
    elif change == "the order":
        rows[[0, 1]] = rows[[1, 0]]
    elif change == "what is not asked for":
        rows[5] += 1
    assert bool(HeldOut(rows, 1, asked, checkpoints, done=3).points) == believed


def test_targets_are_whole_parts_of_names() -> None:
    """Those of one layer too, and the head never."""
    skeleton = build_skeleton(open_base(TINY))
    assert chosen_linears(skeleton, None) == skeleton.adapted
    assert len(chosen_linears(skeleton, ("q_proj", "v_proj"))) == 10
    assert chosen_linears(skeleton, ("layers.1.mlp.up_proj",)) == ["model.layers.1.mlp.up_proj"]
    for wrong in ("proj", "lm_head", "layers.1"):
        with pytest.raises(FinetuneError, match="there are down_proj"):
            chosen_linears(skeleton, (wrong,))
