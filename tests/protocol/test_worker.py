"""The worker's machine, rule by rule; the test plays the driver and the owners."""

from __future__ import annotations

import pytest

from protocol.admission import Quota
from protocol.catalogue import Catalogue, MatrixShape
from protocol.errors import MisuseError
from protocol.events import (
    CloseWanted,
    Effect,
    FrameArrived,
    MultiplyCiphertext,
    PeerLost,
    RunTask,
    Send,
    TaskDone,
    TaskFailed,
    TimerFired,
)
from protocol.messages import (
    MAX_BODY_BYTES,
    OVERHEAD_BYTES,
    VERSION,
    Bye,
    Farewell,
    Hello,
    Message,
    Multiply,
    Product,
    Reason,
    Refuse,
    Welcome,
    decode,
    encode,
)
from protocol.worker import State, Worker, WorkerConfig
from tests.protocol.toys import (
    CATALOGUE,
    HELLO,
    MODEL,
    OTHER_SESSION,
    PARAMETERS,
    SESSION,
    STRANGE,
    WorkerDesk,
    all_of,
    is_dropped,
    one,
)


def said(effects: list[Effect]) -> Message:
    """The one message sent."""
    return decode(one(effects, Send).frame)


# --- sessions ---------------------------------------------------------------------------------


def test_a_hello_is_welcomed_as_often_as_it_comes() -> None:
    """The Welcome repeats what both sides pinned and states the worker's limit."""
    desk = WorkerDesk(WorkerConfig(max_tokens=9))
    for _ in range(2):
        assert said(desk.hear(HELLO)) == Welcome(SESSION, PARAMETERS, MODEL, 9)
    assert desk.worker.state("o1") is State.SERVING


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(SESSION, STRANGE, MODEL), Reason.OTHER_PARAMETERS),
        (Hello(SESSION, PARAMETERS, STRANGE), Reason.OTHER_MODEL),
        (Hello(SESSION, STRANGE, STRANGE), Reason.OTHER_PARAMETERS),
    ],
)
def test_another_model_or_parameter_set_is_refused(hello: Hello, reason: Reason) -> None:
    """The refusal says which, and opens nothing."""
    desk = WorkerDesk()
    assert said(desk.hear(hello)) == Refuse(SESSION, 0, reason)
    assert desk.worker.state("o1") is State.ABSENT


def of_version(frame: bytes, version: int) -> bytes:
    """The same frame, from a side that speaks another version."""
    return frame[:4] + bytes([version]) + frame[5:]


@pytest.mark.parametrize("version", [0, VERSION + 1, 255])
@pytest.mark.parametrize(
    "frame",
    [
        encode(Hello(OTHER_SESSION, PARAMETERS, MODEL)),
        encode(Multiply(OTHER_SESSION, 1, 0, 1, bytes(4))),
        encode(Bye(OTHER_SESSION)) + b"a field we do not know",
    ],
    ids=["Hello", "Multiply", "Bye"],
)
def test_another_version_is_refused_by_name(frame: bytes, version: int) -> None:
    """Whatever it says, its owner is told why nothing comes of it; an open session goes on."""
    desk = WorkerDesk().open()
    effects = desk.do(FrameArrived("o1", of_version(frame, version)))
    assert said(effects) == Refuse(OTHER_SESSION, 0, Reason.OTHER_VERSION)
    assert desk.worker.state("o1") is State.SERVING
    assert all_of(desk.ask(), RunTask)


def test_a_refusal_of_another_version_is_not_answered() -> None:
    """Or two workers of different versions, joined by mistake, would refuse each other for ever."""
    desk = WorkerDesk()
    frame = encode(Refuse(SESSION, 0, Reason.OTHER_VERSION))
    assert is_dropped(desk.do(FrameArrived("o1", of_version(frame, VERSION + 1))))


def test_a_strange_hello_leaves_an_open_session_alone() -> None:
    """The session that works goes on."""
    desk = WorkerDesk().open()
    desk.hear(Hello(OTHER_SESSION, STRANGE, MODEL))
    assert all_of(desk.ask(), RunTask)


def test_a_new_incarnation_replaces_the_old_one() -> None:
    """Work of the old session ends without an answer; its requests are refused."""
    desk = WorkerDesk().open()
    task = one(desk.ask(1), RunTask).task
    desk.hear(Hello(OTHER_SESSION, PARAMETERS, MODEL))
    assert desk.do(TaskDone(task, bytes(8))) == []
    assert said(desk.ask(2)) == Refuse(SESSION, 2, Reason.NO_SESSION)
    assert all_of(desk.ask(2, OTHER_SESSION), RunTask)


@pytest.mark.parametrize("greeted", [False, True])
def test_a_request_of_no_session_is_refused(greeted: bool) -> None:
    """Never greeted, or greeted under another id: the owner must greet again."""
    desk = WorkerDesk()
    if greeted:
        desk.open()
    assert said(desk.ask(5, OTHER_SESSION)) == Refuse(OTHER_SESSION, 5, Reason.NO_SESSION)


def test_a_bye_ends_the_session() -> None:
    """Confirmed as often as it comes; what was in work is not answered."""
    desk = WorkerDesk().open()
    task = one(desk.ask(1), RunTask).task
    for _ in range(2):
        assert said(desk.hear(Bye(SESSION))) == Farewell(SESSION)
    assert desk.worker.state("o1") is State.ENDED
    assert desk.do(TaskDone(task, bytes(8))) == []
    assert said(desk.ask(2)) == Refuse(SESSION, 2, Reason.NO_SESSION)


def test_a_bye_of_another_session_is_confirmed_and_changes_nothing() -> None:
    """So an owner whose worker lost its memory can still close."""
    desk = WorkerDesk()
    assert said(desk.hear(Bye(SESSION))) == Farewell(SESSION)
    desk.open()
    assert said(desk.hear(Bye(OTHER_SESSION))) == Farewell(OTHER_SESSION)
    assert desk.worker.state("o1") is State.SERVING


def test_a_lost_peer_is_forgotten() -> None:
    """With everything it had in work; a peer never seen is no matter."""
    desk = WorkerDesk().open()
    tasks = [one(desk.ask(request), RunTask).task for request in (1, 2)]
    assert desk.do(PeerLost("o1")) == []
    assert desk.worker.state("o1") is State.ABSENT
    assert desk.do(TaskDone(tasks[0], bytes(8))) == []
    assert desk.do(TaskFailed(tasks[1], "late")) == []
    assert desk.do(PeerLost("nobody")) == []


def test_sessions_are_bounded() -> None:
    """One peer too many is refused as BUSY; those inside may greet again; a loss makes room."""
    desk = WorkerDesk(WorkerConfig(max_peers=2)).open("o1").open("o2")
    assert said(desk.hear(HELLO, "o3")) == Refuse(SESSION, 0, Reason.BUSY)
    assert desk.worker.state("o3") is State.ABSENT
    assert isinstance(said(desk.hear(HELLO, "o2")), Welcome)
    desk.do(PeerLost("o1"))
    assert isinstance(said(desk.hear(HELLO, "o3")), Welcome)


def test_owners_do_not_mix() -> None:
    """Two peers may use the same request numbers; each gets its own answer."""
    desk = WorkerDesk().open("o1").open("o2")
    tasks = {peer: one(desk.ask(1, peer=peer), RunTask).task for peer in ("o1", "o2")}
    for peer, task in tasks.items():
        assert one(desk.do(TaskDone(task, bytes(8))), Send).peer == peer


# --- requests ---------------------------------------------------------------------------------


def test_request_and_answer() -> None:
    """The task holds the request's bytes, the answer the task's."""
    desk = WorkerDesk().open()
    run = one(desk.hear(Multiply(SESSION, 7, 1, 2, b"12345678")), RunTask)
    assert run.work == MultiplyCiphertext(1, 2, b"12345678")
    answer = bytes(range(16))
    assert said(desk.do(TaskDone(run.task, answer))) == Product(SESSION, 7, answer)


def test_a_repeated_request_is_computed_once_at_a_time() -> None:
    """In work: dropped. Answered already: computed again, as nothing is remembered."""
    desk = WorkerDesk().open()
    task = one(desk.ask(1), RunTask).task
    assert is_dropped(desk.ask(1))
    desk.do(TaskDone(task, bytes(8)))
    assert one(desk.ask(1), RunTask).task != task


def test_a_second_hello_of_the_same_session_keeps_its_work() -> None:
    """A duplicate Hello does not make a request in work start again."""
    desk = WorkerDesk().open()
    task = one(desk.ask(1), RunTask).task
    desk.open()
    assert is_dropped(desk.ask(1))
    assert isinstance(said(desk.do(TaskDone(task, bytes(8)))), Product)


def test_a_failed_computation_is_refused_without_its_reason() -> None:
    """The wire says FAILED and no more; the request may come again."""
    desk = WorkerDesk().open()
    task = one(desk.ask(1), RunTask).task
    assert said(desk.do(TaskFailed(task, "out of memory"))) == Refuse(SESSION, 1, Reason.FAILED)
    assert all_of(desk.ask(1), RunTask)


def is_busy(effects: list[Effect], request: int) -> bool:
    """Whether a request is put off, and told when to come again."""
    told = said(effects)
    assert isinstance(told, Refuse)
    return (told.request, told.reason, told.after_ms > 0) == (request, Reason.BUSY, True)


def test_links_of_one_client_share_its_quota() -> None:
    """However many it has, and whichever ends meanwhile; sessions are counted likewise."""
    config = WorkerConfig(quota=Quota(requests=2), max_sessions=2)
    desk = WorkerDesk(config, client_of=lambda peer: peer.partition("#")[0])
    desk.open("ann#1").open("ann#2").open("ben#3")
    assert all_of(desk.ask(1, peer="ann#1"), RunTask)
    task = one(desk.ask(1, peer="ann#2"), RunTask).task
    assert is_busy(desk.ask(2, peer="ann#1"), 2)
    assert all_of(desk.ask(1, peer="ben#3"), RunTask)
    assert said(desk.hear(HELLO, "ann#4")) == Refuse(SESSION, 0, Reason.BUSY)
    desk.do(PeerLost("ann#2"))
    assert isinstance(said(desk.hear(HELLO, "ann#4")), Welcome)
    assert is_busy(desk.ask(2, peer="ann#4"), 2), "its lost link's work still goes on"
    desk.do(TaskDone(task, bytes(8)))
    assert all_of(desk.ask(2, peer="ann#4"), RunTask)


def test_a_client_over_its_rate_is_told_when_to_come_back() -> None:
    """And is taken then: 12 bytes a token here, 12 a second, and no burst."""
    desk = WorkerDesk(WorkerConfig(quota=Quota(bytes_per_s=12.0, burst_s=0.0))).open()
    assert all_of(desk.ask(1, tokens=3), RunTask)
    told = said(desk.ask(2))
    assert told == Refuse(SESSION, 2, Reason.BUSY, 3000)
    desk.now += 2.9
    assert is_busy(desk.ask(2), 2)
    desk.now += 0.2
    assert all_of(desk.ask(2), RunTask)


def test_requests_in_work_are_bounded() -> None:
    """One too many is refused as BUSY; an end makes room."""
    desk = WorkerDesk(WorkerConfig(quota=Quota(requests=2))).open()
    task = one(desk.ask(1), RunTask).task
    desk.ask(2)
    assert is_busy(desk.ask(3), 3)
    desk.do(TaskDone(task, bytes(8)))
    assert all_of(desk.ask(3), RunTask)


def test_bytes_in_work_are_bounded() -> None:
    """Of one peer and of all, 12 a token here; what would be the only one is taken all the same."""
    desk = WorkerDesk(WorkerConfig(quota=Quota(size=24, size_all=60))).open("o1").open("o2")
    large = one(desk.ask(1, tokens=4), RunTask).task
    assert is_busy(desk.ask(2), 2), "of this peer"
    assert all_of(desk.ask(1, peer="o2"), RunTask), "60 of all, the bound itself"
    assert is_busy(desk.ask(2, peer="o2"), 2), "of all"
    desk.do(TaskDone(large, bytes(32)))
    assert all_of(desk.ask(2, peer="o2"), RunTask), "24 of this peer, the bound itself"
    assert is_busy(desk.ask(3, peer="o2"), 3)
    assert all_of(desk.ask(2), RunTask)


def test_the_only_request_of_all_may_be_larger_than_what_all_may_have() -> None:
    """Or the largest legal request could never be served."""
    desk = WorkerDesk(WorkerConfig(quota=Quota(size=1, size_all=1))).open("o1").open("o2")
    task = one(desk.ask(1, tokens=9), RunTask).task
    assert is_busy(desk.ask(1, peer="o2"), 1)
    desk.do(TaskFailed(task, "toy"))
    assert all_of(desk.ask(1, peer="o2"), RunTask)


def test_a_worker_takes_no_more_tokens_than_a_frame_holds() -> None:
    """Whatever its configuration says: an answer over 1 GiB could not be encoded."""
    wide = MatrixShape("head", 2, 2, up_bytes_per_block=5, down_bytes_per_block=1 << 20)
    worker = Worker(Catalogue(MODEL, PARAMETERS, (wide,)), WorkerConfig(max_tokens=1 << 20))
    welcome = said(worker.handle(FrameArrived("o1", encode(HELLO)), 0.0))
    assert isinstance(welcome, Welcome)
    assert welcome.max_tokens == (MAX_BODY_BYTES - OVERHEAD_BYTES) >> 20


@pytest.mark.parametrize(("silent_s", "makes_room"), [(3600.0, True), (3599.0, False)])
def test_a_session_nobody_uses_makes_room(silent_s: float, makes_room: bool) -> None:
    """The one silent longest, if long enough and with nothing in work; nobody else."""
    worker = Worker(CATALOGUE, WorkerConfig(max_peers=3, idle_s=3600.0))
    for now, peer in enumerate(("works", "silent", "fresh")):
        worker.handle(FrameArrived(peer, encode(HELLO)), float(now))
    asked = encode(Multiply(SESSION, 1, 0, 1, bytes(4)))
    assert all_of(worker.handle(FrameArrived("works", asked), 0.5), RunTask)
    effects = worker.handle(FrameArrived("new", encode(HELLO)), 1.0 + silent_s)
    assert isinstance(said(effects), Welcome) is makes_room
    states = [worker.state(peer).value for peer in ("works", "silent", "fresh")]
    assert states == ["serving", "absent" if makes_room else "serving", "serving"]


@pytest.mark.parametrize(
    ("matrix", "tokens", "size", "reason"),
    [
        (2, 1, 4, Reason.UNKNOWN_MATRIX),
        (0xFFFFFFFF, 1, 4, Reason.UNKNOWN_MATRIX),
        (0, 4, 16, Reason.TOO_MANY_TOKENS),
        (0, 0xFFFFFFFF, 4, Reason.TOO_MANY_TOKENS),
        (0, 0, 0, Reason.TOO_MANY_TOKENS),
        (0, 2, 4, Reason.WRONG_SIZE),
        (0, 1, 5, Reason.WRONG_SIZE),
        (0, 1, 0, Reason.WRONG_SIZE),
    ],
)
def test_a_request_against_the_catalogue_is_refused(
    matrix: int, tokens: int, size: int, reason: Reason
) -> None:
    """Before a byte of it is used."""
    desk = WorkerDesk(WorkerConfig(max_tokens=3)).open()
    effects = desk.hear(Multiply(SESSION, 1, matrix, tokens, bytes(size)))
    assert said(effects) == Refuse(SESSION, 1, reason)
    assert not all_of(effects, RunTask)


@pytest.mark.parametrize(
    "frame",
    [
        encode(Product(SESSION, 1, bytes(8))),
        encode(Welcome(SESSION, PARAMETERS, MODEL, 9)),
        encode(Refuse(SESSION, 1, Reason.NO_SESSION)),
        encode(Farewell(SESSION)),
        encode(HELLO)[:-1],
        b"",
        b"\x80\x04pickle" * 9,
    ],
    ids=lambda frame: f"{len(frame)} bytes",
)
def test_misplaced_frames_change_nothing(frame: bytes) -> None:
    """Messages for an owner and malformed frames are dropped."""
    desk = WorkerDesk().open()
    assert is_dropped(desk.do(FrameArrived("o1", frame)))
    assert desk.worker.state("o1") is State.SERVING


# --- mistakes of the driver -------------------------------------------------------------------


@pytest.mark.parametrize("result", [bytes(7), bytes(9), b"", "value", None, [0] * 8])
def test_a_product_of_the_wrong_size_or_type_is_misuse(result: object) -> None:
    """It never reaches the wire."""
    desk = WorkerDesk().open()
    task = one(desk.ask(1), RunTask).task
    with pytest.raises(MisuseError):
        desk.do(TaskDone(task, result))


def test_events_that_are_not_a_workers_are_misuse() -> None:
    """Tasks nobody started, ended twice, timers, and an owner's events."""
    desk = WorkerDesk().open()
    task = one(desk.ask(1), RunTask).task
    desk.do(TaskDone(task, bytes(8)))
    for event in (
        TaskDone(task, bytes(8)), TaskFailed(99, "late"), TimerFired("tea"), CloseWanted(),
    ):  # fmt: skip
        with pytest.raises(MisuseError):
            desk.do(event)


@pytest.mark.parametrize("how", ["new session", "new connection"])
def test_a_peer_cannot_get_around_the_bound_on_work(how: str) -> None:
    """Tasks still running count, whichever session they were asked under."""
    desk = WorkerDesk(WorkerConfig(quota=Quota(requests=2)))
    running = 0
    for turn in range(5):
        if how == "new connection":
            desk.do(PeerLost("o1"))
        session = bytes([turn]) * 16
        desk.hear(Hello(session, PARAMETERS, MODEL))
        for request in (1, 2):
            running += len(all_of(desk.ask(request, session), RunTask))
    assert running == 2


def test_an_ended_session_makes_room() -> None:
    """Owners that said goodbye do not keep new ones out."""
    desk = WorkerDesk(WorkerConfig(max_peers=1)).open("o1")
    desk.hear(Bye(SESSION), "o1")
    assert isinstance(said(desk.hear(HELLO, "o2")), Welcome)


def test_work_goes_on_across_a_lost_connection() -> None:
    """A peer that comes back and repeats a request is not served twice at once."""
    desk = WorkerDesk().open()
    task = one(desk.ask(1), RunTask).task
    desk.do(PeerLost("o1"))
    desk.open()
    assert is_dropped(desk.ask(1))
    sent = one(desk.do(TaskDone(task, bytes(8))), Send)
    assert decode(sent.frame) == Product(SESSION, 1, bytes(8))
