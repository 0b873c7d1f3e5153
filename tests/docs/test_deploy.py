"""The files of deploy/: they fit each other, the worker's options, and what the worker counts.

Nothing here builds an image or starts a container: there is no engine to do it with.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from backends.net.counts import FULL, OPENED, REFUSED, Counts, LineEvent
from protocol.events import Dropped, FrameArrived, MultiplyCiphertext, RunTask, Send, TaskDone
from scenarios.worker import __main__ as worker
from tests.test_house import ROOT, closure

DEPLOY = ROOT / "deploy"
GIVEN = {"worker-model", "certs/worker"}
"""What the page has people put there."""


def exposed() -> dict[str, str]:
    """Metrics of a worker and their types, as Prometheus's own parser reads them."""
    counts = Counts()
    counts.observe(FrameArrived("ann#1", b"x" * 300), [RunTask(1, MultiplyCiphertext(0, 5, b""))])
    found = {}
    for family in text_string_to_metric_families(counts.exposition(ready=True)):
        assert family.documentation
        assert family.samples
        for sample in family.samples:
            found[sample.name] = family.type
    return found


def test_prometheus_reads_what_a_worker_exposes() -> None:
    """Every sample has a type; what only grows is called a counter."""
    found = exposed()
    assert found["private_lora_worker_requests_total"] == "counter"
    assert found["private_lora_worker_links"] == "gauge"
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in found.items())


def test_everything_that_is_counted_moves() -> None:
    """A panel whose line is always flat would be believed."""
    counts = Counts()

    def now() -> dict[str, float]:
        text = counts.exposition(ready=True)
        return {
            f"{sample.name}{sample.labels}": sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "refusals" not in sample.name or sample.labels["reason"] in ("busy", FULL)
        }

    before = now()
    ask = RunTask(1, MultiplyCiphertext(0, 5, b""))
    arrived = FrameArrived("ann#1", b"x" * 300)
    counts.on_line(LineEvent(OPENED, "ann"))
    counts.on_line(LineEvent(REFUSED, "bob", FULL))
    counts.observe(arrived, [ask, ask, Dropped("ann#1", "repeated"), Send("ann#1", b"y" * 300)])
    counts.observe(TaskDone(1, b""), [])
    counts.multiplied(0.5)
    counts.waited(0.5)
    counts.put_off(300, 40)
    still = {name for name, value in now().items() if value == before[name]}
    assert still == {"private_lora_worker_ready{}", "private_lora_worker_start_time_seconds{}"}


def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "worker.json").read_text())


def test_the_dashboard_shows_what_a_worker_counts() -> None:
    """Every name in it is exposed, and everything exposed is in it; rates are of counters."""
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"private_lora_\w+", text)}
    kinds = exposed()
    assert named == set(kinds)
    for text in expressions:
        rated = set(re.findall(r"rate\((private_lora_\w+)\[", text))
        assert {n for n in re.findall(r"private_lora_\w+", text) if kinds[n] == "counter"} == rated


def test_the_dashboard_can_be_drawn() -> None:
    """Ids of their own, panels beside each other, and the source that is provisioned."""
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        mine = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not mine & cells
        cells |= mine
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    services = compose()["services"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/dashboards.yml").read_text())[
        "providers"
    ]
    mounted = {to for _, to, *_ in map(split_volume, services["grafana"]["volumes"])}
    assert provider["options"]["path"] in mounted


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def split_volume(text: str) -> list[str]:
    return text.split(":")


def test_what_is_mounted_is_there() -> None:
    """Files of deploy/, what people bring, or a volume that is declared."""
    found = compose()
    for service in found["services"].values():
        for volume in service["volumes"]:
            source, target, *mode = split_volume(volume)
            assert target.startswith("/")
            if not source.startswith("."):
                assert source in found["volumes"]
                continue
            path = (DEPLOY / source).resolve()
            assert str(path.relative_to(ROOT)) in GIVEN or path.exists()
            assert mode == ["ro"]


def test_only_owners_get_in_from_elsewhere() -> None:
    """Numbers and pictures are for this machine; images are of one version."""
    services = compose()["services"]
    for name, service in services.items():
        for port in service["ports"]:
            assert (name, port) == ("worker", "7443:7443") or port.startswith("127.0.0.1:")
        if "image" in service:
            assert re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+", service["image"])
        assert set(service.get("depends_on", [])) <= set(services)
    assert services["worker"]["read_only"] is True
    assert services["worker"]["cap_drop"] == ["ALL"]


def test_the_worker_of_the_compose_file_starts_is_watched_and_drains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its options are the command's; Prometheus and the probe look where it answers."""
    service = compose()["services"]["worker"]
    monkeypatch.setattr(sys, "argv", ["worker", *service["command"]])
    args = worker.parsed()
    mounted = {to for _, to, *_ in map(split_volume, service["volumes"])}
    assert {str(args.model), str(args.tls)} == mounted
    assert args.listen.rpartition(":")[2] == service["ports"][0].partition(":")[0]
    port = args.metrics.rpartition(":")[2]
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"worker:{port}"]}]
    probe = service["healthcheck"]["test"]
    assert f":{port}/readyz" in probe[-1]
    compile(probe[-1], "probe", "exec")
    assert int(service["stop_grace_period"].rstrip("s")) > args.drain_s
    build = service["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of the container file."""
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    found = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in found]


def test_the_builder_is_given_what_is_copied_and_no_more() -> None:
    """A builder may be another machine, and keys lie in this folder: all else is left out."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {shlex.split(rest)[0] for word, rest in instructions() if word == "COPY"}
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied


def test_the_container_has_what_a_worker_imports_and_no_more() -> None:
    """Sources, packages, a user that is not root, and none of what must stay outside."""
    steps = instructions()
    known = {"FROM", "COPY", "RUN", "WORKDIR", "USER", "ENV", "EXPOSE", "STOPSIGNAL",
             "ENTRYPOINT", "CMD"}  # fmt: skip
    assert {word for word, _ in steps} <= known
    assert re.fullmatch(r"python:3\.\d+-slim", dict(steps)["FROM"])
    copied = {shlex.split(rest)[0] for word, rest in steps if word == "COPY"}
    assert all((ROOT / source).exists() for source in copied)
    rooms = {name.partition(".")[0] for name in closure("scenarios.worker.__main__")}
    assert rooms == copied - {"constraints.txt"}
    (install,) = [rest for word, rest in steps if word == "RUN"]
    packages = shlex.split(install)[shlex.split(install).index("/tmp/constraints.txt") + 1 :]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    named = {line.partition("==")[0] for line in lines}
    assert set(packages) == {"numpy", "numba", "cryptography"} <= named
    assert dict(steps)["USER"] not in ("0", "root")
    for word in ("ENTRYPOINT", "CMD"):
        assert isinstance(json.loads(dict(steps)[word]), list)
