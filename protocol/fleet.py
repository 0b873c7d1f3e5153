"""Which worker gets the next request, and how long an owner waits for its answer."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from protocol.owner_memory import Call, OwnerConfig, Peer
from protocol.owner_tables import CallState, State
from protocol.pace import Pace
from protocol.placement import Placement

_QUICKEST_S = 1e-12
"""Seconds a byte takes at least: where answers take no time at all, the loads still count."""
_SLOWER = 8
"""A worker may be so many times slower than the fastest other one, and is waited for."""


class Load(NamedTuple):
    """What is in flight to one worker: requests, and bytes of them and of their answers."""

    requests: int = 0
    size: int = 0

    def more(self, call: Call) -> Load:
        """With one request more."""
        return Load(self.requests + 1, self.size + call.size)


_IDLE = Load()


@dataclass(frozen=True)
class Fleet:
    """An owner's workers and calls, as the owner remembers them; nothing here changes them."""

    peers: Mapping[str, Peer]
    calls: Mapping[int, Call]
    placement: Placement
    config: OwnerConfig

    def loads(self) -> dict[str, Load]:
        """What is in flight to every worker that is ready."""
        ready = [peer.name for peer in self.peers.values() if peer.state is State.READY]
        found = dict.fromkeys(ready, _IDLE)
        for call in self.calls.values():
            if call.state is CallState.IN_FLIGHT and call.peer in found:
                found[call.peer] = found[call.peer].more(call)
        return found

    def choose(self, call: Call, loads: Mapping[str, Load], but: Container[str] = ()) -> str | None:
        """The worker that should be the first to have answered a call, the first of equals.

        By the bytes ahead of the answer; reluctance weighs as bytes that many times, and so does
        being `slower_min` times as slow as the fastest that has answered, or more. None when no
        worker holds the matrix, takes so many tokens and has room.
        """
        names = [
            name
            for name in self.placement.holders(call.matrix, loads)
            if name not in but and self._has_room(name, loads[name], call)
        ]
        seen = [peer.pace.mean_s for peer in self.peers.values() if peer.pace.seen]
        fastest_s = max(min(seen, default=0.0), _QUICKEST_S)

        def weight(name: str) -> float:
            peer = self.peers[name]
            slower = peer.pace.mean_s / fastest_s if peer.pace.seen else 1.0
            slower = slower if slower >= self.config.slower_min else 1.0
            return slower * (loads[name].size + call.size) * (1 + peer.reluctance)

        return min(names, key=weight, default=None)

    def _has_room(self, name: str, load: Load, call: Call) -> bool:
        fits = not load.size or load.size + call.size <= self.config.window_bytes
        takes = self.peers[name].max_tokens >= call.tokens
        return takes and fits and load.requests < self.config.window

    def coming(self, matrix: int) -> bool:
        """Whether a worker that is still being greeted may take what the ready ones cannot."""
        greeted = (State.NEW, State.GREETING)
        names = {peer.name for peer in self.peers.values() if peer.state in greeted}
        return bool(self.placement.holders(matrix, names))

    def patience(self, call: Call) -> float:
        """Seconds to wait for the answer to what is being sent now, behind what is on its way."""
        config, peer = self.config, self.peers[call.peer]
        quiet_s, pace = config.request_timeout_s, self._slowest()
        if peer.pace.seen:
            quiet_s, pace = min(quiet_s, config.quiet_s), peer.pace
        loads = self.loads()
        behind = loads[call.peer].size
        seconds = pace.seconds(behind)
        # A worker must not be waited for without end because it has been slow for long.
        others = [
            self.peers[name].pace.seconds(behind)
            for name in self.placement.holders(call.matrix, loads)
            if name != call.peer and self.peers[name].pace.seen
        ]
        seconds = min([seconds, *(_SLOWER * other for other in others)])
        return min(config.doubled(quiet_s, call.attempts) + seconds, config.wait_s_max)

    def _slowest(self) -> Pace:
        """Of the workers that have answered; when none has, what the configuration assumes."""
        seen = [peer.pace for peer in self.peers.values() if peer.pace.seen]
        assumed = Pace(1 / self.config.slow_bytes_per_s)
        return max(seen, key=lambda pace: pace.mean_s, default=assumed)
