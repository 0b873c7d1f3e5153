"""What docs/comparison.md and docs/machines.md say, against recorded runs and the code."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from backends.he.openfhe.scheme import RING
from backends.he.params import PRESETS, preset
from benchmarks import everything
from benchmarks.peers import ours
from docs.comparison_figures import KIND, MACHINES
from tests.docs.markdown import ROOT

PAGE = " ".join((ROOT / "docs" / "comparison.md").read_text().split())
OTHERS = {"concrete-ml-extensions", "desilofhe", "TenSEAL", "OpenFHE"}


def recorded(name: str) -> Any:
    return json.loads((MACHINES / KIND / f"{name}.json").read_text())


PEERS = recorded("peers")["rows"]
OURS = [row for row in PEERS if row["name"] == "ours"]
THEIRS = [row for row in PEERS if row["name"] in OTHERS]


def test_everyone_was_measured() -> None:
    """Each library, each of our presets on each kernel, clear in both types; nothing left out."""
    assert recorded("peers")["left_out"] == {}
    assert {row["name"] for row in THEIRS} == OTHERS
    assert {row["scheme"] for row in OURS} == {f"module-LWE, {name}" for name in PRESETS}
    assert {row["name"] for row in PEERS} - OTHERS == {"ours", "clear float32", "clear bfloat16"}
    wanted = {
        "name", "version", "scheme", "server_s_per_token", "owner_s_per_token",
        "up_bytes_per_token", "down_bytes_per_token", "key_bytes", "relative_error", "extrapolated",
    }  # fmt: skip
    for row in PEERS:
        assert row.keys() >= wanted
        assert 0 <= row["relative_error"] < 0.05
        assert row["server_s_per_token"] > 0


def test_the_page_tells_the_best_of_the_others() -> None:
    """From the rows, by a reckoning of this test's own."""
    thin = next(row for row in OURS if row["scheme"] == "module-LWE, thin")
    fastest = min(THEIRS, key=lambda row: row["server_s_per_token"])
    size = {id(row): row["up_bytes_per_token"] + row["down_bytes_per_token"] for row in PEERS}
    smallest = min(THEIRS, key=lambda row: size[id(row)])
    times = fastest["server_s_per_token"] / thin["server_s_per_token"]
    part = size[id(thin)] / size[id(smallest)]
    assert times >= 500
    assert part <= 0.5
    assert f"takes {times:,.0f} times less than {fastest['name']} {fastest['scheme']}" in PAGE
    assert f"{part:.2f} of the bytes of {smallest['name']} {smallest['scheme']} travel" in PAGE


def test_how_it_was_measured_is_how_it_is_measured() -> None:
    """Batches, rounds, how long the others take, and what our owner keeps."""
    assert f"their batches hold up to {max(row['tokens'] for row in THEIRS):,} tokens" in PAGE
    assert {row["tokens"] for row in OURS} == {ours.TOKENS} == {256}
    assert "ours holds 256" in PAGE
    assert (ours.ROUNDS, ours.UNCOUNTED) == (7, 2)
    assert "medians of seven rounds after two" in PAGE
    whole = [row for row in THEIRS if not row["extrapolated"]]
    assert max(row["server_s_per_token"] * row["tokens"] for row in whole) < 30
    # A hint has `rank` polynomials of 256 numbers, 4 bytes each, for a row of 2,048 weights.
    assert f"{preset('thin').rank * 256 * 4 / 2048} bytes for each weight" in PAGE


def test_concrete_asks_least_for_a_single_token() -> None:
    """A packed scheme sends a whole batch for it."""
    assert "smaller requests than those of packed schemes for a single token" in PAGE
    concrete = next(row for row in THEIRS if row["name"] == "concrete-ml-extensions")
    for row in THEIRS:
        if row is not concrete:
            assert row["up_bytes_per_token"] * row["tokens"] > concrete["up_bytes_per_token"]


def test_private_training_is_not_worse_than_with_rounded_activations() -> None:
    """Every preset, and its gradients are as long as those in clear."""
    runs = {run["name"]: run for run in recorded("training")["runs"]}
    private = {name for name in runs if name.startswith("private ")}
    assert private == {f"private {name}" for name in PRESETS}
    for name in private:
        assert runs[name]["final_loss"] <= runs["clear int8, int8 act."]["final_loss"]
        assert 0.98 <= runs[name]["gradient_norm_ratio"] <= 1.02


def table(head: str) -> list[list[str]]:
    """The rows of the table whose first line begins so."""
    text = (ROOT / "docs" / "comparison.md").read_text()
    lines = text[text.index(f"\n| {head}") :].strip().splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_what_others_published_has_a_source_and_a_date() -> None:
    """And the figures that the page makes of them are right."""
    rows = table("what | figure | source |")
    assert len(rows) >= 5
    for what, _, source in rows:
        assert re.search(r"\b20[12]\d\b", source), what
    assert f"5,322 s for 4 x 16 tokens, {5322 / 64:.0f} s a token" in PAGE
    low, high = (100 - int(n) for n in re.findall(r"(\d+) to (\d+) % lower", PAGE)[0][::-1])
    assert f"at {low} to {high} % of the speed of clear" in PAGE


PRAISE = (
    "powerful|impressive|excellent|outstanding|great|huge|tiny|cheap|expensive|easy|simple|robust|"
    "modern|efficient|superior|inferior|significant|dramatic|remarkable|state-of-the-art|slow|"
    "blazing|poor|amazing|unmatched|only real|far better"
)


def test_the_page_does_not_praise() -> None:
    """Figures and features; no adjectives that weigh them."""
    assert re.findall(rf"\b({PRAISE})\b", PAGE.lower()) == []


def test_the_kinds_of_machine_are_those_that_there_are() -> None:
    """In their order, and what they all take is about an hour."""
    text = " ".join((ROOT / "docs" / "machines.md").read_text().split())
    flags = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "asimddp")
    kinds = [everything.kind_of_machine(flags[start:]) for start in range(len(flags))]
    assert ", ".join(f"`{kind}`" for kind in kinds) in text
    assert everything.kind_of_machine(["sse2"]) == "generic"
    assert 45 <= sum(each.minutes for each in everything.MEASUREMENTS.values()) <= 75
    assert "an hour on two cores" in text


RESULTS = {
    "quickstart": "quickstart-avx512", "fidelity": "fidelity", "transport": "transport",
}  # fmt: skip
"""Where a measurement's figures are kept, of those that no machine has beside the others."""


@pytest.mark.parametrize("name", everything.MEASUREMENTS)
def test_headlines_are_of_what_measurements_find(name: str) -> None:
    """Each is there in figures that its command has really written."""
    kept = MACHINES / KIND / f"{name}.json"
    file = kept if kept.exists() else MACHINES.parent / f"{RESULTS[name]}.json"
    figures = json.loads(file.read_text())
    found = everything.MEASUREMENTS[name].headline(figures)
    assert found
    assert all(value > 0 for value in found.values())
    module = everything.MEASUREMENTS[name].module
    assert figures["origin"]["command"].startswith(f"python -m {module}")


def test_the_size_of_an_openfhe_ciphertext_is_the_one_told() -> None:
    """On the page that says how to run it."""
    page = " ".join((ROOT / "docs" / "extend.md").read_text().split())
    assert (
        f"up to {RING:,} tokens (BFV; CKKS: {RING // 2:,}), and is {2 * RING * 8:,} bytes" in page
    )
