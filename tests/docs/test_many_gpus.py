"""What docs/many-gpus.md says was measured, against the recorded runs; and what it installs."""

from __future__ import annotations

import json
import re
from statistics import mean, median
from typing import Any

from tests.docs.markdown import DOCS, PAGES, ROOT

PAGE = " ".join((DOCS / "many-gpus.md").read_text().split())


def recorded(name: str) -> Any:
    """A result that the page names."""
    assert f"benchmarks/results/{name}.json" in PAGE
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_load_that_was_measured() -> None:
    """Speed, evenness, answers; what became of owners when others died."""
    wide, narrow, churn = recorded("load"), recorded("load-2048"), recorded("load-churn")
    assert f"had {wide['aggregate_ratio']:.2f} times the products a second of one alone" in PAGE
    assert f"and {narrow['aggregate_ratio']:.2f} times in one of width 2048" in PAGE
    assert f"The slowest took {wide['slowest_over_fastest']:.2f} times as long" in PAGE
    assert f"None of {wide['right']:,} answers differed" in PAGE
    assert (wide["width"], narrow["width"], wide["owners"], wide["tokens"]) == (4096, 2048, 16, 1)
    for one in (wide, narrow, churn):
        assert (one["wrong"], one["lost"]) == (0, 0)
    assert (churn["churn_killed"], churn["churn_wrong"], churn["churn_lost"]) == (8, 0, 0)
    memory = churn["churn_memory_mb"]
    assert max(memory) - min(memory) <= 0.2


def test_the_soak() -> None:
    """As long as it was."""
    found = recorded("soak")
    assert found["soak_s"] == 1800
    assert f"{found['soak_came']:,} owners came and went, {found['soak_killed']} of them" in PAGE
    assert f"had {found['soak_products']:,} products" in PAGE
    assert f"no error, and {found['rss_growth_mb']:.1f} MB more memory" in PAGE
    assert found["errors"] == 0
    assert found["soak_killed"] > 100


def test_the_simulator_under_load() -> None:
    """With the bars that it misses."""
    found = recorded("fidelity-load")
    p50, p90, p99 = (f"{found[f'{p}_error']:.1%}" for p in ("p50", "p90", "p99"))
    said = (
        f"off by {p50} in the median of a step, {p90} in its 90th percentile and {p99} in its 99th"
    )
    assert said.replace("%", " %") in PAGE
    assert f"on average its median step is {100 * found['bias']:.1f} % too long" in PAGE
    missed = [name for name, bar in found["bars"].items() if found[name] > bar]
    assert ("aims, 10 and 20 %, are missed" in PAGE) == (missed == ["p50_error", "p90_error"])
    errors = {p: [row["error"][p] for row in found["rows"]] for p in ("p50", "p90", "p99")}
    for name, each in errors.items():
        assert median(map(abs, each)) == found[f"{name}_error"]
    assert mean(errors["p50"]) == found["bias"]
    assert all(error < 0 for name in ("p90", "p99") for error in errors[name])  # too fast
    owners = [row["owners"] for row in found["rows"]]
    assert f"{min(owners)} to {max(owners)} owners" in PAGE


def test_a_thousand_owners() -> None:
    """And what they took to simulate."""
    found = recorded("sim-site")
    assert (found["owners"], found["workers"]) == (1000, 16)
    assert f"is simulated in {found['site_s']:.0f} seconds" in PAGE


def test_what_a_site_buys() -> None:
    """The table of the study, and that more GPUs help nobody."""
    found = recorded("whatif-site")
    assert found["complete"]
    of = {(row["owners"], row["workers"], row["site_bps"]): row for row in found["rows"]}
    for owners in {owners for owners, _, _ in of}:
        cells = []
        for line in (10e9, 40e9, 160e9):
            row = of[owners, 1, line]
            cells.append(
                f"{row['step_p50_s']:.1f} s, GPU {100 * row['gpu_utilisation']:.1f} %, "
                f"line {100 * row['site_busy']:.0f} %"
            )
            for gpus in (4, 16):
                assert of[owners, gpus, line]["step_p50_s"] > 0.99 * row["step_p50_s"]
        assert f"| {owners} | {' | '.join(cells)} |" in PAGE


def test_shards_that_were_measured() -> None:
    """What Ray costs, and a node that died."""
    found = recorded("ray")
    sizes = [found["ray_sizes"][name] for name in ("1b", "half")]
    assert [s["shape"]["hidden_size"] for s in sizes] == [2048, 1024]
    assert {(s["shape"]["lanes"], s["shape"]["tokens"]) for s in sizes} == {(4, 128)}
    assert f"took {found['ray_ratio']:.2f} times as long as with the worker itself" in PAGE
    assert f"for half the bytes, {found['ray_ratio_half']:.2f} times" in PAGE
    one, half = (median(s["ray_steps_s"]) - median(s["direct_steps_s"]) for s in sizes)
    assert f"({one:.2f} and {half:.2f} s more;" in PAGE
    assert f"nothing came back for {found['ray_pause_s']:.0f} seconds" in PAGE
    assert found["ray_same_adapter"] is True
    assert f"the adapter was {found['ray_kill']['ratio']:.2f} times as far" in PAGE
    assert (found["ray_killed"], found["ray_nodes"], found["ray_shards"]) == (1, 4, 3)


def test_one_gpu_is_shared_by_many() -> None:
    """What the page begins with: the line is what is short."""
    found = recorded("whatif-h200-owners")
    last = max(
        (row for row in found["rows"] if row["step_p99_s"] <= 2 * found["rows"][0]["step_p99_s"]),
        key=lambda row: row["owners"],
    )
    assert f"{last['owners']} owners shared it before the slowest steps took twice" in PAGE
    assert f"the GPU was {100 * last['gpu_utilisation']:.1f} % busy" in PAGE
    assert f"the site's line {100 * last['site_busy']:.0f} % full" in PAGE
    assert any("NOT MEASURED" in profile for profile in found["profiles"])


def test_what_is_to_be_installed_is_there() -> None:
    """The package is on no index, and whoever takes its name there is not us: all is from here."""
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    code = [path for room in ("scenarios", "backends") for path in (ROOT / room).rglob("*.py")]
    named = set()
    for path in (*PAGES, *code):
        text = " ".join(path.read_text().split())
        assert "install private-lora" not in text.replace("'", "").replace('"', ""), path
        named |= set(re.findall(r"""-e ["']\.\[([\w,]+)\]""", text))
    assert {"ray", "traces"} < {name for one in named for name in one.split(",")}
    assert {n for one in named for n in one.split(",")} <= extras
