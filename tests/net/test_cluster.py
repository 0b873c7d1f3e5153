"""Shards: how a model is split, and a Ray cluster of this machine that multiplies with them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.cluster.shard import Shard, identity, split
from backends.errors import UserError
from backends.he.mlwe_worker import MlweWorker
from backends.he.store import PreparedModel, WorkerPart
from backends.net.devices import DevicesGoneError, OneDevice
from benchmarks.load.made import prepared_at

WIDTH = 64
SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


@given(SIZES, st.data())
def test_shards_are_neighbours_none_empty_and_about_even(
    sizes: list[int], data: st.DataObject
) -> None:
    """Each layer once; and no shard above its share by more than two layers."""
    parts = data.draw(st.integers(1, len(sizes)))
    spans = split(sizes, parts)
    assert [i for span in spans for i in span] == list(range(len(sizes)))
    assert len(spans) == parts
    assert all(spans)
    if parts * 3 <= len(sizes):
        most = max(sum(sizes[span.start : span.stop]) for span in spans)
        assert most <= sum(sizes) / parts + 2 * max(sizes)


@pytest.mark.parametrize("parts", [0, -1, 4])
def test_a_split_that_cannot_be(parts: int) -> None:
    """No shard, or more than layers."""
    with pytest.raises(ValueError, match="3 layers cannot be"):
        split([1, 2, 3], parts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return prepared_at(tmp_path_factory.mktemp("cluster") / "model", WIDTH)


def requests_of(part: WorkerPart, matrix: int, tokens: int) -> list[tuple[Any, int]]:
    """Two of any bytes: a worker cannot tell them from ciphertexts."""
    draw = np.random.default_rng(matrix)
    size = part.catalogue.up_bytes(matrix, tokens)
    return [(draw.integers(0, 256, size, np.uint8).data, tokens) for _ in range(2)]


def test_a_shard_holds_its_groups_and_no_others(model: PreparedModel) -> None:
    """Under the numbers that they have in the whole model, with the answers of the whole."""
    part = WorkerPart.open(model.directory)
    whole = OneDevice.holding(part, MlweWorker())
    shard = Shard(str(model.directory), identity(part.catalogue), 1, 3, "cpu")
    for matrix in range(2, 6):
        requests = requests_of(part, matrix, 3)
        payloads = [np.frombuffer(payload, np.uint8) for payload, _ in requests]
        for mine, theirs in zip(
            shard.multiply(matrix, [3, 3], *payloads), whole.multiply(matrix, requests), strict=True
        ):
            assert bytes(mine) == bytes(theirs)
    for matrix in (1, 6):
        with pytest.raises(KeyError):
            shard.multiply(matrix, [1], payloads[0])


def test_a_shard_is_of_the_model_that_was_asked_for(model: PreparedModel) -> None:
    part = WorkerPart.open(model.directory, range(0))
    of_others = replace(part.catalogue, parameters_digest=bytes(32))
    for wanted in (bytes(32), identity(of_others)):
        with pytest.raises(UserError, match="of another model"):
            Shard(str(model.directory), wanted, 0, 1, "cpu")


# --- on Ray -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """`backends.cluster.devices`, in a cluster of a head without room and two nodes with some."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    from backends.cluster import devices

    store = {"object_store_memory": 100 << 20}
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store}
    )
    for _ in range(2):
        nodes.add_node(num_cpus=1, **store)
    devices.connect(nodes.address)
    yield devices
    devices.leave()
    nodes.shutdown()


def test_shards_on_ray(model: PreparedModel, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One life of them, in order: each step of it takes seconds."""
    import ray

    whole = OneDevice.holding(WorkerPart.open(model.directory), MlweWorker())
    front = WorkerPart.open(model.directory, range(0))  # the front door reads no weight
    assert not cluster.release(front)
    shards = cluster.RayShards(front, model.directory)
    assert shards.count == 2
    assert not shards.here
    assert shards.name == MlweWorker()._kernel.name

    def right(devices: Any) -> None:
        assert {devices.of(matrix) for matrix in range(len(front.catalogue.matrices))} == {0, 1}
        for matrix in range(len(front.catalogue.matrices)):
            requests = requests_of(front, matrix, 5)
            for several in (requests, requests[:1]):
                answers = devices.multiply(matrix, several)
                expected = whole.multiply(matrix, several)
                assert [bytes(a) for a in answers] == [bytes(a) for a in expected]

    right(shards)
    second = cluster.RayShards(front, model.directory, 2)  # another front door finds the same
    assert [a._actor_id for a in second._shards] == [a._actor_id for a in shards._shards]
    right(second)
    with monkeypatch.context() as without:  # a machine that is away, as the next front door starts
        without.setattr(cluster, "_room", lambda kind: 1)
        assert cluster.RayShards(front, model.directory).count == 2
    with monkeypatch.context() as soon:  # one that gives up leaves alone what is not its own
        soon.setattr(cluster, "_LOAD_S", 0.0)
        with pytest.raises(cluster.ClusterError, match="has not loaded within 0 s"):
            cluster.RayShards(front, model.directory, 2)
    with monkeypatch.context() as newer:  # what started the shards was another program
        newer.setattr(cluster, "VERSION", cluster.VERSION + 1)
        with pytest.raises(cluster.ClusterError, match=r"another version.*--release"):
            cluster.RayShards(front, model.directory, 2)
    right(shards)
    with pytest.raises(ValueError, match="refuses a request"):  # told without any of its bytes
        shards.multiply(0, [(bytes(7), 1)])
    with pytest.raises(cluster.ClusterError, match=r"in 2 shards.*--release"):
        cluster.RayShards(front, model.directory, 1)
    for shard in shards._shards:
        ray.kill(shard, no_restart=False)  # as if its process had died
    right(shards)
    assert cluster.release(front)
    with pytest.raises(DevicesGoneError, match="a shard has ended for good"):
        shards.multiply(0, requests_of(front, 0, 1))
    gone_by = time.monotonic() + 30
    while ray.util.list_named_actors():
        assert time.monotonic() < gone_by
        time.sleep(0.1)
    assert not cluster.release(front)


def test_what_cannot_be_on_ray(
    model: PreparedModel, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each, and nothing left behind."""
    import ray

    front = WorkerPart.open(model.directory, range(0))
    with pytest.raises(cluster.ClusterError, match="4 layers cannot be 5 shards; ask for fewer"):
        cluster.RayShards(front, model.directory, 5)
    with monkeypatch.context() as soon:
        soon.setattr(cluster, "_ROOM_S", 0.5)
        with pytest.raises(cluster.ClusterError, match="no room for 3 shards"):
            cluster.RayShards(front, model.directory, 3)
    with pytest.raises(cluster.ClusterError, match="has a GPU to give"):
        cluster.RayShards(front, model.directory, backend="cuda")
    with pytest.raises(cluster.ClusterError, match=r"cannot load: .*manifest\.json") as told:
        cluster.RayShards(front, tmp_path / "absent", 1)
    assert len(str(told.value).splitlines()) == 1
    assert not cluster.release(front)
    assert not ray.util.placement_group_table() or all(
        one["state"] == "REMOVED" for one in ray.util.placement_group_table().values()
    )


def test_no_cluster_is_one_line_at_once() -> None:
    """Where nobody listens, and where the address is none."""
    pytest.importorskip("ray")
    from backends.cluster import devices

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start = time.monotonic()
    for address, said in ((f"127.0.0.1:{port}", "no Ray cluster answers"), ("x", "address")):
        with pytest.raises(UserError, match=said):
            devices.connect(address)
    assert time.monotonic() - start < 5
