"""What-if studies and the simulated run: what people write, what comes out, what is refused."""

from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenarios import simulated
from scenarios.llama1b import __main__ as llama1b
from scenarios.llama1b.world import OPTIONS
from scenarios.timeline import busy_s
from scenarios.whatif import quantities, running
from scenarios.whatif.__main__ import parse, study_from
from scenarios.whatif.answers import answer
from scenarios.whatif.checks import require_sound
from scenarios.whatif.clear import clear_speed, needed_gb
from scenarios.whatif.knobs import (
    KEYS,
    OF_ELSEWHERE,
    Prices,
    Setting,
    SettingError,
    changed,
    values_of,
)
from scenarios.whatif.patience import expected_s
from scenarios.whatif.quantities import Form
from scenarios.whatif.running import prepare, run_all
from scenarios.whatif.setting import config_of, measure, workload_for
from scenarios.whatif.study import Study, load_study, study_names
from scenarios.whatif.sweep import csv_text, table
from sim.device import DeviceProfile, Origin, ProfileError
from sim.models import MODELS
from sim.trace import PARTS, Span, critical_path, read_perfetto
from sim.workload import Local
from sim.world import WorldConfig, WorldError, simulate
from tests.scenarios.commands import ROOT, interrupt, run
from tests.scenarios.spoilt import SPOILT, spoilt_later

TINY = ROOT / "scenarios" / "assets" / "tiny-llama"
SMALL = {"model": "gpt2", "tokens": 8, "steps": 1}
RATE = Form(quantities.bandwidth_bps, quantities.show_bandwidth)
COUNT = Form(quantities.count, whole=True)


def size_of(png: Path) -> tuple[int, int]:
    """Width and height of a picture, which must not be a few blank pixels."""
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000
    width, height = struct.unpack(">II", data[16:24])
    return int(width), int(height)


# --- what people write ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knob", "text", "values"),
    [
        ("bandwidth", "10Mb/s, 100 Mb/s,1Gb/s", [1e7, 1e8, 1e9]),
        ("lanes", "1..4", [1, 2, 3, 4]),
        ("lanes", "1..8 x4", [1, 2, 4, 8]),
        ("lanes", "1,2..4,2", [1, 2, 3, 4]),
        ("rtt", "1ms..100ms x3", [0.001, 0.01, 0.1]),
        ("rtt", "0ms..100ms x3 lin", [0, 0.05, 0.1]),
        ("loss", "0,0.1%,0.02", [0, 0.001, 0.02]),
        ("placement", "spread,by-layer", ["spread", "by-layer"]),
    ],
)
def test_values_are_read(knob: str, text: str, values: list[Any]) -> None:
    """Lists and ranges, with units."""
    assert values_of(knob, text) == pytest.approx(values) if knob != "placement" else (
        values_of(knob, text) == values
    )  # fmt: skip


@pytest.mark.parametrize(
    ("knob", "text", "parts"),
    [
        ("bandwidth", "100MB/s", ["bandwidth", "100MB/s", "Mb/s"]),
        ("bandwidth", "100", ["bandwidth", "100", "Gb/s"]),
        ("rtt", "1ms..100ms", ["rtt", "x5"]),
        ("rtt", "0ms..100ms x5", ["rtt", "lin"]),
        ("lanes", "0", ["lanes", "'0'", "at least 1"]),
        ("lanes", "8..1", ["lanes", "8..1", "upwards"]),
        ("loss", "100%", ["loss", "100%"]),
        ("model", "llama-9", ["model", "llama-9", "llama-3.2-1b", "gpt2"]),
        ("lane", "1", ["'lane'", "lanes", "bandwidth"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(knob: str, text: str, parts: list[str]) -> None:
    """The knob, the value, and what it may be."""
    with pytest.raises(SettingError) as error:
        values_of(knob, text)
    assert all(part in str(error.value) for part in parts), error.value


@given(st.floats(1e3, 1e13))
def test_a_shown_bandwidth_can_be_read_again(bps: float) -> None:
    """To three digits."""
    assert RATE.read(quantities.show_bandwidth(bps)) == pytest.approx(bps, rel=5.1e-3)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(2, 12))
def test_ranges_begin_and_end_where_they_say(first: int, more: int, count: int) -> None:
    """Rising, without repeats, with both ends."""
    values = COUNT.values(f"{first}..{first + more} x{count}")
    assert values[0] == first
    assert values[-1] == first + more
    assert values == sorted(set(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "halves"}, "placement='halves': it is one of spread"),
        ({"sites": 2}, "sites=2 needs as many workers"),
        ({"tokens": 300}, "tokens=300 is no multiple of sequence=256"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each by name."""
    with pytest.raises(SettingError, match=message):
        changed(Setting(), changes)


# --- studies --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", study_names())
def test_the_smallest_setting_of_every_study_runs(name: str) -> None:
    """They are read, ask a question, and can be simulated and answered."""
    study = load_study(name)
    assert study.question.endswith("?")
    assert len(study.settings()) == len(set(study.settings()))
    few = [] if "lanes" in study.sweep else ["lanes=1"]
    small = study.with_sweeps([], ["tokens=32", "model=gpt2", *few])
    ends = {knob: [values[0], values[-1]] for knob, values in small.sweep.items()}
    ends["owners"] = [1, 2] if "owners" in ends else []
    small = replace(small, sweep={k: v for k, v in ends.items() if v}, answer={}, plot={})
    list(prepare(small.settings()))
    rows = [measure(setting, small.prices) for setting in small.settings()]
    assert answer(small, rows).headline


def test_the_home_office_study_has_200_settings() -> None:
    """The speed that is promised is promised for as many."""
    assert len(load_study("home-office").settings()) >= 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sweep]\nlanes = [1, 'x']", "lanes: 'x' is no whole number"),
        ("[sweeps]\nlanes = [1]", "unknown section 'sweeps'; there are title"),
        ("[fixed]\nlanes = [1, 2]", r"\[fixed\] lanes: one value"),
        ("[prices]\ngpu = 3", r"\[prices\] gpu = 3: .*gpu-hour"),
        ("[sweep\n", "study.toml"),
    ],
)
def test_a_bad_study_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """With the file's name and what is wrong in it."""
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(SettingError, match=message) as error:
        load_study(str(path))
    assert "study.toml" in str(error.value)


def test_the_command_line_goes_before_the_study() -> None:
    """--sweep and --set take a knob's place, wherever the study had it."""
    study = load_study("home-office").with_sweeps(["gpu=l4,h200"], ["lanes=2"])
    assert study.sweep["gpu"] == ["l4", "h200"]
    assert study.fixed["lanes"] == 2
    assert "gpu" not in study.fixed
    assert "lanes" not in study.sweep


def test_an_unknown_profile_is_named_before_anything_runs() -> None:
    """With the knob and the choices."""
    with pytest.raises(SettingError, match=r"gpu='b100': .*h200"):
        list(prepare([changed(Setting(), SMALL | {"gpu": "b100"})]))
    with pytest.raises(SettingError, match=r"gpu='mine.json'.*--price-gpu-hour"):
        Prices().of_gpu("mine.json")


def test_all_processes_give_the_same_rows_as_one() -> None:
    """In whatever order they come."""
    settings = [changed(Setting(), SMALL | {"lanes": lanes}) for lanes in (1, 2, 3)]
    list(prepare(settings))
    one, two = (dict(run_all(settings, Prices(), processes)) for processes in (1, 2))
    assert one == two
    assert sorted(one) == [0, 1, 2]
    assert one[2]["tokens_per_step"] == 24


# --- rows and answers -----------------------------------------------------------------------


def test_a_row_adds_up() -> None:
    """Speeds, traffic and prices of one row agree with each other."""
    setting = changed(Setting(), SMALL | {"owners": 2, "lanes": 2, "loss": 0.0001})
    row = measure(setting, Prices(gpu_hour=3.6, gb_out=0.1, mbps_month=0.0))
    assert row["tokens_per_step"] == 16
    assert row["step_p50_s"] <= row["step_p99_s"]
    assert row["tokens_per_s_gpu"] == pytest.approx(2 * row["tokens_per_s_owner"])
    assert sum(row[f"path_{part}"] for part in PARTS) == pytest.approx(1)
    assert row["gb_per_million_tokens"] == pytest.approx(row["gb_per_step"] / 16 * 1e6)
    hours = 1e6 / row["tokens_per_s_gpu"] / 3600
    traffic = row["gb_down_per_step"] / 16 * 1e6 * 0.1
    assert row["cost_per_million_tokens"] == pytest.approx(3.6 * hours + traffic)
    assert row["resent"] == 0


def row_of(lanes: int, bandwidth: float, speed: float, **more: Any) -> dict[str, Any]:
    """A made-up row."""
    base = {key.field: getattr(Setting(), key.field) for key in KEYS.values()}
    parts = {f"path_{part}": 0.2 for part in PARTS} | {"path_up": 0.6}
    loads = {"line_up_busy": 0.95, "line_down_busy": 0.3, "site_busy": 0, "gpu_utilisation": 0.01}
    costs = {"cost_gpu": 1.0, "cost_traffic": 2.0, "cost_line": 3.0}
    made = {"tokens_per_s_owner": speed, "step_p50_s": 100 / speed, "step_p99_s": 120 / speed}
    made |= {"cost_per_million_tokens": 1000 / speed}
    return base | parts | loads | costs | made | {"lanes": lanes, "bandwidth_bps": bandwidth} | more


ROWS = [row_of(n, b * 1e6, s) for n, b, s in ((1, 1, 2), (1, 2, 4), (2, 1, 3), (2, 2, 6))]
GRID = Study("t", "?", {}, {"lanes": [1, 2], "bandwidth": [1e6, 2e6]})


def test_effects_name_the_best_and_what_matters() -> None:
    """Bandwidth doubles the made-up speed, lanes add half."""
    found = answer(GRID, ROWS)
    assert found.headline.startswith("At best 6 tokens/s: the owner's line is 95 % full upwards")
    assert "bandwidth x2, lanes x1.5" in found.headline
    assert found.mark == {"lanes": 2, "bandwidth": 2e6}
    at = replace(GRID, answer={"kind": "effects", "at": {"bandwidth": "1Mb/s"}})
    assert "At best 3 tokens/s with bandwidth 1 Mb/s" in answer(at, ROWS).headline
    assert "bandwidth 2 Mb/s x2" in answer(at, ROWS).headline


def test_until_finds_the_last_value_before_the_factor() -> None:
    """120, 60 x 2, ... made of speeds 1, 0.6, 0.4."""
    study = Study("t", "?", {}, {"owners": [1, 4, 8]}, answer={"kind": "until", "knob": "owners"})
    rows = [row_of(1, 1e6, speed, owners=n) for n, speed in ((1, 1.0), (4, 0.6), (8, 0.4))]
    found = answer(study, rows)
    assert found.headline.startswith("4 owners until the slowest steps (p99) take x2")
    assert found.mark == {"owners": 4}
    assert "x2.50" in found.text
    assert answer(study, rows[:2]).headline.startswith("4 owners and more")


SITE = Study(
    "t", "?", {}, {"owners": [1, 100], "workers": [1, 4], "site-bandwidth": [1e9, 1e10, 1e11]},
    answer={"kind": "buy", "knobs": ["workers", "site-bandwidth"], "per": "owners"},
)  # fmt: skip


def test_buying_takes_what_helps_most_until_nothing_does() -> None:
    """For one owner nothing; for a hundred first the line, as far as it helps, then GPUs."""

    def row(setting: Setting) -> dict[str, Any]:
        line_s = setting.owners / (setting.site_bps / 1e9)
        gpu_s = 0.1 * setting.owners / setting.workers
        step_s = max(50.0, line_s + gpu_s + 45)
        zero = [f"path_{part}" for part in PARTS]
        zero += ["line_up_busy", "line_down_busy", "site_busy", "gpu_utilisation"]
        facts = vars(setting) | dict.fromkeys(zero, 0.0)
        return facts | {"step_p50_s": step_s, "cost_per_million_tokens": 1}

    require_sound(SITE)
    found = answer(SITE, [row(setting) for setting in SITE.settings()])
    one, many = found.facts["purchases"]
    assert (one["owners"], one["steps"]) == (1, [])
    assert [(step["buy"], step["to"]) for step in many["steps"]] == [
        ("site-bandwidth", 1e10), ("site-bandwidth", 1e11), ("workers", 4),
    ]  # fmt: skip
    assert many["steps"][0]["better"] == pytest.approx(155 / 65)
    assert "100 owners: site-bandwidth 10 Gb/s (x2.4)" in found.headline
    assert [(x["buy"], x["to"], x["better"]) for x in one["not_worth"]] == [
        ("workers", 4, 1.0), ("site-bandwidth", 1e10, 1.0),
    ]  # fmt: skip
    assert "not worth it: workers 4 x1, site-bandwidth 10 Gb/s x1" in found.text
    assert not many["not_worth"]  # all is bought
    fixed = SITE.with_sweeps([], ["workers=4"])
    require_sound(fixed)
    assert answer(fixed, [row(setting) for setting in fixed.settings()]).facts["purchases"]


def test_a_large_model_is_announced_with_few_owners_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long is products: a step of a larger model has more of them."""
    monkeypatch.setattr("scenarios.whatif.patience._pass_s", lambda setting: 1.0)
    for model, announced in (("llama-3.2-1b", 0), ("llama-3.1-8b", 64)):
        fixed = {"model": model, "tokens": 8, "lanes": 1, "steps": 1}
        assert expected_s(Study("t", "?", fixed, {"owners": [32]}).settings()) == announced


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knobs": ["workers"]}, "site-bandwidth varies too"),
        ({"knobs": []}, "a list of knobs"),
        ({"knobs": ["gpus", "site-bandwidth"]}, "'gpus' is no knob"),
        ({"per": "owner"}, "it is no knob"),
        ({"least": 1.0}, "above 1"),
    ],
)
def test_a_purchase_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is simulated."""
    with pytest.raises(SettingError, match=message):
        require_sound(replace(SITE, answer={**SITE.answer, **options}))


def test_cheaper_compares_doublings() -> None:
    """Cost is 1000 / speed: bandwidth halves it, lanes take a third off."""
    study = replace(GRID, answer={"kind": "cheaper", "one": "lanes", "other": "bandwidth"})
    found = answer(study, ROWS)
    assert "First more bandwidth; doubling bandwidth takes 50 % off" in found.headline
    assert "doubling lanes 33 %" in found.headline
    assert "first bandwidth (-50 %, the other -33 %)" in found.text


def test_against_tells_the_worst_and_the_remedy() -> None:
    """The last value of a knob against its first."""
    study = replace(
        GRID,
        answer={"kind": "against", "knob": "bandwidth", "value": "step_p50_s", "remedy": "lanes"},
    )
    rows = [*ROWS[:3], row_of(2, 2e6, 3.3)]
    head = answer(study, rows).headline
    assert "median step -50 % at worst, only -9 % with lanes 2" in head


def worth_row(bps: float, ratio: float, fits: bool = True, **more: Any) -> dict[str, Any]:
    """Private at `ratio` times 10 tokens/s."""
    told = {"clear_tokens_per_s": 10.0, "private_over_clear": ratio, "clear_fits": fits}
    return row_of(1, bps, 10 * ratio, clear_memory_gb=9.0, **told, **more)


def test_worth_reads_off_where_private_overtakes() -> None:
    """Between two lines in proportion, never, always, or where clear has no room; best of lanes."""
    study = Study("t", "?", {}, {"bandwidth": [1e6, 1e8]}, answer={"kind": "worth"})
    crossing = [worth_row(1e6, 0.1), worth_row(1e8, 10.0), worth_row(1e8, 0.2)]
    found = answer(study, crossing)
    assert found.headline == "Private is faster: on cpu-2core: llama-3.2-1b from 10 Mb/s on"
    (case,) = found.facts["worth"]
    assert case["break_even_bps"] == pytest.approx(1e7)
    assert case["private_most"] == 100
    assert "clear 10 tokens/s (9 of 16 GB)" in found.text
    assert "2 bytes a weight" in found.text
    for ratios, fits, verdict in (
        ((0.1, 0.9), True, "never"), ((1.0, 2.0), True, "always"), ((0.1, 0.9), False, "only"),
    ):  # fmt: skip
        rows = [worth_row(1e6, ratios[0], fits), worth_row(1e8, ratios[1], fits)]
        assert answer(study, rows).facts["worth"][0]["verdict"] == verdict
    two = [*crossing, worth_row(1e6, 0.1, owner_device="l4")]
    assert answer(study, two).headline.endswith("from 10 Mb/s on; on L4: llama-3.2-1b never")


def test_the_clear_run_by_hand() -> None:
    """Layers and products one after the other, on a device without overhead or memory's limits."""
    quick = {"local": 0.0, "update": 0.0}
    origin = Origin("datasheet", "test", "2026-01-01")
    owner = DeviceProfile("d", origin, 1.0, {"float": 1e9}, 1e30, quick)
    load = workload_for(changed(Setting(), SMALL))
    layers = sum(
        part.operations.get("float", 0.0)
        for item in load.lane if isinstance(item, Local) for part in item.parts
    )  # fmt: skip
    linears = sum(8 * m.in_features * m.out_features for m in load.linears)
    update = load.update.operations.get("float", 0.0)
    seconds = (2 * (layers + linears) + update) / 1e9
    assert clear_speed(load, 2, owner) == pytest.approx(16 / seconds)
    kept = 12 * (768 + 2304 + 2 * 768 + 2 * (768 + 3072)) + 2 * 50257
    wanted = 2 * 124_439_808 + 4 * 8 * kept
    assert needed_gb(MODELS["gpt2"](), load) == pytest.approx(wanted / 1e9)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_size_of_a_large_model_takes_no_room_for_its_weights() -> None:
    """Not even room that is never touched: a process that has reserved more than the machine has
    cannot be forked."""

    def reserved_gb() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmSize:")[2].split()[0]) / 1e6

    config, load = config_of("llama-3.1-70b"), workload_for(changed(Setting(), SMALL))
    before = reserved_gb()
    assert needed_gb(config, load) > 140
    assert reserved_gb() - before < 10


def test_an_auto_head_is_the_better_of_both() -> None:
    """And the row says which."""
    rows = {
        head: measure(changed(Setting(), SMALL | {"head": head}), Prices())
        for head in ("local", "remote", "auto")
    }
    remote = rows["remote"]["step_p50_s"] < 0.95 * rows["local"]["step_p50_s"]
    best = rows["remote" if remote else "local"]
    assert rows["auto"] == best | {"head": "auto"}
    assert rows["auto"]["head_used"] == best["head"]


def test_an_answer_of_no_kind_is_refused() -> None:
    """And so are options it does not know."""
    with pytest.raises(SettingError, match="kind='vibes': it is one of effects"):
        answer(replace(GRID, answer={"kind": "vibes"}), ROWS)
    with pytest.raises(SettingError, match="kind 'until'"):
        answer(replace(GRID, answer={"kind": "until", "colour": 1}), ROWS)


def test_tables_hold_failures_too() -> None:
    """A setting whose training cannot go on keeps its row."""
    rows = [
        measure(changed(Setting(), SMALL), Prices()),
        {key.field: 2 for key in KEYS.values()} | {"lanes": 2, "error": "no worker left"},
    ]
    study = Study("t", "?", {}, {"lanes": [1, 2]})
    text = table(study, rows)
    assert "no worker left" in text
    assert len(text.splitlines()) == 3
    assert len(list(csv.DictReader(csv_text(rows).splitlines()))) == 2


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_busy_time_is_the_union(pairs: list[tuple[int, int]]) -> None:
    """Counted second by second."""
    spans = [Span("a", "b", start, start + length) for start, length in pairs]
    slow = {s for a, n in pairs for s in range(a, a + n) if 5 <= s < 40}
    assert busy_s(spans, 5, 40) == pytest.approx(len(slow))


def test_errors_of_a_world_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting that cannot be trained does not end a sweep."""

    def hopeless(*_: object) -> dict[str, Any]:
        raise WorldError("owner0: no worker left")

    monkeypatch.setattr("scenarios.whatif.running.measure", hopeless)
    ((_, row),) = run_all([changed(Setting(), SMALL)], Prices(), 1)
    assert row["error"] == "owner0: no worker left"
    assert row["lanes"] == 4
    assert answer(GRID, [row]).headline == "nothing could be trained"
    assert issubclass(ProfileError, ValueError)


# --- as people run them ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_leaves_table_picture_and_figures(tmp_path: Path) -> None:
    """One knob, two knobs, three: each with its picture."""
    out, figures = tmp_path / "out", tmp_path / "f.json"
    text = run(
        "scenarios.whatif", "--sweep", "lanes=1,2", "--sweep", "bandwidth=1Mb/s,1Gb/s",
        "--sweep", "rtt=1ms,50ms", "--set", "model=gpt2", "--set", "tokens=8", "--out", str(out),
        "--json", str(figures), "--price-gpu-hour", "2",
    )  # fmt: skip
    assert "NOT MEASURED" in text
    assert "$2 a GPU hour" in text
    found = json.loads(figures.read_text())
    assert len(found["rows"]) == 8
    assert found["complete"]
    assert found["elapsed_s"] > 0
    assert found["headline"] in text
    assert len(list(csv.DictReader((out / "rows.csv").open()))) == 8
    assert json.loads((out / "rows.json").read_text())["rows"] == found["rows"]
    assert min(size_of(out / "picture.png")) > 300
    run("scenarios.whatif", "--sweep", "lanes=1,2", "--set", "model=gpt2", "--set", "tokens=8",
        "--out", str(out))  # fmt: skip
    assert min(size_of(out / "picture.png")) > 300


def test_what_is_no_sweep_is_refused() -> None:
    """Nothing to sweep, and a knob that is none."""
    for words, told in (([], "say what to sweep"), (["--sweep", "lane=1"], "no knob 'lane'")):
        with pytest.raises(SettingError, match=told):
            study_from(parse(words))


@pytest.mark.slow
def test_an_interrupted_sweep_keeps_what_it_has(tmp_path: Path) -> None:
    """Ctrl-C: exit status 130, whole files, and how much is in them."""
    text = interrupt(
        "scenarios.whatif", "--sweep", "lanes=1,2", "--sweep", "rtt=1ms..2ms x200",
        "--set", "model=gpt2", "--set", "tokens=8", "--out", str(tmp_path), seen=" 1/202",
    )  # fmt: skip
    assert "interrupted:" in text
    found = json.loads((tmp_path / "rows.json").read_text())
    assert not found["complete"]
    assert 1 <= len(found["rows"]) < 202
    assert not (tmp_path / "picture.png").exists()


def slow_but_for_two_owners(setting: Setting, prices: Prices) -> dict[str, object]:
    """A row, for other processes."""
    time.sleep(0 if setting.owners == 2 else 600)
    return {}


def test_an_interrupted_sweep_waits_for_no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes minutes ends at once when nobody wants its row any more."""
    monkeypatch.setattr(running, "_row", slow_but_for_two_owners)
    settings = [Setting(model="gpt2", owners=owners) for owners in (1, 2, 1, 1)]
    rows = running.run_all(settings, Prices(), 2)
    assert next(rows) == (1, {})
    begin = time.monotonic()
    rows.close()
    assert time.monotonic() - begin < 60
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_the_simulated_run_says_what_it_waits_for(tmp_path: Path) -> None:
    """No flag: a picture, a trace whose spans make up the step, and honest words."""
    out, figures = tmp_path / "out", tmp_path / "f.json"
    text = run(
        "scenarios.llama1b", "--model", "gpt2", "--tokens", "16", "--sequence", "16", "--lanes",
        "2", "--network", "home", "--rtt", "50ms", "--out", str(out), "--json", str(figures),
    )  # fmt: skip
    found = json.loads(figures.read_text())
    assert "H200: data sheet" in text
    assert "NOT MEASURED" in text
    assert "100 Mb/s, 50 ms round trip" in text
    assert found["tokens_per_step"] == 32
    assert min(size_of(out / "timeline.png")) > 600
    spans = read_perfetto(out / "trace.json")
    steps = [s for s in spans if s.kind == "step"]
    assert len(steps) == 2
    parts = critical_path(spans, steps[-1].start_s, steps[-1].end_s)
    # Not the median of both: a connection is slower while it starts.
    taken_s = steps[-1].end_s - steps[-1].start_s
    assert sum(parts.values()) == pytest.approx(taken_s, rel=1e-3)
    assert taken_s == pytest.approx(found["step_p50_s"], rel=0.05)
    assert "error: --lanes" not in text
    assert "error: bandwidth: '1MB/s'" in run("scenarios.llama1b", "--bandwidth", "1MB/s", code=1)


@pytest.mark.slow
def test_a_real_run_writes_the_same_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same tracks and kinds as a simulated one; its critical path is the step. Where it cannot be
    written, adapter and figures are there before that is told."""
    trace, told, adapter = (tmp_path / name for name in ("traces/t.json", "f.json", "out/adapter"))
    monkeypatch.setattr("scenarios.cli.private_process", lambda: None)
    line = [
        "llama1b", "--real-cpu", "--weights", str(TINY), "--tokens", "64", "--sequence", "64",
        "--steps", "2", "--lanes", "2", "--out", str(tmp_path / "out"), "--cache",
        str(tmp_path / "cache"), "--trace", str(trace), "--json", str(told),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", line)
    llama1b.main()
    spans = read_perfetto(trace)
    tracks = {s.track for s in spans}
    assert {
        "owner0/lane 0", "owner0/lane 1", "owner0/cipher", "owner0->worker0", "worker0->owner0",
        "worker0/gpu", "owner0/steps",
    } <= tracks  # fmt: skip
    assert {"owner", "up", "worker", "down", "step"} <= {s.kind for s in spans}
    calls = {kind: {s.call for s in spans if s.kind == kind} for kind in ("up", "worker", "down")}
    assert calls["up"] == calls["worker"] == calls["down"]
    assert all(s.lane for s in spans if s.call)
    steps = [s for s in spans if s.kind == "step"]
    assert len(steps) == 2
    for step in steps:
        parts = critical_path(spans, step.start_s, step.end_s)
        assert sum(parts.values()) == pytest.approx(step.end_s - step.start_s)
        assert min(parts["owner"], parts["worker"]) > 0
    shutil.rmtree(trace.parent)
    for kind in SPOILT[1:]:
        shutil.rmtree(adapter)
        told.unlink()
        spoilt_later(monkeypatch, "scenarios.llama1b.run", trace, kind)
        with pytest.raises(SystemExit, match=f"^error: .*{trace}.*$"):
            llama1b.main()
        assert adapter.exists()
        assert told.exists()
        shutil.rmtree(trace.parent, ignore_errors=True)
        trace.parent.unlink(missing_ok=True)


# --- owner and worker on one machine ------------------------------------------------------------

ALONE = {"model": "gpt2", "tokens": 8, "sequence": 8, "worker": "here", "steps": 1}


def test_a_worker_here_is_what_fidelity_compares_with_real_runs() -> None:
    """The same world, lane by lane: more of them at once, on the same cores."""
    owner = DeviceProfile.builtin("cpu-2core")
    steps = []
    for lanes in (1, 2, 4):
        setting = changed(Setting(), ALONE | {"lanes": lanes})
        row = measure(setting, Prices())
        config = WorldConfig(
            workload_for(setting), owner, owner, lanes=lanes, steps=1, in_process=True
        )
        steps.append(row["step_p50_s"])
        assert steps[-1] == pytest.approx(simulate(config).steps[0].duration_s)
        assert [row[f"cost_{of}"] for of in ("gpu", "traffic", "line")] == [0, 0, 0]
        assert row["line_up_busy"] == row["line_down_busy"] == row["site_busy"] == 0
        assert row["path_latency"] == 0
    assert steps[0] < steps[1] < steps[2]
    far = measure(changed(Setting(), ALONE | {"worker": "elsewhere", "gpu": "cpu-2core"}),
                  Prices(gpu_hour=0.0))  # fmt: skip
    assert far["path_latency"] > 0


def test_the_device_of_a_worker_here_is_the_owners() -> None:
    """However the setting came about."""
    setting = changed(Setting(), ALONE | {"gpu": "h100"})
    assert setting.gpu == setting.owner_device
    other = replace(setting, owner_device="h100")
    assert (other.gpu, other.label) == ("h100", "gpt2 on H100, owner and worker")


@pytest.mark.parametrize("knob", OF_ELSEWHERE)
def test_what_is_of_a_worker_elsewhere_is_refused_of_one_here(knob: str) -> None:
    """It would change nothing: in a sweep, in a file's fixed part, in a single run."""
    value = {"gpu": "l4", "placement": "one", "connection": "parallel", "loss": "1%"}.get(knob)
    value = value or ("2ms" if KEYS[knob].field.endswith("_s") else "1")
    value = "1Gb/s" if KEYS[knob].field.endswith("bps") else value
    for words in (
        ["--set", "worker=here", "--set", f"{knob}={value}", "--sweep", "lanes=1,2"],
        ["--set", "worker=here", "--sweep", f"{knob}={value}"],
    ):
        with pytest.raises(SettingError, match=f"leave {knob} out"):
            study_from(parse(words))
    study_from(parse(["--sweep", "worker=elsewhere,here", "--set", f"{knob}={value}"]))
    if f"--{knob}" in OPTIONS:
        with pytest.raises(SettingError, match=f"leave {knob} out"):
            llama1b.asked(["--network", "here", f"--{knob}", value])


def test_several_of_a_worker_here_are_refused() -> None:
    """There is one process."""
    for knob in ("owners", "workers"):
        with pytest.raises(SettingError, match="one of each"):
            changed(Setting(), ALONE | {knob: 2})


def test_a_run_in_one_process_is_told_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line, no GPU of others, and no advice about either."""
    words = ["--network=here", "--model=gpt2", "--tokens=8", "--sequence=8", "--steps=1"]
    found = simulated.run(llama1b.asked([*words, "--out", str(tmp_path)]))
    simulated.print_report(found)
    simulated.print_assumptions(found)
    said = capsys.readouterr().out
    assert "in one process: " in said
    assert "a machine twice as fast" in said
    for word in ("round trip", "Gb/s", "--bandwidth", "GPU", "H200"):
        assert word not in said, word
