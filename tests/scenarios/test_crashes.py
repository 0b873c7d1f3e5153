"""Processes that really die: the harness finds what it is for, and nothing where there is nothing.

The harness is black-box, so it is shown real defects (`faulty_owner.py`) in real processes; what is
too rare for that is shown to its parts.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scenarios.chaos.__main__ import for_crashes
from scenarios.crashes import plan
from scenarios.crashes.__main__ import certificates
from scenarios.crashes.campaign import Campaign
from scenarios.crashes.training import Book, Training
from scenarios.crashes.verdict import Reference, Verdict, judge
from scenarios.crashes.wire import Life, Wire
from scenarios.crashes.zygote import LOADED, Zygote

STEPS = 8

# --- plan and command line ------------------------------------------------------------------------


def test_a_seed_draws_one_plan() -> None:
    """Another seed draws another; every kind of fault comes up."""
    first, again = (list(itertools.islice(plan.faults(7), 300)) for _ in range(2))
    assert first == again
    assert plan.digest(7, 200) == plan.digest(7, 200) != plan.digest(8, 200)
    assert {fault.kind for fault in first} == {*plan.KILLS, *plan.CUTS, plan.FULL}
    assert sorted(itertools.islice(plan.transports(3), 2)) == ["plain", "tls"]
    assert plan.moments(5, 4) == plan.moments(5, 4) == sorted(plan.moments(5, 4))


def test_the_word_processes_has_two_meanings() -> None:
    """Without a number it asks for real ones."""
    assert for_crashes(["--processes", "--kills", "9"]) == ["--kills", "9"]
    assert for_crashes(["--seeds", "3", "--processes"]) == ["--seeds", "3"]
    assert for_crashes(["--processes", "2"]) is None
    assert for_crashes(["--seeds", "3"]) is None


# --- the wire -------------------------------------------------------------------------------------

A, B = b"a" * 16, b"b" * 16
DRAW = np.random.default_rng(0)


def ciphertext(tokens: int = 5, width: int = 48) -> NDArray[np.int64]:
    """Uniform int64[T, K], as one under a fresh secret looks."""
    return DRAW.integers(0, 1 << 24, (tokens, width))


def payload(values: NDArray[np.int64]) -> bytes:
    """Signed base-256 digit planes of numbers mod 2^24."""
    planes, left = [], values.copy()
    for _ in range(3):
        digit = (left + 128) % 256 - 128
        planes.append(digit.astype(np.int8))
        left = (left - digit) >> 8
    return np.stack(planes).tobytes()


def multiply(session: bytes, number: int, values: NDArray[np.int64], matrix: int = 0) -> bytes:
    """A Multiply frame."""
    body = struct.pack("<QII", number, matrix, len(values)) + payload(values)
    return struct.pack("<4sBBH16sI", b"PFTL", 2, 3, 0, session, len(body)) + body


PREFACE = struct.pack("<4sBBH16s", b"PLNK", 1, 0, 0, bytes(16))


def read(*lives: list[bytes]) -> Wire:
    """A wire that has seen these frames, a list for each life, in small pieces."""
    wire = Wire()
    for frames in lives:
        wire.new_life()
        take = wire.reader()
        stream = PREFACE + b"".join(frames)
        for start in range(0, len(stream), 61):
            take(stream[start : start + 61])
    return wire


def test_fresh_secrets_and_the_same_bytes_again_are_right() -> None:
    """A thousand requests of two lives; a retry is the same bytes."""
    first = [multiply(A, n, ciphertext()) for n in range(500)]
    wire = read([*first, first[3], first[3]], [multiply(B, n, ciphertext()) for n in range(500)])
    assert wire.reused == []
    assert wire.unreadable == []
    assert [len(life.requests) for life in wire.lives] == [500, 500]


def test_one_request_with_other_bytes_is_found() -> None:
    """By the last bit of it."""
    values = ciphertext()
    other = values.copy()
    other[-1, -1] ^= 1
    assert "different bytes" in read([multiply(A, 1, values), multiply(A, 1, other)]).reused[0]


@pytest.mark.parametrize("width", [24, 80])
def test_one_secret_for_two_messages_is_found(width: int) -> None:
    """Across lives, matrices and lengths: the difference is that of the messages."""
    mask = ciphertext(9, 80)
    near = (mask + DRAW.integers(-6000, 6000, mask.shape)) % (1 << 24)
    wire = read(
        [multiply(A, 1, mask), multiply(A, 2, ciphertext())],
        [multiply(B, 7, near[:4, :width], matrix=5)],
    )
    assert wire.reused == ["requests 1 and 7 share a secret"]


def test_one_ciphertext_under_two_numbers_is_found() -> None:
    """The same secret, and the same message."""
    values = ciphertext()
    assert "same ciphertext" in read([multiply(A, 1, values), multiply(A, 2, values)]).reused[0]


def test_one_session_in_two_lives_is_found() -> None:
    """Whatever is asked in it."""
    wire = read([multiply(A, 1, ciphertext())], [multiply(A, 2, ciphertext())])
    assert "session" in wire.reused[0]


def test_what_it_cannot_read_is_said() -> None:
    """Rather than that all is well."""
    wire = read([b"x" * 100])
    assert wire.unreadable


# --- the verdict ----------------------------------------------------------------------------------

PATH = np.cumsum(DRAW.standard_normal((STEPS + 1, 400)), axis=0)
LOSSES = [5.0 - 0.1 * n for n in range(STEPS)]


def reference() -> Reference:
    """Two undisturbed trainings, 14 requests a step."""
    noisy = [PATH + 1e-3 * DRAW.standard_normal(PATH.shape) for _ in range(2)]
    return Reference(noisy, [LOSSES, [loss + 1e-4 for loss in LOSSES]], 14)


def book(began: int, kept: int, requests: int | None, at: int | None = None) -> Book:
    """A life; its checkpoint's adapter is that of step `at`, or of the step it says."""
    life = Life(requests={(A, n) for n in range(requests)}) if requests is not None else None
    return Book(began, life, kept, PATH[kept if at is None else at], kept == STEPS)


def verdict(*books: Book, losses: list[float] = LOSSES, accused: bool = False) -> Verdict:
    return judge("training", books, losses, accused, reference())


def test_what_is_right_is_called_right() -> None:
    """Steps in work at a death are done again; the last one may have been kept, or just not."""
    for requests in (3 * 14, 3 * 14 + 9, 4 * 14):
        found = verdict(book(0, 3, requests), book(3, 3, 0), book(3, STEPS, 5 * 14))
        assert found.clean, found.found
    assert verdict(book(0, 5, None), book(5, STEPS, None)).clean


@pytest.mark.parametrize(
    ("books", "lost", "doubled"),
    [
        ([book(0, 3, 4 * 14 + 1), book(3, STEPS, 5 * 14)], 1, 0),  # step 4 was over
        ([book(0, 3, 50), book(3, STEPS, 4 * 14)], 1, 0),  # one that nobody worked for
        ([book(0, 3, 50), book(3, STEPS, 6 * 14)], 1, 0),  # one done again, by need
        ([book(0, 3, 50), book(3, STEPS, 6 * 14, at=2)], 0, 1),  # one done again, without
        ([book(0, 3, 50, at=2), book(3, STEPS, 5 * 14)], 1, 0),
        ([book(0, 3, None, at=4), book(3, STEPS, None)], 0, 1),
    ],
)
def test_lost_and_doubled_steps_are_counted(books: list[Book], lost: int, doubled: int) -> None:
    """By the wire, or by the bits."""
    found = verdict(*books)
    assert (found.lost_steps, found.doubled_steps) == (lost, doubled)
    assert not found.clean


def test_another_history_is_found() -> None:
    """By its adapter, its losses, or their number; and so is a false accusation."""
    odd = book(0, STEPS, None)
    assert odd.adapter is not None
    odd.adapter = odd.adapter + 1.0
    assert verdict(odd).other_adapters == 1
    right = book(0, STEPS, None)
    assert verdict(right, losses=[*LOSSES[:-1], LOSSES[-1] + 0.05]).other_adapters == 1
    assert verdict(right, losses=LOSSES[:-1]).other_adapters == 1
    assert verdict(right, accused=True).accused == 1
    assert verdict(right).clean


# --- real processes, real defects -----------------------------------------------------------------


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    """Processes are warm, and it is known what undisturbed trainings come to."""
    place = tmp_path_factory.mktemp("crashes")
    with Zygote(place / "zygote.log", (*LOADED, "tests.scenarios.faulty_owner")) as zygote:
        made = Campaign(
            zygote, certificates(place / "certificates"), place / "runs", 1, steps=STEPS
        )
        made.prepare(("plain", "plain"))
        yield made


def attacked(campaign: Campaign, fault: str) -> tuple[Verdict, Wire]:
    """A training whose owner has a defect and is killed once, after step 4."""
    wire, assumed = Wire(), campaign.reference
    assert assumed is not None
    bench = campaign.bench_of(("tests.scenarios.faulty_owner", fault))
    with Training(bench, campaign.place / fault, "plain", wire) as training:
        while training.running() and training.kept() < 4:
            training.wait(0.01)
        assert training.kill_owner()
        training.start_owner()
        while training.wait(0.05):
            pass
    return judge(fault, training.books, training.losses(), training.accused(), assumed), wire


@pytest.mark.slow
def test_an_honest_product_stands_a_few_kills(campaign: Campaign) -> None:
    """Nothing lost, nothing doubled, nothing used twice."""
    campaign.run(3)
    figures: dict[str, Any] = campaign.figures()
    assert figures["kills"] == 3
    assert figures["found"] == []
    assert figures["requests_read"] >= 2 * STEPS * figures["requests_per_step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "lost", "doubled"),
    [("newest-forgotten", 1, 0), ("update-lost", 1, 0), ("step-doubled", 0, 1)],
)
def test_a_real_history_with_a_defect_is_found(
    campaign: Campaign, fault: str, lost: int, doubled: int
) -> None:
    """Each kind, in real processes."""
    found, wire = attacked(campaign, fault)
    assert (found.lost_steps, found.doubled_steps) == (lost, doubled), found.found
    assert wire.reused == []


@pytest.mark.slow
def test_a_real_wire_with_defects_is_found(campaign: Campaign) -> None:
    """A request with other bytes, and a resumed life that draws the keys of the one before."""
    found, wire = attacked(campaign, "bytes-differ,randomness-resumed")
    for said in ("different bytes", "share a secret"):
        assert any(said in line for line in wire.reused)
    assert found.clean


def test_logs_lie_where_the_finding_says(campaign: Campaign) -> None:
    """One for each life of an owner, and for each worker."""
    names = [path.name for path in Path(campaign.place / "logs").iterdir()]
    assert "prepare.log" in names
    assert any("owner-1" in name for name in names)
