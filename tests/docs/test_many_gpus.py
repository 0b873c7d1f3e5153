"""What docs/many-gpus.md says was measured, against the recorded runs."""

from __future__ import annotations

import json
from typing import Any

from tests.docs.markdown import DOCS, ROOT

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
    assert found["soak_s"] == 180
    assert f"{found['soak_came']} owners came and went and had {found['soak_products']:,}" in PAGE
    assert f"no error, and {found['rss_growth_mb']:.1f} MB more memory" in PAGE
    assert found["errors"] == 0


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


def test_a_thousand_owners() -> None:
    """And what they took to simulate."""
    found = recorded("sim-site")
    assert (found["owners"], found["workers"]) == (1000, 16)
    assert f"is simulated in {found['site_s']:.0f} seconds" in PAGE


def test_shards_that_were_measured() -> None:
    """What Ray costs, and a node that died."""
    found = recorded("ray")
    assert f"a step took {found['ray_ratio']:.2f} times as long" in PAGE
    assert f"nothing came back for {found['ray_pause_s']:.0f} seconds" in PAGE
    assert found["ray_same_adapter"] is True
    assert (found["ray_killed"], found["ray_nodes"], found["ray_shards"]) == (1, 4, 3)
