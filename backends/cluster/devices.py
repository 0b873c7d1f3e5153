"""The front door's side: shards as Ray actors, found or made, and asked for products.

Ciphertexts go from here to the shard and back within Ray's calls, from process to process; Ray's
head sees none. A shard that dies, or whose machine does, is started again by Ray where there is
room, and what it was asked is asked again: a product is a pure function of the request.

The actors and their placement are detached: they outlive this process, so that a second front door,
or the next one, finds them loaded. `release` ends them.

In sync with: docs/many-gpus.md.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    GetTimeoutError,
    RayError,
    RaySystemError,
    RayTaskError,
)
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from backends.cluster.shard import VERSION, Shard, identity, split
from backends.errors import UserError
from backends.he.interface import AnyPayload
from backends.he.store import WorkerPart
from backends.net.addresses import AddressError, address_of
from backends.net.devices import Devices, DevicesGoneError

NAMESPACE = "private-lora"
_REACH_S, _ROOM_S, _LOAD_S = 5.0, 60.0, 1800.0
_KINDS = {"cpu": "CPU", "cuda": "GPU"}
"""Of which a shard reserves one. On a CPU it uses all cores, whatever it reserves."""


_FOR_GOOD = (ActorDiedError, ActorPlacementGroupRemoved, ActorUnschedulableError)
"""What Ray says of a shard that it will not start again: one that was released, or that could not
load where it was started again. While it will, a call waits."""
_WITHIN_CALLS = {
    "RAY_max_direct_call_object_size": str(1 << 28),
    "RAY_task_rpc_inlined_bytes_limit": str(1 << 30),
}
"""Bytes that Ray passes within a call: more than a request or answer has. Through its object stores
one would take ten milliseconds more, between two nodes of one machine. It reads this from the
environment, of this process when it joins, and of a shard's when that starts."""


class ClusterError(UserError):
    """The cluster cannot be reached, has no room, or holds something else."""


def connect(address: str) -> None:
    """Join a Ray cluster that runs: HOST:PORT of its head, or "auto" for the one of this machine.

    Raises ClusterError when there is none, AddressError for an address that is none.
    """
    try:
        if address != "auto":  # Ray itself tries for minutes, and then ends the process
            socket.create_connection(address_of(address), _REACH_S).close()
        # It warns of what is wanted: that shards end with their placement.
        logging.getLogger("ray.actor").setLevel(logging.ERROR)
        os.environ.update(_WITHIN_CALLS)
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except AddressError:
        raise
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({type(error).__name__}); start one with `ray "
            "start --head`, have every machine join it, and say where its head is"
        ) from error


def leave() -> None:
    """Leave the cluster. Shards stay."""
    ray.shutdown()


class RayShards(Devices):
    """The shards of a model on the cluster that this process has joined.

    part       of the model; its weights need not be open here
    directory  where the same part lies on every machine of the cluster
    shards     how many; None for those that are there, or one on each GPU, or on each machine
    backend    "cpu" or "cuda"
    tell       is told what it waits for

    name       what multiplies

    Raises ClusterError when there is no room, when the cluster has this model in another number of
    shards, or when one cannot load.
    """

    each, here = 2, False  # one is computed while the next is on its way

    def __init__(
        self,
        part: WorkerPart,
        directory: Path,
        shards: int | None = None,
        backend: str = "cpu",
        tell: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.catalogue, kind = part.catalogue, _KINDS[backend]
        wanted = identity(self.catalogue)
        there = _found(_name(wanted))  # maybe without a machine that it had
        count = shards or (there.bundle_count if there else _room(kind))
        try:
            spans = split([g.in_features * g.total_out for g in part.groups], count)
        except ValueError as error:
            raise ClusterError(f"{error}; ask for fewer") from error
        self.count = len(spans)
        self._of = [device for device, span in enumerate(spans) for _ in range(2 * len(span))]
        tell(f"room for {self.count} shards, a {kind} each")
        place, made = _placed(_name(wanted), self.count, kind)
        self._shards: list[Any] = []
        for i, span in enumerate(spans):
            actor: Any = ray.remote(Shard)
            actor = actor.options(
                name=f"{_name(wanted)}-{i}", lifetime="detached", get_if_exists=True,
                max_restarts=-1, max_task_retries=-1, runtime_env={"env_vars": _WITHIN_CALLS},
                num_cpus=float(kind == "CPU"), num_gpus=float(kind == "GPU"),
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, i),
            )  # fmt: skip
            self._shards.append(
                actor.remote(str(directory), wanted, span.start, span.stop, backend)
            )
        tell(f"{self.count} shards to load")
        try:
            self.name = _loaded(self._shards)
        except ClusterError:
            if made:  # nobody else's
                _end(_name(wanted), place)
            raise

    def of(self, matrix: int) -> int:
        return self._of[matrix]

    def multiply(
        self, matrix: int, requests: Sequence[tuple[AnyPayload, int]]
    ) -> Sequence[AnyPayload]:
        ask: Any = self._shards[self._of[matrix]].multiply.options(num_returns=len(requests))
        found = ask.remote(
            matrix, [tokens for _, tokens in requests],
            *(np.frombuffer(payload, np.uint8) for payload, _ in requests),
        )  # fmt: skip
        try:
            answers: Sequence[AnyPayload] = ray.get(found)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError("a shard refuses a request") from None
            raise
        except _FOR_GOOD as error:
            raise DevicesGoneError(f"a shard has ended for good: {_last_line(error)}") from error
        return answers


def release(part: WorkerPart) -> bool:
    """End the shards of a model, whoever made them; False when there were none."""
    name = _name(identity(part.catalogue))
    place = _found(name)
    if place is None:
        return False
    _end(name, place)
    return True


def _found(name: str) -> PlacementGroup | None:
    try:
        return get_placement_group(name)
    except ValueError:
        return None


def _end(name: str, place: PlacementGroup) -> None:
    """Every shard, for good, and then its room: without that they would be started again."""
    for i in range(place.bundle_count):
        with suppress(ValueError):  # it was never made
            ray.kill(ray.get_actor(f"{name}-{i}"))
    remove_placement_group(place)


def _name(model: bytes) -> str:
    return f"shards-{model.hex()[:16]}"


def _room(kind: str) -> int:
    """Shards that the cluster has room for: one on each GPU, or each machine with a CPU to give."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    each = [int(node["Resources"].get(kind, 0)) for node in nodes if node["Alive"]]
    count = sum(each) if kind == "GPU" else sum(has > 0 for has in each)
    if not count:
        raise ClusterError(f"no machine of the cluster has a {kind} to give")
    return count


def _placed(name: str, count: int, kind: str) -> tuple[PlacementGroup, bool]:
    """Room for the shards, each where the others are not if possible: found, or made (True)."""
    place, made = _found(name), False
    if place is None:
        try:
            place = placement_group([{kind: 1.0}] * count, "SPREAD", name, lifetime="detached")
            made = True
        except RaySystemError:  # another front door came first, a moment ago
            place = get_placement_group(name)
    if place.bundle_count != count or set(place.bundle_specs[0]) != {kind}:
        raise ClusterError(
            f"the cluster has this model in {place.bundle_count} shards, each with "
            f"{place.bundle_specs[0]}; ask for the same, or end them first with --release"
        )
    if not place.wait(_ROOM_S):
        if made:
            remove_placement_group(place)
        raise ClusterError(
            f"the cluster has no room for {count} shards with a {kind} each; add machines, ask for "
            "fewer --shards, or --release another model"
        )
    return place, made


def _loaded(shards: Sequence[Any]) -> str:
    """What multiplies, once all have loaded. Raises ClusterError when one cannot, or is of a
    program that asks and answers otherwise."""
    try:
        versions: list[int] = ray.get([s.version.remote() for s in shards], timeout=_LOAD_S)
        names: list[str] = ray.get([s.name.remote() for s in shards], timeout=_LOAD_S)
    except AttributeError:  # a shard without a version
        versions = []
    except GetTimeoutError:
        raise ClusterError(f"a shard has not loaded within {_LOAD_S:.0f} s") from None
    except RayError as error:
        raise ClusterError(f"a shard cannot load: {_last_line(error)}") from error
    if set(versions) != {VERSION}:
        raise ClusterError(
            "the cluster has this model in shards of another version of private-lora; end them "
            "with --release, once no front door uses them, and start again"
        )
    return names[0]


def _last_line(error: RayError) -> str:
    """Where the text of what ended a shard is."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
