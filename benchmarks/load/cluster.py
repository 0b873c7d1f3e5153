"""The shards of a model on a Ray cluster of this machine: what Ray costs, and what its loss does.

Trainings through a worker as users start it, and through one whose shards are Ray actors, in turn:
the ratio of their steps. Then three quickstarts, two undisturbed ones without Ray, and one on a
cluster of four nodes of which one, with a shard on it, is killed while it works: its adapter has to
come as near to theirs as theirs are to each other, but for the factor of `scenarios.crashes`.

A node is some processes of this machine, so what a network between machines costs is not seen.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.two_processes import Size, prepared, private_run, worker_at
from scenarios.certs import Authority
from scenarios.crashes.line import HOST
from scenarios.crashes.quickstart import Disturber, Outcome, Run, compare, prepare_base
from scenarios.crashes.zygote import ROOT

NODES, SHARDS = 4, 3
"""Of which one that has a shard is killed: there is room for it on the one that had none."""
_STORE_BYTES = 256 << 20
_SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 2},
    "half": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
             "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2},
}  # fmt: skip
"""Two layers of Llama-3.2-1B, and of a Llama half as wide, whose products are a quarter of that
where its ciphertexts are half."""


@contextmanager
def local_cluster(nodes: int) -> Iterator[tuple[str, list[Any], Any]]:
    """(address, nodes, cluster) of Ray's own cluster of processes; its head takes no shard."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Only here: it takes a second, and nothing else of the load needs it.
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES,
        },
    )  # fmt: skip
    try:
        found = [
            cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES) for _ in range(nodes)
        ]
        yield cluster.address, found, cluster
    finally:
        cluster.shutdown()


def ratio(steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step with one shard on Ray, over those with the worker itself."""
    found = {name: _ratio(steps, rounds, shape) for name, shape in _SIZES.items()}
    return {"ray_ratio": found["1b"]["ratio"], "ray_ratio_half": found["half"]["ratio"],
            "ray_sizes": found}  # fmt: skip


def _ratio(steps: int, rounds: int, shape: dict[str, int]) -> dict[str, Any]:
    size = Size(steps=steps, tokens=128, lanes=4)
    times: dict[str, list[float]] = {"direct": [], "ray": []}
    with tempfile.TemporaryDirectory(prefix="ray-") as directory, local_cluster(1) as cluster:
        place, (address, _, _) = Path(directory), cluster
        base = _random_llama(place / "base", shape)
        authority = Authority()
        authority.issue(place / "owner")
        authority.issue(place / "worker", ["localhost"])
        words = ["--weights", str(base), "--cache", str(place / "cache")]
        model = prepared(size, place, words)
        for _ in range(rounds):
            for kind, more in (("direct", []), ("ray", ["--ray", address, "--shards", "1"])):
                with worker_at(model, place, more) as worker:
                    said = ["--worker", worker, "--tls", str(place / "owner"), *words]
                    run = private_run(size, place, said)
                times[kind] += run["private_steps_s"][1:]
    return {
        "ratio": median(times["ray"]) / median(times["direct"]),
        "ray_steps_s": times["ray"],
        "direct_steps_s": times["direct"],
        "shape": shape | {"tokens": size.tokens, "lanes": size.lanes},
    }


def _random_llama(directory: Path, shape: dict[str, int]) -> Path:
    """The quickstart's model, of another size and without having learned anything."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    base = ROOT / "scenarios" / "assets" / "tiny-llama"
    config = AutoConfig.from_pretrained(base, **shape)
    LlamaForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return directory


class NodeDeath(Disturber):
    """One node dies when so many bytes have passed; how long nothing passed after that is seen."""

    def __init__(self, cluster: Any, node: Any, passed: int) -> None:
        super().__init__()
        self.pause_s = 0.0
        self._cluster, self._node, self._due_at = cluster, node, passed
        self._seen, self._since = 0, 0.0

    def look(self, run: Run) -> None:
        now = time.monotonic()
        if not self.done and run.line.passed >= self._due_at:
            self._cluster.remove_node(self._node, allow_graceful=False)
            self.done.append({"what": "kill -9 of a node and the shard on it"})
            self._seen, self._since = run.line.passed, now
        elif self.done:
            self.pause_s = max(self.pause_s, now - self._since)
            if run.line.passed != self._seen:
                self._seen, self._since = run.line.passed, now


def kill(steps: int) -> dict[str, Any]:
    """The three quickstarts."""
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        place = Path(directory)
        authority, certs = Authority(), place / "certs"
        authority.issue(certs / "owner")
        authority.issue(certs / "worker", [HOST])
        cache = prepare_base(place)
        plain: list[Outcome] = []
        for name in ("undisturbed-1", "undisturbed-2"):
            with Run(place / name, certs, cache, steps) as run:
                plain.append(run.go(Disturber()))
        with local_cluster(NODES) as (address, nodes, cluster):
            words = ("--ray", address, "--shards", str(SHARDS))
            with Run(place / "ray", certs, cache, steps, words) as run:
                death = NodeDeath(cluster, _with_a_shard(nodes), plain[0].passed // 2)
                outcome = run.go(death)
    found = compare(plain, outcome)
    return {
        "ray_nodes": NODES,
        "ray_shards": SHARDS,
        "ray_killed": len(death.done),
        "ray_pause_s": death.pause_s,
        "ray_same_adapter": found["same"],
        "ray_kill": found | {"steps": steps},
    }


def _with_a_shard(nodes: list[Any]) -> Any:
    """A node that one of the shards is on, once there are as many as there have to be."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        having = [node for node in nodes for _ in range(_shards_on(node))]
        if len(having) == SHARDS:
            return having[0]
        time.sleep(0.5)
    raise RuntimeError("the shards have not started")


def _shards_on(node: Any) -> int:
    """Actors that a node runs: children of its raylet, under the name that Ray gives them."""
    (raylet,) = node.all_processes["raylet"]
    found = 0
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parent = int(re.findall(r"^PPid:\s+(\d+)", (place / "status").read_text(), re.M)[0])
            title = (place / "cmdline").read_bytes()
            found += parent == raylet.process.pid and title.startswith(b"ray::Shard")
    return found
