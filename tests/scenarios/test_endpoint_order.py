"""Requests of a recipe that come late, twice, out of order or never, and the places they take."""

from __future__ import annotations

import itertools
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scenarios.endpoint import server as server_module
from scenarios.endpoint import turns as turns_module
from scenarios.endpoint.fields import RequestError
from scenarios.endpoint.futures import Queue
from scenarios.endpoint.requests import Sample, state_path
from scenarios.endpoint.sampler import Sampler
from scenarios.endpoint.states import States
from scenarios.endpoint.turns import Turns
from tests.scenarios.endpoint_here import (
    ADAM,
    FORWARD_ONLY,
    NAME,
    RECORDED,
    TEXTS,
    Here,
    Workers,
    addressed,
    datum,
    here,
    loss_of,
    part,
    prompt_of,
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """One for all, with room for two training clients."""
    place = tmp_path_factory.mktemp("endpoint")
    with here(place / "out", place / "cache", "exact", "--clients", "2") as found:
        yield found


@pytest.fixture
def client(running: Here) -> Iterator[str]:
    """A training client of its own."""
    found = running.client()
    yield found
    running.leave(found)


def step(model_id: str, turn: int, **more: Any) -> dict[str, Any]:
    """An optim_step."""
    return {"model_id": model_id, "seq_id": turn, "adam_params": ADAM | more}


def looked_at(running: Here, model_id: str, turn: int) -> float:
    """The loss, forward only."""
    body = addressed(model_id, turn, RECORDED + FORWARD_ONLY)
    return loss_of(running.post("forward_backward", body))


# --- places of training clients ---------------------------------------------------------------


def wanted(session: str, place: int = 0) -> dict[str, Any]:
    return {"session_id": session, "model_seq_id": place, "base_model": NAME,
            "lora_config": {"rank": 2, "seed": 1}}  # fmt: skip


def full(running: Here) -> bool:
    """Whether there is no room for two training clients."""
    session = running.post("create_session", {"tags": []})["session_id"]
    answers = [running.ask("POST", "create_model", wanted(session, n))[0] for n in range(2)]
    running.post(f"sessions/{session}/finish", {})
    return answers != [200, 200]


@pytest.mark.parametrize("error", [RequestError("no"), ValueError("a defect"), MemoryError()])
def test_a_client_that_could_not_be_made_takes_no_place(
    running: Here, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """However often its recipe asks again, whose answer stays the same."""

    def create(*_: object) -> None:
        raise error

    session = running.post("create_session", {"tags": []})["session_id"]
    with monkeypatch.context() as patch:
        patch.setattr(running.service._learner, "create", create)
        told = running.post("create_model", wanted(session))
    assert "error" in told
    assert [running.post("create_model", wanted(session)) for _ in range(3)] == [told] * 3
    assert not full(running)
    assert running.post("create_model", wanted(session, 1))["model_id"].endswith(":1")
    running.post(f"sessions/{session}/finish", {})


def test_a_client_that_found_the_queue_full_takes_no_place(
    running: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told to wait, and may ask again."""
    session = running.post("create_session", {"tags": []})["session_id"]
    with monkeypatch.context() as patch:
        patch.setattr("scenarios.endpoint.futures._WAITING_MAX", 0)
        assert running.ask("POST", "create_model", wanted(session))[0] == 429
    assert not full(running)
    assert "error" not in running.post("create_model", wanted(session))
    running.post(f"sessions/{session}/finish", {})


def test_a_client_is_not_made_anew_over_one_that_lives(running: Here, client: str) -> None:
    """Not even where what came of making it was forgotten."""
    before = looked_at(running, client, 1)
    session = client.partition(":")[0]
    with running.service.queue._changed:
        del running.service.queue._jobs[f"{client}:0"]
    status, told = running.ask("POST", "create_model", wanted(session))
    assert (status, "no such request" in told["error"]) == (404, True)
    assert looked_at(running, client, 2) == pytest.approx(before, rel=1e-5)


# --- the order of requests --------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_requests_that_overtake_each_other_wait_for_their_turn(
    running: Here, client: str, order: tuple[int, ...]
) -> None:
    """As of a client that sends several at once, the first of them last."""
    bodies: list[tuple[str, bytes | dict[str, Any]]] = [
        ("forward_backward", addressed(client, 1, datum(*TEXTS[0][:2]))),
        ("forward_backward", addressed(client, 2, datum(*TEXTS[1][:2]))),
        ("optim_step", step(client, 3)),
    ]
    for place in order:
        assert running.ask("POST", *bodies[place])[0] == 200
    answers = [running.post(*body) for body in bodies]  # each again: it is not computed twice
    assert not [a for a in answers if not isinstance(a, bytes) and "error" in a]
    other = running.client()
    for place, (path, body) in enumerate(bodies):
        turn = addressed(other, place + 1, datum(*TEXTS[place][:2])) if place < 2 else body
        running.post(path, turn if isinstance(turn, bytes) else step(other, 3))
    assert looked_at(running, client, 4) == pytest.approx(looked_at(running, other, 4), rel=1e-4)
    running.leave(other)


def broken(kind: str) -> tuple[bytes, str]:
    """Data that are refused, after which the request says whether it is forward only."""
    image = part(3, part(1, part(2, b"\x0a\x01x")) + part(2, b""))
    return {
        "ids": (datum([96], [1]), "not below 96"),
        "loss": (datum([1], [1], b"cispo"), "this loss"),
        "image": (image + part(4, b"ppo"), "text only"),
    }[kind]


@pytest.mark.parametrize("kind", ["ids", "loss", "image"])
@pytest.mark.parametrize("forward_only", [True, False])
def test_only_a_refused_backward_pass_spoils_the_step(
    running: Here, client: str, monkeypatch: pytest.MonkeyPatch, kind: str, forward_only: bool
) -> None:
    """And nobody waits for the turn of what was refused."""
    monkeypatch.setattr(turns_module, "PATIENCE_S", 1e6)
    running.post("forward_backward", addressed(client, 1, RECORDED))
    body, why = broken(kind)
    body += FORWARD_ONLY if forward_only else b""
    status, told = running.ask("POST", "forward_backward", addressed(client, 2, body))
    assert (status, why in told["error"]) == (400, True), told
    answer = running.post("optim_step", step(client, 3))
    assert ("error" in answer) == (not forward_only), answer
    if not forward_only:
        assert "not whole" in answer["error"]


REFUSED: list[tuple[str, Callable[[str], dict[str, Any]]]] = [
    ("optim_step", lambda client: step(client, 2, beta1=1.0)),
    ("save_weights", lambda client: {"model_id": client, "seq_id": 2, "path": "../x"}),
    ("save_weights_for_sampler", lambda client: {"model_id": client, "seq_id": 2, "path": ""}),
    ("load_weights", lambda client: {
        "model_id": client, "seq_id": 2, "optimizer": False,
        "path": f"tinker://{client}/weights/none",
    }),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), REFUSED, ids=[path for path, _ in REFUSED])
def test_other_refused_requests_change_nothing(
    running: Here, client: str, monkeypatch: pytest.MonkeyPatch, path: str,
    body: Callable[[str], dict[str, Any]],
) -> None:  # fmt: skip
    """The gradients before them are whole; those after them need not wait."""
    monkeypatch.setattr(turns_module, "PATIENCE_S", 1e6)
    running.post("forward_backward", addressed(client, 1, RECORDED))
    assert 400 <= running.ask("POST", path, body(client))[0] < 500
    assert running.post("optim_step", step(client, 3)) == {"metrics": {}}


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (413, {"Content_Length": str(1 << 40)}),
        (411, {"Transfer_Encoding": "chunked"}),
        (415, {"Content_Type": "text/plain"}),
        (415, {"Content_Encoding": "zstd"}),
        (401, {"X_API_Key": "tml-" + "x" * 43}),
        (None, {}),
    ],
)
def test_a_step_without_a_pass_that_was_never_read_is_refused(
    running: Here, client: str, monkeypatch: pytest.MonkeyPatch, status: int | None,
    headers: dict[str, str | None],
) -> None:  # fmt: skip
    """Whose it was nobody knows, but that its number is missing; None never even came."""
    monkeypatch.setattr(turns_module, "PATIENCE_S", 0.1)
    running.post("forward_backward", addressed(client, 1, RECORDED))
    before = looked_at(running, client, 2)
    body = addressed(client, 3, RECORDED)
    if status is not None:
        assert running.ask("POST", "forward_backward", body, **headers)[0] == status
    assert "not whole" in running.post("optim_step", step(client, 4))["error"]
    status, told = running.ask("POST", "forward_backward", body)  # when all is over
    assert (status, "no such request" in told["error"]) == (404, True)
    assert looked_at(running, client, 5) == pytest.approx(before, rel=1e-5)
    running.post("forward_backward", addressed(client, 6, RECORDED))
    assert running.post("optim_step", step(client, 7)) == {"metrics": {}}


def test_who_is_told_to_wait_keeps_the_turn(
    running: Here, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client sends it again: until then it is neither lost nor refused."""
    monkeypatch.setattr(turns_module, "PATIENCE_S", 1e6)
    with monkeypatch.context() as patch:
        patch.setattr("scenarios.endpoint.futures._WAITING_MAX", 0)
        body = addressed(client, 1, RECORDED)
        assert running.ask("POST", "forward_backward", body)[0] == 429
    assert running.ask("POST", "optim_step", step(client, 2))[0] == 200
    running.post("forward_backward", body)
    assert running.post("optim_step", step(client, 2)) == {"metrics": {}}


def test_those_that_wait_for_their_turn_end_with_their_client(running: Here) -> None:
    """Nobody asks for ever, and they take no room in the queue."""
    client = running.client()
    undone = running.service.queue._undone
    running.ask("POST", "optim_step", step(client, 7))
    assert running.service.queue._undone == undone + 1
    running.leave(client)
    assert "not whole" in running.post("retrieve_future", {"request_id": f"{client}:7"})["error"]
    assert running.service.queue._undone == undone


@given(
    order=st.permutations(range(1, 8)), skipped=st.sets(st.integers(1, 7)),
    backward=st.booleans(), steps=st.sets(st.integers(1, 7)),
)  # fmt: skip
def test_turns_come_in_their_order(
    order: list[int], skipped: set[int], backward: bool, steps: set[int]
) -> None:
    """In whatever order they are taken; a step is told of gradients lost since the one before."""
    turns, found = Turns(threading.RLock()), list[tuple[int, bool]]()
    for seq in order:
        if seq in skipped:
            turns.skip(seq, backward)
        else:
            turns.take(seq, lambda lost, seq=seq: found.append((seq, lost)), settles=seq in steps)
        turns.skip(seq, backward=True)  # once more: it is taken already
    wanted, lost = [], False
    for seq in range(1, 8):
        if seq in skipped:
            lost = lost or backward
        else:
            wanted.append((seq, lost))
            lost = lost and seq not in steps
    assert found == wanted
    assert turns._timer is None


def test_tidying_counts_for_nothing() -> None:
    """It finds place in a queue that is full, and no result goes for it."""
    queue = Queue(lambda: None)
    done: list[int] = []

    def tidy(n: int) -> dict[str, Any]:
        done.append(n)
        return {}

    for n in range(512):
        queue.add(f"job{n}", lambda: {"found": 1})
    with pytest.raises(RequestError, match="too much"):
        queue.add("more", dict)
    for n in range(2000):
        queue.tidy(lambda n=n: tidy(n))  # type: ignore[misc]
    queue.tidy(lambda: queue.close() or {})  # type: ignore[func-returns-value]
    queue.work()
    assert done == list(range(2000))
    assert [queue.find(f"job{n}").answer for n in range(512)] == [{"found": 1}] * 512
    assert len(queue._jobs) == 512
    queue.add("more", dict)


# --- connections ------------------------------------------------------------------------------


def connected(running: Here, said: bytes = b"") -> socket.socket:
    line = socket.create_connection(("127.0.0.1", running.server.port), timeout=20)
    line.sendall(said)
    return line


def answered(line: socket.socket) -> bool:
    """Whether a whole answer comes, in however many pieces."""
    found = b""
    while not found.endswith(b'{"status": "ok"}'):
        piece = line.recv(4096)
        if not piece:
            return False
        found += piece
    return found.startswith(b"HTTP/1.1 200 OK")


def request(running: Here, key: str) -> bytes:
    return (
        f"GET /api/v1/healthz HTTP/1.1\r\nHost: 127.0.0.1:{running.server.port}\r\n"
        f"X-API-Key: {key}\r\n\r\n"
    ).encode()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nX: "])
def test_silent_connections_keep_nobody_out(running: Here, said: bytes) -> None:
    """More of them than there are places; who has shown the key keeps the own."""
    known = connected(running, request(running, running.key))
    assert answered(known)
    silent = [connected(running, said) for _ in range(server_module.CONNECTIONS_MAX + 20)]
    try:
        assert running.ask("GET", "healthz") == (200, {"status": "ok"})
        known.sendall(request(running, running.key))
        assert answered(known)
    finally:
        for line in (known, *silent):
            line.close()


@pytest.mark.parametrize("said", ["", "GET / HT", "X", "body"])
def test_who_sends_no_whole_request_is_not_waited_for(
    running: Here, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """Not even with a byte now and then, nor with the key."""
    monkeypatch.setattr(server_module, "FIRST_S", 0.4)
    head = request(running, running.key).replace(b"GET", b"POST")[:-2]
    body = head + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    line = connected(running, body if said == "body" else said.encode())
    line.settimeout(0.1)
    ended, begun = False, time.monotonic()
    while not ended and time.monotonic() - begun < 5:
        try:
            line.sendall(b"a")
            ended = line.recv(4096) == b""
        except TimeoutError:
            pass
        except OSError:
            ended = True
    line.close()
    assert ended


# --- samples ----------------------------------------------------------------------------------


def test_stops_that_are_texts_are_found_where_they_first_end() -> None:
    """As by reading every beginning; and without reading them all."""
    read = 0
    words = ["a", "b", "ab", "ba", "\u00fc", "abba"]

    def decode(row: Any) -> str:
        nonlocal read
        read += len(row)
        return "".join(words[token] for token in row)

    sampler = Sampler(cast(Any, None), [5], decode)
    draw = random.Random(0)
    for _ in range(200):
        row = [draw.randrange(6) for _ in range(draw.randrange(1, 12))]
        stop = tuple(draw.choice(["bab", "\u00fcb", "aa", "zz"]) for _ in range(draw.randrange(3)))
        found = sampler._end(row, cast(Sample, SimpleNamespace(stop=stop)))
        slow = next(
            (n for n in range(1, len(row) + 1) if any(t in decode(row[:n]) for t in stop)), None
        )
        assert found == slow
    count, read = 8192, 0
    for row in ([0] * count, [0] * (count - 1) + [1]):
        sampler._end(row, cast(Sample, SimpleNamespace(stop=("ab",))))
    assert read <= 2 * count * (2 + math.log2(count))
    by_id = sampler._end([0, 5, 0, 1], cast(Sample, SimpleNamespace(stop=None)))
    assert by_id == 2


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-45, 1e-8, 9.9e-5, 1e-4])
def test_a_cold_sample_is_the_likeliest(running: Here, client: str, temperature: float) -> None:
    """Scores over a temperature near nothing would overflow."""
    sampler = running.post("create_sampling_session", {
        "session_id": client.partition(":")[0], "sampling_session_seq_id": 0, "base_model": NAME
    })["sampling_session_id"]  # fmt: skip
    asked = prompt_of([5, 17], sampling_session_id=sampler, num_samples=2)
    greedy = running.post("asample", asked | {"seq_id": 0})
    asked["sampling_params"] |= {"temperature": temperature, "seed": 3}
    found = running.post("asample", asked | {"seq_id": 1})
    assert isinstance(found, bytes), found
    assert tokens_of(found) == tokens_of(greedy)


def tokens_of(answer: bytes) -> list[list[int]]:
    """Of two sequences of four tokens each."""
    each = [answer[: len(answer) // 2], answer[len(answer) // 2 :]]
    return [np.frombuffer(one[6:22], "<i4").tolist() for one in each]


# --- steps, states ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_step_whose_gradients_are_not_finite_changes_nothing(
    running: Here, client: str, bad: float
) -> None:
    """Nor one whose norm is not; the next one is a step like any other."""
    learner = running.service._learner
    running.post("forward_backward", addressed(client, 1, RECORDED))
    slot = running.service._here.client(client).slot
    before = learner.weights(slot)
    for parameter in learner._parameters(slot).values():
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = bad
    assert "not finite" in running.post("optim_step", step(client, 2))["error"]
    assert all(torch.equal(t, before[n]) for n, t in learner.weights(slot).items())
    assert "nothing to learn" in running.post("optim_step", step(client, 3))["error"]
    running.post("forward_backward", addressed(client, 4, RECORDED))
    assert running.post("optim_step", step(client, 5)) == {"metrics": {}}


def test_what_rests_on_a_worker_found_lying_later_is_of_no_use(
    running: Here, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved, in memory, loaded by a client, sampled from: all of it was usable until then."""
    session = client.partition(":")[0]
    running.post("forward_backward", addressed(client, 1, RECORDED))
    saved = {"model_id": client, "seq_id": 2, "path": "later"}
    path = running.post("save_weights", saved)["path"]
    to_sample = running.post("save_weights_for_sampler", saved | {"seq_id": 3})["path"]
    copy = running.post("save_weights_for_sampler", {
        "model_id": client, "seq_id": 4, "sampling_session_seq_id": 10
    })["sampling_session_id"]  # fmt: skip
    on_disk = running.post("create_sampling_session", {
        "session_id": session, "sampling_session_seq_id": 11, "model_path": to_sample
    })["sampling_session_id"]  # fmt: skip
    load = {"model_id": client, "path": path, "optimizer": False}
    assert "error" not in running.post("load_weights", load | {"seq_id": 5})
    for sampler in (copy, on_disk):
        asked = prompt_of([5], sampling_session_id=sampler, seq_id=0)
        assert isinstance(running.post("asample", asked), bytes)

    (worker,) = running.service._states.served
    known = Workers(frozenset(), {worker: "it lied"})
    monkeypatch.setattr(running.service._states, "_known", known)
    status, told = running.ask("POST", "load_weights", load | {"seq_id": 6})
    assert (status, "which gave wrong answers" in told["error"]) == (400, True)
    for sampler in (copy, on_disk):
        asked = prompt_of([5], sampling_session_id=sampler, seq_id=1)
        assert "which gave wrong answers" in running.post("asample", asked)["error"]
    for turn, (name, body) in enumerate((
        ("forward_backward", addressed(client, 7, RECORDED)),
        ("optim_step", step(client, 8)),
        ("save_weights", saved | {"seq_id": 9, "path": "after"}),
    )):  # fmt: skip
        assert "which gave wrong answers" in running.post(name, body)["error"], turn
    assert not list((running.out / "states").rglob("after"))
    status, told = running.ask("POST", "create_sampling_session", {
        "session_id": session, "sampling_session_seq_id": 12, "model_path": to_sample
    })  # fmt: skip
    assert (status, "which gave wrong answers" in told["error"]) == (400, True)


def test_states_that_a_crash_cut_short_are_as_they_were(running: Here, client: str) -> None:
    """One that was being overwritten comes back; what was being written goes; others stay."""
    paths = {}
    for turn, name in enumerate(("whole", "moved"), 1):
        save = {"model_id": client, "seq_id": turn, "path": name}
        paths[name] = state_path(running.post("save_weights", save)["path"])
    states = running.service._states
    whole, moved = (states.place(path) for path in paths.values())
    moved.rename(moved.parent / f".moved.{'1' * 16}.old")
    half = whole.parent / f".whole.{'2' * 16}.tmp"
    half.mkdir()
    (half / "state.json").write_text("{")
    States(running.out / "states", running.public.identity, 4096, Workers(frozenset(), {}))
    assert {place.name for place in whole.parent.iterdir()} == {"whole", "moved"}
    for path in paths.values():
        assert states.about(path)[0].rank == 4
