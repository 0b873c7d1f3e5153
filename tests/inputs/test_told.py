"""What is said, and when: at once for a typing error, before a sweep for one that cannot be, at its
start and end for a run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.startup import COMMANDS, PYTHON
from docs.generate_commands import commands
from scenarios import costs, simulated
from scenarios.llama1b.__main__ import asked
from scenarios.llama1b.__main__ import parse as parse_llama
from scenarios.texts import Data, text_figures, text_line, to_do
from scenarios.whatif import patience, remedies
from scenarios.whatif.__main__ import parse, study_from
from scenarios.whatif.answers import answer
from scenarios.whatif.knobs import KEYS, Prices, Setting, SettingError, changed, values_of
from scenarios.whatif.patience import expected_s, passes, watched
from scenarios.whatif.setting import config_of, measure, world_of
from scenarios.whatif.study import Study
from scenarios.whatif.sweep import Sweep
from sim.device import ProfileError, builtin_names
from sim.models import MODELS
from sim.trace import PARTS
from sim.world import WorldConfig, simulate
from tests.scenarios.commands import ROOT

HEAVY = ("torch", "transformers", "numba", "peft", "matplotlib", "networkx", "scipy", "numpy")
SMALL = {"model": "gpt2", "tokens": 8, "sequence": 8, "lanes": 1, "steps": 1}


# --- at once ----------------------------------------------------------------------------------


def test_how_soon_is_measured_of_every_command_that_people_run() -> None:
    """Its --help, and something typed wrong."""
    told = {" ".join(words[1:]) for words in COMMANDS.values()}
    for name in commands():
        if name.partition(".")[0] != "benchmarks":
            assert f"{name} --help" in told
            of_it = {each for each in told if each.startswith(f"{name} ")}
            assert any("--help" not in each for each in of_it), name


def test_who_is_told_at_once_waits_for_nothing_heavy() -> None:
    """Every command of `benchmarks.startup`, in one process: nothing that takes long is loaded."""
    words = [list(w[1:]) for name, w in COMMANDS.items() if name != PYTHON]
    script = (
        "import importlib, json, sys\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    module = importlib.import_module(words[0])\n"
        "    if hasattr(module, '__path__'):\n"
        "        module = importlib.import_module(words[0] + '.__main__')\n"
        "    sys.argv = words\n"
        "    try:\n"
        "        module.main()\n"
        "        raise AssertionError(words)\n"
        "    except SystemExit:\n"
        "        pass\n"
        f"print('loaded', [m for m in {HEAVY} if m in sys.modules])\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, json.dumps(words)], cwd=ROOT, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert said.stdout.splitlines()[-1:] == ["loaded []"], said.stdout[-2000:] + said.stderr


def test_help_lists_profiles_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    """Of both commands that simulate: every built-in profile and model, every unit."""
    for command in (parse_llama, parse):
        with pytest.raises(SystemExit, match="0"):
            command(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        for name in (*builtin_names(), *MODELS, "kb/s", "Gb/s", "us, ms, s", "0.1%"):
            assert name in said, name


# --- what cannot be is said before anything runs -------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--sweep", "lanes=2,4", "--set", "lanes=4"], "lanes is given twice"),
        (["--sweep", "lanes=2,4", "--sweep", "lanes=1"], "lanes is given twice"),
        (["--sweep", "lanes=2,4", "--set", "rtt=1ms", "--set", "rtt=2ms"], "rtt is given twice"),
        (["--study", "home-office", "--set", "bandwidth=1Gb/s"], "leave --set or --sweep of it"),
        (["--study", "home-office", "--sweep", "bandwidth=1Gb/s,2Gb/s"], "leave --set or --sweep"),
        (["--study", "h200-owners", "--set", "owners=4"], "leave --set or --sweep of it out"),
        (["--study", "worth-it", "--set", "bandwidth=1Gb/s"], "leave --set or --sweep of it out"),
        (["--sweep", "steps=1000000"], "micro-batches to simulate; at most"),
        (["--sweep", "lanes=2000", "--set", "owners=500"], "micro-batches to simulate; at most"),
        (["--sweep", "model=no/such/place"], "or a directory with a config.json"),
        *(
            (["--sweep", f"{knob}=1e400{unit}"], knob)
            for knob, unit in (
                ("bandwidth", "Mb/s"), ("site-bandwidth", "Gb/s"), ("rtt", "ms"), ("jitter", "s"),
                ("loss", ""), ("loss", "%"), ("lanes", ""), ("far-rtt", "us"),
            )
        ),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_end_well_does_not_begin(words: list[str], what: str) -> None:
    """One line that names the knob and what to do."""
    with pytest.raises(SettingError) as refused:
        study_from(parse(words)).settings()
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_says_a_knob_once(tmp_path: Path) -> None:
    """Swept and fixed is neither."""
    place = tmp_path / "s.toml"
    place.write_text('[fixed]\nlanes = 2\n[sweep]\nlanes = "1..4"\n')
    with pytest.raises(SettingError, match=r"lanes is in \[fixed\] and in \[sweep\]"):
        study_from(parse(["--study", str(place)]))


@pytest.mark.parametrize(
    ("words", "error", "what"),
    [
        (["--lanes", "2000"], SystemExit, "2"),
        (["--steps", "1000000"], SystemExit, "2"),
        (["--steps", "999999"], SettingError, "micro-batches to simulate; at most"),
        (["--owners", "100000", "--lanes", "256"], SettingError, "at most"),
        (["--gpu", "h2000"], ProfileError, "no device profile 'h2000'"),
        (["--owner-device", "none.json"], ProfileError, "none.json"),
        (["--model", "/nowhere"], SettingError, "config.json"),
        (["--weights", "x"], SystemExit, "2"),
        (["--data", "x"], SystemExit, "2"),
        (["--rank", "4"], SystemExit, "2"),
        (["--preset", "exact"], SystemExit, "2"),
        (["--real-cpu", "--workers", "2"], SystemExit, "2"),
        (["--real-cpu", "--bandwidth", "1Gb/s"], SystemExit, "2"),
        (["--real-gpu", "--gpu", "h100"], SystemExit, "2"),
        (["--real-cpu", "--model", "gpt2"], SystemExit, "2"),
    ],
)  # fmt: skip
def test_a_simulated_run_that_cannot_be_is_refused(
    words: list[str], error: type[BaseException], what: str, tmp_path: Path
) -> None:
    """Options of the other kind, numbers out of bounds, places where nothing is."""
    with pytest.raises(error, match=what):
        asked([*words, "--out", str(tmp_path)])


# --- progress and an estimate ----------------------------------------------------------------


def test_progress_is_told_from_nothing_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It rises, and ends near the whole."""
    monkeypatch.setattr("sim.world._TOLD_EVERY", 50)
    told: list[float] = []
    simulate(world_of(changed(Setting(), SMALL | {"lanes": 4, "owners": 2})), told.append)
    assert len(told) > 5
    assert told == sorted(told)
    assert told[0] < 0.2
    assert 0.9 < told[-1] <= 1


def test_an_estimate_counts_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial's time for each micro-batch of what is long; nothing is tried for what is short."""
    monkeypatch.setattr(patience, "_pass_s", lambda setting: 0.5)
    setting = changed(Setting(), SMALL | {"lanes": 50, "owners": 4, "steps": 3})
    assert passes(setting) == 4 * 50 * 4  # the step that several owners warm up with, too
    assert expected_s([setting]) == 400
    assert expected_s([setting, setting], processes=2) == 400
    assert expected_s([changed(Setting(), SMALL)]) == 0


def test_a_trial_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has done by then is counted for the whole; a short one is what it took."""
    clock = iter(float(n) for n in range(10_000))
    monkeypatch.setattr(patience.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(patience, "_TRIAL_S", 3.0)

    def begun(config: WorldConfig, told: Any) -> None:
        for share in range(1, 101):
            told(share / 100)

    monkeypatch.setattr(patience, "simulate", begun)
    setting = changed(Setting(), SMALL | {"lanes": 100})
    assert patience._pass_s(setting) == pytest.approx(5 / (0.04 * 100))
    monkeypatch.setattr(patience, "_TRIAL_S", 1e9)
    assert patience._pass_s(setting) == pytest.approx(101 / 100)


def test_a_long_simulation_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of either command, before it begins."""
    for module in ("scenarios.simulated", "scenarios.whatif.sweep"):
        monkeypatch.setattr(f"{module}.expected_s", lambda *_: 90.0)
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    figures = simulated.run(asked([*words, "--out", str(tmp_path)]))
    assert "1 micro-batches to simulate: about 90 s" in capsys.readouterr().out
    assert figures["remedies"] == []  # eight times as long: not tried
    study = Study("t", "", SMALL, {"lanes": [1]})
    Sweep(study, Prices(), 1, tmp_path).run()
    assert "about 90 s to simulate" in capsys.readouterr().out


# --- the answer first, with its cause and what would help ---------------------------------------


def test_the_answer_stands_before_what_it_rests_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cause, parts, remedies; then assumptions."""
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    figures = simulated.run(asked([*words, "--rtt=2s", "--out", str(tmp_path)]))
    simulated.print_report(figures)
    simulated.print_assumptions(figures)
    said = capsys.readouterr().out
    order = [
        said.index(part)
        for part in ("s step is latency", "a step waits for", "half the round trip", "it rests on",
                     "assumed: ")
    ]  # fmt: skip
    assert order == sorted(order)
    assert len(said[: order[0]].splitlines()) < 5


@pytest.mark.parametrize(
    ("changes", "words", "part"),
    [
        ({"rtt_s": 2.0, "bandwidth_bps": 1e10}, "half the round trip", "latency"),
        ({"rtt_s": 0.0, "bandwidth_bps": 1e6}, "twice the line", "up"),
    ],
)
def test_advice_follows_from_what_changes_the_figure(
    changes: dict[str, Any], words: str, part: str
) -> None:
    """The same setting far away and behind a thin line: other remedies, both true."""
    setting = replace(changed(Setting(), SMALL), **changes)
    row = measure(setting, Prices())
    assert max(PARTS, key=lambda p: row[f"path_{p}"]) == part
    found = remedies.remedies(setting)
    best = next(r for r in found if "lanes" not in r.words and "head" not in r.words)
    assert best.words.startswith(words)
    after = replace(setting, rtt_s=setting.rtt_s / 2)
    if part == "up":
        after = replace(setting, bandwidth_bps=2 * setting.bandwidth_bps)
    again = measure(after, Prices())
    assert best.factor == pytest.approx(again["tokens_per_s_owner"] / row["tokens_per_s_owner"])
    assert any(words in line for line in remedies.lines(found))
    assert "nothing" in remedies.lines([replace(r, factor=1.0) for r in found])[0]


def test_a_knob_that_hardly_matters_is_not_said_to() -> None:
    """20 ms against none: the round trip, not the line."""
    study = Study(
        "t", "", SMALL, {"rtt": [0.0, 0.2], "bandwidth": [1e10, 1e11]}, answer={"kind": "effects"}
    )
    rows = [measure(setting, Prices()) for setting in study.settings()]
    told = answer(study, rows).headline.partition("What matters: ")[2]
    matter, _, hardly = told.partition("; what hardly does: ")
    assert matter.startswith("rtt x")
    assert "bandwidth" not in matter
    assert hardly.startswith("bandwidth x1.0")


# --- a model of one's own -----------------------------------------------------------------------


def test_an_own_config_is_simulated_as_the_same_shape_built_in(tmp_path: Path) -> None:
    """Within a hundredth, in step, traffic and parts; refused where it is no causal model."""
    own, other = tmp_path / "own", tmp_path / "other"
    MODELS["gpt2"]().save_pretrained(own)
    rows = [
        measure(changed(Setting(), SMALL | {"model": model}), Prices())
        for model in ("gpt2", *map(str, values_of("model", str(own))))
    ]
    for name in ("step_p50_s", "gb_per_step", "tokens_per_s_owner", "clear_tokens_per_s"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.01), name
    assert replace(Setting(), model=str(own)).label == "own on H200"
    larger = MODELS["gpt2"]()
    larger.n_layer *= 2
    larger.save_pretrained(other)
    twice = measure(changed(Setting(), SMALL | {"model": str(other)}), Prices())
    assert twice["gb_per_step"] > 1.5 * rows[0]["gb_per_step"]
    (own / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(ValueError, match="encoder-decoder"):
        config_of(str(own))


# --- a real run ------------------------------------------------------------------------------


def test_text_steps_and_epochs_are_said() -> None:
    """Before and after, with the same numbers."""
    import torch

    data = Data(torch.zeros(8, 4, dtype=torch.long))  # type: ignore[arg-type]
    data.facts.documents, data.facts.tokens = 3, 1234
    assert to_do(6, 2, 4, 8) == "to do: 6 steps of 8 tokens, 1.5 times through 8 sequences"
    assert to_do(1, 2, 4, 8).startswith("to do: 1 step of")
    f = text_figures(data, 6, 2) | {"losses": [1.0] * 6}
    assert text_line(f).endswith(
        "3 documents, 1,234 tokens; 6 steps, 1.5 times through 8 sequences"
    )


@pytest.mark.parametrize(
    ("used", "known", "said"),
    [
        ((31.0, 8.0, 4.0, 4.0, 1), {}, "own layers: 23 s of 31 s a step, of it 50 % head and loss"),
        ((31.0, 8.0, 4.0, 4.0, 1), {}, "--lm-head remote"),
        ((31.0, 8.0, 4.0, 4.0, 1), {"lm_head": "remote", "head_share": None}, "more cores on this"),
        ((10.0, 9.0, 8.0, 1.0, 1), {"micro_batch_tokens": 64}, "micro-batches of 256 tokens"),
        ((10.0, 36.0, 32.0, 1.0, 4), {}, "the owner's cipher: 8 s of 10 s"),
        ((10.0, 9.0, 1.0, 8.0, 1), {}, "a worker with a GPU"),
        ((10.0, 9.0, 1.0, 8.0, 1), {"elsewhere": True}, "one more --worker"),
        ((10.0, 9.0, 1.0, 1.0, 1), {"elsewhere": True}, "the line: 7 s of 10 s a step; more --lan"),
        ((10.0, 9.0, 1.0, 1.0, 1), {}, "the hand-over between threads"),
    ],
)  # fmt: skip
def test_the_largest_cost_and_what_would_lower_it(
    used: tuple[float, float, float, float, int], known: dict[str, Any], said: str
) -> None:
    """Each part, here and elsewhere."""
    base = {"lm_head": "local", "preset": "thin", "micro_batch_tokens": 256, "elsewhere": False}
    found = costs.costs(*used)
    assert sum(found.values()) == pytest.approx(used[0])
    assert said in costs.largest_line(found, base | {"head_share": 0.5} | known)


def test_what_is_watched_is_what_is_simulated() -> None:
    """A bar changes nothing."""
    config: WorldConfig = world_of(changed(Setting(), SMALL))
    assert watched(config).steps == simulate(config).steps
    assert set(KEYS) >= {"model", "gpu"}
