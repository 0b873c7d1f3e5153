"""Who is here: sessions, their training clients and samplers, and whose request is whose."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from backends.errors import UserError
from scenarios.endpoint.fields import RequestError
from scenarios.endpoint.futures import Answer, Queue
from scenarios.endpoint.requests import Lora, StatePath
from scenarios.endpoint.states import Kept
from scenarios.endpoint.turns import Turns, turn_of

_LOST_S = 120.0
"""A session whose client has said nothing for so long gives its place to others; it says something
every 10 s."""
_SESSIONS_MAX, _SNAPSHOTS_MAX, _SAMPLERS_MAX = 256, 16, 4096
_SENT_AGAIN = (408, 409, 429)
"""What the client, told so, sends the same request again for."""


@dataclass
class _Session:
    heard: float
    models: set[str] = field(default_factory=set)


@dataclass
class Client:
    """A training client.

    slot     its adapter's name
    rests_on workers of earlier runs, whose answers are in what it loaded
    """

    slot: str
    lora: Lora
    turns: Turns
    rests_on: frozenset[str] = frozenset()


@dataclass
class Sampling:
    """What a sampling session samples from: what was saved, as it was when it was first asked for;
    a copy in memory alone; or, without either, the base."""

    path: StatePath | None = None
    kept: Kept | None = None


class Clients:
    """Sessions, training clients and samplers by their names. Safe to use from several threads.

    queue  of what they ask
    most   training clients at once
    drop   forgets an adapter
    """

    def __init__(self, queue: Queue, most: int, drop: Callable[[str], None]) -> None:
        self._queue, self._most, self._forget = queue, most, drop
        self._lock = threading.RLock()
        self._sessions: dict[str, _Session] = {}
        self._clients: dict[str, Client] = {}
        self._samplers: OrderedDict[str, Sampling] = OrderedDict()
        self._slots = 0

    def begin(self) -> str:
        """A new session's name; the longest unheard one goes when there are too many."""
        with self._lock:
            if len(self._sessions) >= _SESSIONS_MAX:
                self.finish(min(self._sessions, key=lambda s: self._sessions[s].heard))
            name = f"session-{secrets.token_hex(16)}"
            self._sessions[name] = _Session(time.monotonic())
        return name

    def heard(self, session: str) -> None:
        """Its client is alive. Raises RequestError where there is none."""
        with self._lock:
            self._session(session).heard = time.monotonic()

    def finish(self, session: str) -> None:
        """It has ended, if it was there; its adapters and samplers are forgotten."""
        with self._lock:
            if session not in self._sessions:
                return
            for name in self._sessions.pop(session).models:
                client = self._clients.pop(name, None)
                if client is not None:
                    client.turns.end()
                    self._queue.tidy(partial(self._drop, client.slot))
            for sampler in [s for s in self._samplers if s.startswith(f"{session}:")]:
                del self._samplers[sampler]

    def client(self, name: str) -> Client:
        """Raises RequestError where there is none."""
        with self._lock:
            found = self._clients.get(name)
        if found is None:
            raise RequestError("there is no such training client, or it has ended", 404)
        return found

    def sampling(self, name: str) -> Sampling:
        """Raises RequestError where there is none."""
        with self._lock:
            found = self._samplers.get(name)
        if found is None:
            raise RequestError(
                f"there is no such sampling client; copies of the last {_SNAPSHOTS_MAX} are kept, "
                "and save_weights_for_sampler(name) keeps one for good", 404
            )  # fmt: skip
        return found

    def new_sampler(self, session: str, name: str, path: StatePath | None) -> None:
        """One of this session. Raises RequestError where there is none."""
        with self._lock:
            self._session(session)
            self.remember(name, Sampling(path))

    def remember(self, name: str, sampling: Sampling) -> None:
        """The oldest copies go; what is on disk is read anew then."""
        with self._lock:
            self._samplers[name] = sampling
            copies = [n for n, s in self._samplers.items() if s.kept is not None]
            for old in copies[: max(0, len(copies) - _SNAPSHOTS_MAX)]:
                if self._samplers[old].path is None:
                    del self._samplers[old]
                else:
                    self._samplers[old].kept = None
            while len(self._samplers) > _SAMPLERS_MAX:
                self._samplers.popitem(last=False)

    def new_client(
        self, session: str, model_id: str, lora: Lora, work: Callable[[str], Answer]
    ) -> str:
        """The request for a training client, whose adapter is made by `work`, told its name.

        Raises RequestError where there is no room.
        """
        name = f"{model_id}:0"
        with self._lock:
            held = self._session(session)
            if model_id in self._clients or self._queue.knows(name):
                self._queue.find(name)  # one that failed stays so, and takes no place again
                return name
            self._require_room(session)
            self._slots += 1
            slot = f"client{self._slots}"
            self._queue.add(name, lambda: self._made(slot, work))
            self._clients[model_id] = Client(slot, lora, Turns(self._lock))
            held.models.add(model_id)
        return name

    def in_turn(
        self, model_id: str, seq: int, work: Callable[[Client, bool], Answer], size: int = 0,
        settles: bool = False,
    ) -> str:  # fmt: skip
        """A request of a client: computed in its order, and only once.

        work     is told whether gradients before it were lost
        settles  whether it leaves none that were

        Raises RequestError for a client that is not there, and when too much is waiting.
        """
        name = f"{model_id}:{seq}"
        with self._lock:
            client = self.client(model_id)
            if client.turns.came(seq):
                self._queue.find(name)
            else:
                self._queue.promise(name, size)

                def start(lost: bool) -> None:
                    self._queue.begin(name, partial(work, client, lost))

                client.turns.take(seq, start, settles)
        return name

    @contextmanager
    def asking(self, body: bytes, binary: bool = False) -> Iterator[None]:
        """Around what a request of a training client asks: where it is refused, those that follow
        it need not wait, and a step must not be made without its gradients."""
        try:
            yield
        except (RequestError, UserError) as error:
            turn = turn_of(body, binary)
            with self._lock:
                client = self._clients.get(turn.model_id) if turn else None
                if turn and client and getattr(error, "status", 400) not in _SENT_AGAIN:
                    client.turns.skip(turn.seq, turn.backward)
            raise

    def _session(self, name: str) -> _Session:
        found = self._sessions.get(name)
        if found is None:
            raise RequestError("there is no such session; the endpoint was started anew?", 410)
        return found

    def _made(self, slot: str, work: Callable[[str], Answer]) -> Answer:
        try:
            return work(slot)
        except BaseException:
            with self._lock:
                for name in [n for n, c in self._clients.items() if c.slot == slot]:
                    self._clients.pop(name).turns.end()
            self._forget(slot)
            raise

    def _require_room(self, session: str) -> None:
        """For one more training client; those of clients that are gone make room."""
        if len(self._clients) >= self._most:
            now = time.monotonic()
            for name in [n for n, s in self._sessions.items() if now - s.heard > _LOST_S]:
                if name != session:
                    self.finish(name)
        if len(self._clients) >= self._most:
            raise RequestError(
                f"{self._most} training clients are open: end one (`with ServiceClient() as ...` "
                "does at its end), or start the endpoint with more --clients"
            )

    def _drop(self, slot: str) -> Answer:
        self._forget(slot)
        return {}
