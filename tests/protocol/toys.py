"""What these tests share: a small catalogue, a toy cipher, and both machines with a test driver.

The toy is additive masking, so it has the shape of the real cipher: the worker multiplies what
it cannot read, and only the holder of the mask reads the product, once it has found it right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from protocol.catalogue import Catalogue, MatrixShape
from protocol.errors import WrongAnswerError
from protocol.events import (
    AnswerRejected,
    CloseWanted,
    Decrypt,
    Disconnected,
    Dropped,
    Effect,
    Encrypt,
    Event,
    FrameArrived,
    LinearWanted,
    MultiplyCiphertext,
    PeerLost,
    RunTask,
    Send,
    Start,
    Task,
    TaskDone,
    TimerFired,
)
from protocol.messages import (
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
from protocol.owner import Owner
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import State
from protocol.placement import Placement
from protocol.worker import Worker, WorkerConfig

SESSION = b"session-of-tests"
OTHER_SESSION = b"another-session!"
PARAMETERS = b"p" * 32
MODEL = b"m" * 32
STRANGE = b"?" * 32
MODULUS = 1 << 32
FACTORS = (3, 5)
CATALOGUE = Catalogue(
    MODEL,
    PARAMETERS,
    (
        MatrixShape("layer.up", 1, 2, up_bytes_per_block=4, down_bytes_per_block=8),
        MatrixShape("layer.down", 2, 1, up_bytes_per_block=4, down_bytes_per_block=8),
    ),
)
HELLO = Hello(SESSION, PARAMETERS, MODEL)
E = TypeVar("E")


def all_of(effects: Iterable[Effect], kind: type[E]) -> list[E]:
    """The effects of one kind, in order."""
    return [effect for effect in effects if isinstance(effect, kind)]


def one(effects: Iterable[Effect], kind: type[E]) -> E:
    """The only effect of a kind."""
    (found,) = all_of(effects, kind)
    return found


def is_dropped(effects: Sequence[Effect]) -> bool:
    """Whether a frame was dropped and nothing else happened."""
    return [type(effect) for effect in effects] == [Dropped]


def requests(effects: Iterable[Effect]) -> list[tuple[str, int]]:
    """(worker, call) of every request sent, in order."""
    found = []
    for send in all_of(effects, Send):
        message = decode(send.frame)
        if isinstance(message, Multiply):
            found.append((send.peer, message.request))
    return found


# --- the toy cipher -------------------------------------------------------------------------


@dataclass(frozen=True)
class Sealed:
    """What it takes to check an answer, and to read it."""

    masked: tuple[int, ...]
    mask: tuple[int, ...]


def _pack(values: Iterable[int], width: int) -> bytes:
    return b"".join(value.to_bytes(width, "little") for value in values)


def encrypt(x: Sequence[int], serial: int) -> tuple[bytes, Sealed]:
    """u32 per token, masked; `serial` is new for every encryption, and so is the mask."""
    mask = tuple((serial * 2654435761 + 40503 * row) % MODULUS for row in range(len(x)))
    masked = tuple((v + m) % MODULUS for v, m in zip(x, mask, strict=True))
    return _pack(masked, 4), Sealed(masked, mask)


def multiply(work: MultiplyCiphertext) -> bytes:
    """u64 per token: a function of the request's bytes and nothing else."""
    payload = bytes(work.payload)
    rows = (int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload), 4))
    return _pack((row * FACTORS[work.matrix] for row in rows), 8)


def decrypt(work: Decrypt) -> tuple[int, ...]:
    """The masked product, unmasked. Raises WrongAnswerError when it is not the product."""
    payload, sealed = bytes(work.payload), work.sealed
    assert isinstance(sealed, Sealed)
    factor = FACTORS[work.matrix]
    if payload != _pack((value * factor for value in sealed.masked), 8):
        raise WrongAnswerError("toy: not the product")
    rows = (int.from_bytes(payload[i : i + 8], "little") for i in range(0, len(payload), 8))
    return tuple((row - m * factor) % MODULUS for row, m in zip(rows, sealed.mask, strict=True))


def result(work: Task, serial: int) -> object:
    """Really compute a task. Raises WrongAnswerError for a wrong answer."""
    match work:
        case Encrypt(_, _, x):
            assert isinstance(x, list | tuple)
            return encrypt(x, serial)
        case MultiplyCiphertext():
            return multiply(work)
        case Decrypt():
            return decrypt(work)


def compute(task: int, work: Task) -> TaskDone | AnswerRejected:
    """Really compute a task, and report its end as a driver does."""
    try:
        return TaskDone(task, result(work, serial=task))
    except WrongAnswerError as error:
        return AnswerRejected(task, str(error))


def clear(matrix: int, x: Sequence[int]) -> tuple[int, ...]:
    """What a call must deliver."""
    return tuple(v * FACTORS[matrix] % MODULUS for v in x)


# --- the machines, with the test as driver ----------------------------------------------------


class OwnerDesk:
    """An owner; the test plays its driver and its workers, and says what time it is."""

    def __init__(
        self,
        peers: Sequence[str] = ("w1",),
        config: OwnerConfig | None = None,
        placement: Placement | None = None,
        retired: Mapping[str, str] | None = None,
    ) -> None:
        self.owner = Owner(SESSION, CATALOGUE, peers, config, placement, retired)
        self.peers = peers
        self.now = 0.0

    def do(self, event: Event) -> list[Effect]:
        """Hand over one event."""
        return self.owner.handle(event, self.now)

    def hear(self, message: Message, peer: str = "w1") -> list[Effect]:
        """Hand over a message of a worker."""
        return self.do(FrameArrived(peer, encode(message)))

    def welcome(self, peer: str = "w1", max_tokens: int = 64) -> list[Effect]:
        """A worker agrees."""
        return self.hear(Welcome(SESSION, PARAMETERS, MODEL, max_tokens), peer)

    def open(self) -> OwnerDesk:
        """Start, and be welcomed by everyone."""
        self.do(Start())
        for peer in self.peers:
            self.welcome(peer)
        return self

    def ask(self, call: int = 1, matrix: int = 0, x: Sequence[int] = (7,)) -> list[Effect]:
        """A lane asks and the encryption ends at once; returns what followed."""
        run = one(self.do(LinearWanted(call, matrix, len(x), x)), RunTask)
        assert isinstance(run.work, Encrypt)
        return self.do(TaskDone(run.task, encrypt(x, serial=call)))

    def product(self, call: int = 1, tokens: int = 1, peer: str = "w1") -> list[Effect]:
        """A worker answers with the right number of bytes."""
        return self.hear(Product(SESSION, call, bytes(8 * tokens)), peer)

    def refuse(
        self, reason: Reason, call: int = 1, peer: str = "w1", after_ms: int = 0
    ) -> list[Effect]:
        """A worker refuses a call, or with call 0 its session."""
        return self.hear(Refuse(SESSION, call, reason, after_ms), peer)

    def reject(self, call: int = 1, peer: str = "w1") -> list[Effect]:
        """A worker answers, and the answer is found wrong; returns what the finding led to."""
        self.product(call, peer=peer)
        return self.do(AnswerRejected(call, f"{peer} lied"))

    def lose(self, peer: str = "w1") -> list[Effect]:
        """The transport to a worker is gone."""
        return self.do(PeerLost(peer))

    def disconnect(self, peer: str = "w1") -> list[Effect]:
        """The connection to a worker has ended."""
        return self.do(Disconnected(peer))

    def fire(self, timer: str) -> list[Effect]:
        """A timer runs out."""
        return self.do(TimerFired(timer))


def owner_in(state: State, attempts_max: int = 3) -> OwnerDesk:
    """An owner whose session with w1 is in a state, reached by events alone; w2 can serve."""
    config = OwnerConfig(attempts_max=attempts_max, greetings_max=attempts_max)
    desk = OwnerDesk(("w1", "w2"), config)
    if state in (State.LOST, State.REVIVING):
        desk.lose()
    elif state is not State.NEW:
        desk.do(Start())
        desk.welcome("w2")
    if state is State.REVIVING:
        desk.fire("session:w1")
    if state in (State.READY, State.CLOSING, State.CLOSED, State.RETIRED):
        desk.welcome()
    if state is State.RETIRED:
        desk.ask()
        desk.reject()
    if state in (State.CLOSING, State.CLOSED):
        desk.do(CloseWanted())
    if state is State.CLOSED:
        desk.hear(Farewell(SESSION))
    assert desk.owner.state("w1") is state
    return desk


class WorkerDesk:
    """A worker; the test plays its driver and the owners, and says what time it is."""

    def __init__(
        self,
        config: WorkerConfig | None = None,
        client_of: Callable[[str], str] = lambda peer: peer,
    ) -> None:
        self.worker = Worker(CATALOGUE, config, client_of)
        self.now = 0.0

    def do(self, event: Event) -> list[Effect]:
        """Hand over one event."""
        return self.worker.handle(event, self.now)

    def hear(self, message: Message, peer: str = "o1") -> list[Effect]:
        """Hand over a message of an owner."""
        return self.do(FrameArrived(peer, encode(message)))

    def open(self, peer: str = "o1") -> WorkerDesk:
        """Be greeted."""
        self.hear(HELLO, peer)
        return self

    def ask(
        self, request: int = 1, session: bytes = SESSION, peer: str = "o1", tokens: int = 1
    ) -> list[Effect]:
        """An owner asks for a product."""
        return self.hear(Multiply(session, request, 0, tokens, bytes(4 * tokens)), peer)
