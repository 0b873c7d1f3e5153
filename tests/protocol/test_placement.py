"""Which worker may be asked for which matrix, and when nobody is left to ask."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import MisuseError
from protocol.events import Abort, CancelTimer, FailCall, LinearWanted, SetTimer
from protocol.messages import Reason
from protocol.owner import Owner
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import State
from protocol.placement import Placement
from tests.protocol.toys import CATALOGUE, SESSION, OwnerDesk, all_of, one, requests

THREE = ("w1", "w2", "w3")
SPLIT = Placement((("w1", "w3"), ("w2", "w3")))
names = st.lists(st.sampled_from(THREE), unique=True).map(tuple)
holders = st.lists(st.sampled_from(THREE), unique=True, min_size=1).map(tuple)


def test_without_a_placement_everyone_holds_everything() -> None:
    """In the order the workers were named."""
    everywhere = Placement.everywhere(THREE, 2)
    assert [everywhere.holders(matrix, THREE) for matrix in (0, 1)] == [list(THREE)] * 2


@settings(deadline=None)
@given(st.lists(holders, min_size=1, max_size=4), names)
def test_a_placement_says_who_holds_and_whether_all_is_covered(
    where: list[tuple[str, ...]], left: tuple[str, ...]
) -> None:
    """Holders keep their order of preference; covered means that no matrix is without one."""
    placement = Placement(tuple(where))
    for matrix, placed in enumerate(where):
        assert placement.holders(matrix, left) == [name for name in placed if name in left]
    covered = all(placement.holders(matrix, left) for matrix in range(len(where)))
    assert placement.covered(left) == covered


@pytest.mark.parametrize(
    "where",
    [(), (("w1",),), (("w1",), ("w2",), ("w3",)), (("w1",), ()), (("w1",), ("nobody",))],
    ids=str,
)
def test_a_placement_that_does_not_fit_is_refused(where: tuple[tuple[str, ...], ...]) -> None:
    """Too few or too many matrices, one without a holder, or a holder nobody knows."""
    with pytest.raises(MisuseError, match=r"plac"):
        Owner(SESSION, CATALOGUE, THREE, placement=Placement(where))


def test_a_request_goes_only_to_a_holder_of_its_matrix() -> None:
    """Even when every holder is busier than the others."""
    desk = OwnerDesk(THREE, OwnerConfig(window=2), SPLIT).open()
    sent = [requests(desk.ask(call, matrix=0)) for call in range(1, 6)]
    assert sent == [[("w1", 1)], [("w3", 2)], [("w1", 3)], [("w3", 4)], []]
    assert requests(desk.ask(6, matrix=1)) == [("w2", 6)]
    assert requests(desk.product(1)) == [("w1", 5)]


def test_the_calls_of_a_lost_worker_go_to_another_holder() -> None:
    """And wait for it when its window is full."""
    desk = OwnerDesk(THREE, OwnerConfig(window=1), SPLIT).open()
    assert requests(desk.ask(1, matrix=0)) == [("w1", 1)]
    assert requests(desk.ask(2, matrix=0)) == [("w3", 2)]
    assert requests(desk.lose("w1")) == []
    assert requests(desk.product(2, peer="w3")) == [("w3", 1)]


def test_a_refusing_worker_is_followed_by_a_holder() -> None:
    """Not by one that could not answer."""
    desk = OwnerDesk(THREE, placement=Placement((("w1", "w3"), ("w2",)))).open()
    desk.ask(1, matrix=0)
    assert requests(desk.refuse(Reason.BUSY)) == [("w3", 1)]
    effects = desk.refuse(Reason.BUSY, peer="w3")
    assert requests(effects) == []
    assert one(effects, SetTimer).timer == "call:1"


@pytest.mark.parametrize("how", ["lost", "retired"])
def test_the_last_holder_of_a_matrix_takes_everything_with_it(how: str) -> None:
    """A step needs every matrix, so a living worker that lacks one cannot go on alone."""
    desk = OwnerDesk(("w1", "w2"), placement=Placement((("w1",), ("w1", "w2")))).open()
    desk.ask(1, matrix=0)
    desk.do(LinearWanted(2, 1, 1, (1,)))
    effects = desk.lose() if how == "lost" else desk.reject()
    reason = one(effects, Abort).reason
    assert "'w1'" in reason
    assert "'w2'" not in reason
    assert [failed.call for failed in all_of(effects, FailCall)] == [1, 2]
    assert {timer.timer for timer in all_of(effects, CancelTimer)} >= {"session:w1", "session:w2"}
    assert desk.owner.state("w2") is State.READY
    assert desk.do(LinearWanted(3, 1, 1, (1,))) == [FailCall(3, reason)]


def test_one_holder_of_each_matrix_is_enough() -> None:
    """Workers go one after the other; the Abort comes with the first matrix nobody holds."""
    desk = OwnerDesk(THREE, placement=SPLIT).open()
    assert not all_of(desk.lose("w1"), Abort)
    assert not all_of(desk.lose("w2"), Abort)
    assert [requests(desk.ask(1, matrix=0)), requests(desk.ask(2, matrix=1))] == [
        [("w3", 1)],
        [("w3", 2)],
    ]
    assert one(desk.lose("w3"), Abort)
