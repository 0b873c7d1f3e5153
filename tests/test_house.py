"""The shape of the house: import arrows, the trust boundary, and what may never be imported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import generate_figures

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("protocol", "backends", "sim", "scenarios", "benchmarks")
ALLOWED = {
    "protocol": set(),
    "backends": {"protocol"},
    "sim": {"protocol", "backends"},
    "scenarios": {"protocol", "backends", "sim"},
    "benchmarks": {"protocol", "backends", "sim", "scenarios"},
}
SECRET_HOLDERS = {
    "backends.he.entropy", "backends.he.secret", "backends.he.verdict", "backends.he.integrity",
    "backends.he.check", "backends.he.hedge", "backends.net.audit", "backends.he.mlwe_owner",
    "backends.he.reference", "backends.he.clear", "backends.he.direct", "backends.he.scaled",
    "backends.he.openfhe.owner", "backends.he.cuda.owner",
    "backends.he.cuda.check", "backends.net.owner", "protocol.owner",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the project by dotted name."""
    found = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Dotted names a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def closure(start: str) -> set[str]:
    """Project modules that importing `start` loads, its packages included."""
    known, seen, waiting = modules(), set(), [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        waiting += imports(known[name])
        waiting += [name.rpartition(".")[0]]
    return seen


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    """scenarios -> (sim | backends) -> protocol."""
    for name, path in modules().items():
        if name.partition(".")[0] != room:
            continue
        used = {i.partition(".")[0] for i in imports(path)} & set(ROOMS)
        assert used <= ALLOWED[room] | {room}, f"{name} imports {used - ALLOWED[room] - {room}}"


def test_sim_runs_nothing_of_the_real_world() -> None:
    """The simulator may compute and look at models, but never drives, trains or saves for real."""
    real = ("backends.net", "backends.nn.trainer", "backends.nn.checkpoint", "backends.nn.local")
    for name, path in modules().items():
        if name.startswith("sim"):
            other = {i for i in imports(path) if i.startswith(real)}
            assert not other, f"{name} imports {other}"
        if name.startswith("backends"):
            assert not {i for i in imports(path) if i.partition(".")[0] == "sim"}, name


def test_only_a_simulation_needs_simpy() -> None:
    """Real runs load what the simulator knows of models and devices, where simpy may be missing."""
    for name, path in modules().items():
        if not name.startswith("scenarios.chaos"):
            for node in ast.parse(path.read_text()).body:  # what loading the module imports
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                    assert "simpy" not in names, name


SERVERS = (
    "scenarios.worker.__main__", "backends.serve", "backends.net.serving", "backends.net.listening",
    "backends.net.worker", "backends.cluster.devices", "backends.net.spans",
    "backends.he.mlwe_worker", "backends.he.cuda.worker", "backends.he.openfhe.worker",
)  # fmt: skip
"""What runs where the owner's text must never be."""
OWNERS_ONLY = (
    "backends.nn", "backends.ledger", "backends.net.remote", "backends.net.dialling",
    "backends.net.inprocess", "backends.session", "backends.door", "backends.he.preparation",
    "backends.he.verification",
    "scenarios.session", "scenarios.preparation", "sim",
)  # fmt: skip
"""And what has no business there: models in torch, training, sessions, what an owner knows."""


@pytest.mark.parametrize("worker", SERVERS)
def test_worker_code_cannot_reach_a_secret(worker: str) -> None:
    """Walking all imports of what serves, lazy ones too, meets nothing that holds secrets."""
    reached = closure(worker)
    assert worker in reached
    assert len(reached) > 5
    assert not reached & SECRET_HOLDERS
    assert not {n for n in reached if n in OWNERS_ONLY or n.startswith(("backends.nn.", "sim."))}


def test_a_worker_on_a_cpu_loads_no_torch() -> None:
    """It starts in a second and a quarter of the memory, and there is less to trust."""
    heavy = ("torch", "transformers", "peft", "triton", "cupy")
    load = "import scenarios.worker.__main__, scenarios.worker.run"
    ask = f"{load}, sys; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run(
        [sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert said.stdout == "[]\n", said.stdout + said.stderr


def test_the_walk_would_notice() -> None:
    """The same walk from the owner's side does reach them, and each is where it is said to be."""
    assert set(modules()) >= SECRET_HOLDERS | {name for name in OWNERS_ONLY if name != "sim"}
    assert closure("scenarios.session") >= {"backends.he.mlwe_owner", "backends.nn.trainer"}
    assert {"backends.he.secret", "backends.he.entropy"} <= closure("backends.net.owner") | closure(
        "backends.he.mlwe_owner"
    )


def test_nothing_unpickles() -> None:
    """No pickle, no eval of what was read: files are safetensors, npy without objects, JSON."""
    for name, path in modules().items():
        text = path.read_text()
        assert "pickle" not in imports(path), name
        assert "allow_pickle" not in text, name
        assert "torch.load(" not in text, name


def test_pages_show_the_recorded_figures() -> None:
    """Every number in their tables comes from a file under benchmarks/results."""
    for path in generate_figures.pages():
        page = path.read_text(encoding="utf-8")
        assert generate_figures.renewed(path, page) == page, path.name


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_promises_name_tests_that_exist(page: str) -> None:
    """Where a page says which test holds a line, that test is there."""
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", text)
    assert named or page not in ("security.md", "cipher.md")
    for file, test in named:
        assert (ROOT / file).is_file(), f"{page} names {file}"
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{page} names {test}"


LOGGED = {
    "log", "self", "type", "peer", "worker", "reason", "error", "work", "name", "why", "_where",
    "effect", "_thread", "__name__", "info", "warning", "_log", "path", "_gpu", "option",
    "directory", "strerror",
}  # fmt: skip
"""All that log calls of the owner's and the worker's code may speak of: names and reasons."""


def test_private_values_are_not_logged() -> None:
    """Log calls take names and reasons by position, never arrays, nor whole objects; no prints."""
    for name, path in modules().items():
        if name.partition(".")[0] not in ("backends", "protocol"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            assert not (isinstance(node.func, ast.Name) and node.func.id == "print"), name
            at = node.func
            if not (isinstance(at, ast.Attribute) and isinstance(at.value, ast.Name)):
                continue
            if at.value.id not in ("log", "_log", "logging", "logger") or at.attr == "getLogger":
                continue
            assert at.attr != "exception", f"{name}: a traceback's text may quote private values"
            assert not node.keywords, f"{name}: {ast.unparse(node)}"
            parts = [part for argument in node.args for part in ast.walk(argument)]
            words = {part.id for part in parts if isinstance(part, ast.Name)}
            words |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
            assert words <= LOGGED, f"{name}: {ast.unparse(node)}"
