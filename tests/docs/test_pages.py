"""Links, the site's list of pages, and what pages quote of files and results."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends.defaults import SCHEMES
from backends.he.conformance import CHECKS
from backends.he.params import PRESETS
from docs import generate_figures
from scenarios.whatif.checks import require_sound
from scenarios.whatif.study import load_study
from tests.docs.markdown import DOCS, PAGES, ROOT, anchors, blocks, links

RESULTS = ROOT / "benchmarks" / "results"


def dead(page: Path) -> list[str]:
    """A page's links that lead nowhere."""
    found = []
    for link in links(page.read_text(encoding="utf-8")):
        place, _, anchor = link.partition("#")
        to = (page.parent / place).resolve() if place else page
        there = to.exists() and to.is_relative_to(ROOT)
        if not there or (anchor and anchor not in anchors(to.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file of the repository, and to a heading in it."""
    assert dead(page) == []


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    """A file that is not there, one outside of the repository, a heading that is not there."""
    page = tmp_path / "page.md"
    text = "# A heading, `coded`: 2\n\n[x](none.md) [y](#no) `[z](no.md)` [w](#a-heading-coded-2)\n"
    page.write_text(f"{text}```\n# no heading\n[x](no.md)\n```\n[v](https://a.example/)")
    assert links(page.read_text()) == ["none.md", "#no", "#a-heading-coded-2"]
    assert anchors(page.read_text()) == {"a-heading-coded-2"}
    assert dead(page) == ["none.md", "#no", "#a-heading-coded-2"]  # it lies outside itself


def in_the_list(entry: Any) -> list[str]:
    """Pages in a part of the site's list."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in in_the_list(part)]


def test_the_site_lists_every_page() -> None:
    """Once; those that the site makes of other files among them."""
    listed = in_the_list(yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text())["nav"])
    made = set(re.findall(r'": "(\w+\.md)"', (DOCS / "site" / "hooks.py").read_text()))
    assert len(made) == 3
    assert sorted(listed) == sorted({path.name for path in DOCS.glob("*.md")} | made)


def test_the_first_page_leads_to_every_other() -> None:
    """Nobody needs the site's list to find one."""
    led = {link.partition("#")[0] for link in links((DOCS / "index.md").read_text())}
    assert led >= {path.name for path in DOCS.glob("*.md")} - {"index.md"}


def test_the_study_that_is_shown_is_sound(tmp_path: Path) -> None:
    """And has as many settings as the page says."""
    page = (DOCS / "extend.md").read_text()
    ((_, text),) = (block for block in blocks(page) if block[0] == "toml")
    (tmp_path / "mine.toml").write_text(text)
    study = load_study(str(tmp_path / "mine.toml"))
    require_sound(study)
    assert f"all combinations: {len(study.settings())} here" in page


FILES = re.compile(r"`((?:backends|protocol|sim|scenarios|benchmarks|tests)/[\w/.-]+)`")


@pytest.mark.parametrize("name", ["extend.md", "many-gpus.md", "idea.md", "why.md", "faq.md"])
def test_files_that_are_named_are_there(name: str) -> None:
    """Where somebody is sent to look."""
    named = FILES.findall((DOCS / name).read_text())
    assert named
    assert [file for file in named if not (ROOT / file).exists()] == []


NAMED = {
    "tests/scenarios/test_families.py": ("FAMILIES", "MORE"),
    "tests/test_house.py": ("SERVERS", "SECRET_HOLDERS", "OWNERS_ONLY"),
    "tests/he/test_conformance.py": (),
    "backends/he/conformance/__init__.py": ("CHECKS",),
    "backends/he/scaled.py": ("class ScaledOwner", "def _seal", "def _open"),
    "backends/he/wire.py": ("class Packing",),
    "benchmarks/zoo/configs.py": ("RULES", "SPECIAL"),
    "backends/nn/skeleton.py": ("def build_skeleton",),
    "backends/nn/remote.py": ("def discover_groups",),
    "sim/models.py": ("MODELS",),
    "backends/session.py": ("def make_ciphers", "def opened"),
    "backends/serve.py": ("def worker_cipher",),
    "backends/he/matmul/generic.py": ("class GenericKernel",),
    "backends/he/mlwe_worker.py": ("class MlweWorker",),
    "backends/he/interface.py": (
        "class OwnerCipher", "class WorkerCipher", "def load", "def multiply", "def multiply_many",
        "launches", "def weakness", "def simulated_randomness", "def discard", "def up_bytes",
    ),
    "protocol/catalogue.py": ("def largest_frame",),
    "backends/net/owner.py": ("class OwnerClient", "def deliver", "def disconnected", "def lost"),
    "backends/net/worker.py": ("class WorkerServer", "def deliver", "def lost"),
}  # fmt: skip
"""What extend.md sends people to, by file."""


def test_what_is_to_be_extended_is_there() -> None:
    """Under the names that the page gives, which are all in it."""
    page = (DOCS / "extend.md").read_text()
    for file, names in NAMED.items():
        text = (ROOT / file).read_text()
        for name in names:
            assert name in text, f"{file} has no {name}"
            assert name.rpartition(" ")[2] in page, f"the page does not name {name}"


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def figures() -> list[tuple[str, str, str]]:
    """(page, what it says, the file it names) with the numbers of that file."""
    quick, thin = result("quickstart-avx2"), result("thin-avx2")
    step, gpu = result("llama1b-avx2"), result("gpu-h100")["step"]
    two, owners = result("two-processes"), result("whatif-h200-owners")
    fidelity, of_gpu = result("fidelity"), result("fidelity-h100")["cases"][0]
    traffic = f"{(thin['bytes_per_token_up'] + thin['bytes_per_token_down']) / 1e6:.2f} MB a token"
    off = max(abs(run["private_loss"] / run["clear_loss"] - 1) for run in thin["runs"])
    full = re.search(r"line is (\d+) % full", owners["answer"])
    assert full is not None
    return [
        ("tutorial.md", f"from {quick['base_loss']:.3f} to {quick['private_loss']:.3f}",
         "quickstart-avx2"),
        ("tutorial.md", f"in clear ended at {quick['clear_loss']:.3f}", "quickstart-avx2"),
        ("tutorial.md", f"took {step['private_step_s']:.1f} s on two cores with AVX2, and "
         f"{step['clear_step_s']:.1f} s in clear", "llama1b-avx2"),
        ("faq.md", f"ended at {quick['private_loss']:.3f}, the clear one at "
         f"{quick['clear_loss']:.3f}", "quickstart-avx2"),
        ("faq.md", traffic, "thin-avx2"),
        ("faq.md", f"{two['owner_cpu_ms_per_token']:.0f} ms of a processor and clear training "
         f"{two['clear_cpu_ms_per_token']:.0f} ms a token, and {two['owner_rss_ratio']:.2f} of",
         "two-processes"),
        ("idea.md", f"took {step['private_over_clear']:.2f} times as long", "llama1b-avx2"),
        ("idea.md", f"took {gpu['private_over_clear']:.2f} times as long as in bf16", "gpu-h100"),
        ("why.md", f"{gpu['private_over_clear']:.2f} times on one H100", "gpu-h100"),
        ("idea.md", traffic, "thin-avx2"),
        ("idea.md", f"within {math.ceil(off * 1000) / 10:.1f} % of the one in clear", "thin-avx2"),
        ("many-gpus.md", f"the site's line {full[1]} % full", "whatif-h200-owners"),
        ("what-if.md", f"off by {fidelity['median_error']:.1%} in the median and "
         f"{fidelity['worst_error']:.1%} at worst".replace("%", " %"), "fidelity"),
        ("what-if.md", f"simulated step was {-of_gpu['error']:.1%} shorter".replace("%", " %"),
         "fidelity-h100"),
    ]  # fmt: skip


def test_figures_are_those_of_the_files_they_name() -> None:
    """Line ends aside."""
    for page, said, file in figures():
        text = " ".join((DOCS / page).read_text().split())
        assert said in text, (page, said)
        assert f"benchmarks/results/{file}.json" in text, (page, file)


def test_results_that_are_named_are_there() -> None:
    """In every page but the generated parts, which name none."""
    for page in PAGES:
        for file in re.findall(r"benchmarks/results/([\w.-]+\.json)", page.read_text()):
            assert (RESULTS / file).is_file(), f"{page.name} names {file}"
    assert generate_figures.pages()


def test_the_page_has_every_check_of_the_suite() -> None:
    """By name, with the first line of what it asks."""
    page = (DOCS / "extend.md").read_text()
    for check in CHECKS:
        assert check.__doc__ is not None
        first = check.__doc__.partition("\n")[0]
        assert f"| `{check.__name__}` | {first} |" in page


def test_openfhe_trains_as_clear_does() -> None:
    """The table of extend.md is the recorded run's, whose losses agree within half a per cent."""
    page = (DOCS / "extend.md").read_text()
    runs = json.loads((RESULTS / "openfhe-training.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["clear", *SCHEMES]
    for run in runs:
        away = run["final_loss"] / runs[0]["final_loss"] - 1
        assert abs(away) < 0.005
        learnt = runs[0]["base_loss"] - runs[0]["final_loss"]
        assert abs(run["final_loss"] - runs[0]["final_loss"]) < 0.01 * learnt
        assert run["final_loss"] < runs[0]["base_loss"]
        cells = run["name"], f"{run['final_loss']:.4f}", f"{run['gradient_norm_ratio']:.4f}"
        assert f"| {' | '.join(cells)} |" in page


def test_the_quickstart_runs_through_openfhe() -> None:
    """What extend.md says of it is the recorded run's."""
    page = " ".join((DOCS / "extend.md").read_text().split())
    run = json.loads((RESULTS / "openfhe-quickstart.json").read_text())
    assert (run["scheme"], run["steps"], len(run["losses"])) == ("openfhe-bfv", 5, 5)
    assert run["private_loss"] < run["base_loss"]
    assert abs(run["private_loss"] / run["clear_loss"] - 1) < 0.005
    minutes = run["private_s"] / run["steps_this_run"] / 60
    for told in (
        f"loss of {run['private_loss']:.4f}, from {run['base_loss']:.4f}; in clear at "
        f"{run['clear_loss']:.4f}.",
        f"1,024 tokens took {minutes:.1f} minutes",
        f"{run['worker_s'] / run['private_s']:.0%} of it the worker's",
        f"{run['bytes_per_token_up'] / 1e3:.0f} kB go up and "
        f"{run['bytes_per_token_down'] / 1e3:.0f} kB down",
        run["origin"]["command"],
    ):
        assert told in page, told


@pytest.mark.parametrize("name", ["machines/amx/training.json", "training-gemma.json"])
def test_private_training_ends_no_worse_than_quantised_training_in_clear(name: str) -> None:
    """Recorded runs, held out; and gradients at the same parameters are nearer to clear ones."""
    figures = json.loads((RESULTS / name).read_text())
    runs = {run["name"]: run for run in figures["runs"]}
    first = {
        label: abs(run["gradient_norms"][0] / runs["clear int8"]["gradient_norms"][0] - 1)
        for label, run in runs.items()
    }
    theirs = "clear int8, int8 act."
    assert {"clear fp32", "private thin", "private exact"} <= set(runs)
    for label, run in runs.items():
        assert len(run["losses"]) == figures["training"]["steps"]
        if label.startswith("private "):
            assert run["final_loss"] <= runs[theirs]["final_loss"]
            assert first[label] < max(0.02, first[theirs])


def test_gradient_norms_of_the_quickstart_are_those_in_clear() -> None:
    """Over the whole recorded run, within 2 %, under every preset."""
    runs = json.loads((RESULTS / "machines/amx/training.json").read_text())["runs"]
    private = [run["gradient_norm_ratio"] for run in runs if run["name"].startswith("private ")]
    assert len(private) == len(PRESETS)
    assert all(0.98 <= ratio <= 1.02 for ratio in private)


def test_what_the_comparison_says_of_gemma_is_so() -> None:
    """How far gradient norms of runs with adapters of their own are from each other."""
    figures = json.loads((RESULTS / "training-gemma.json").read_text())
    clear, *others = figures["runs"]
    ratios = [run["gradient_norm_ratio"] for run in others]
    assert 0.075 < max(abs(ratio - 1) for ratio in ratios) < 0.085
    fp32 = next(run for run in others if run["name"] == "clear fp32")
    steps = zip(fp32["gradient_norms"], clear["gradient_norms"], strict=True)
    assert sum(abs(own / its - 1) > 0.19 for own, its in steps) >= 2
    page = (DOCS / "comparison.md").read_text()
    assert f"{figures['training']['steps']} steps of one sequence of 256 tokens" in page
    assert "over the run by up to 8 %" in page
