"""Fair queueing: whoever asks for more gets no more, nobody waits for long, nothing is lost."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protocol.fair import FEW_TOKENS, FairQueue, charged

MOST_TOKENS = 12
CLIENTS = st.integers(0, 3)
PUSH = st.tuples(CLIENTS, st.integers(0, 2), st.integers(1, 20), st.integers(1, 50))
"""client, matrix, tokens, bytes a token"""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(PUSH, st.just("pop"), st.integers(0, 60)), max_size=80))
def test_each_item_is_taken_once_with_its_own_matrix(script: list[object]) -> None:
    """Batches are of one matrix and fit, in order for each client; what was removed never comes."""
    queue: FairQueue[int] = FairQueue(MOST_TOKENS)
    pushed: dict[int, tuple[int, int, int, int]] = {}
    removed, taken = set(), []

    def take() -> None:
        batch = queue.pop()
        assert len({pushed[item][1] for item in batch}) == bool(batch)
        assert len(batch) == 1 or sum(pushed[item][2] for item in batch) <= MOST_TOKENS
        taken.extend(batch)

    for step in script:
        if step == "pop":
            take()
        elif isinstance(step, tuple):
            client, matrix, tokens, size = step
            pushed[len(pushed)] = step
            queue.push(len(pushed) - 1, str(client), matrix, tokens, tokens * size)
        elif queue.remove(step):  # type: ignore[arg-type]
            removed.add(step)
        assert len(queue) == len(pushed) - len(taken) - len(removed)
    while len(queue):
        take()
    assert queue.pop() == []
    assert sorted([*taken, *removed]) == list(range(len(pushed)))
    order = defaultdict(list)
    for item in taken:
        order[pushed[item][:2]].append(item)
    assert all(items == sorted(items) for items in order.values())


class Backlog:
    """Clients that always have `depth` requests waiting, of their own matrix and size each."""

    def __init__(self, queue: FairQueue[int], depth: int) -> None:
        self.queue, self.depth = queue, depth
        self.asks: dict[str, tuple[int, int, int]] = {}
        self.of: dict[int, str] = {}
        self.waiting: Counter[str] = Counter()
        self.served: Counter[str] = Counter()

    def join(self, client: str, matrix: int, tokens: int, size: int) -> None:
        self.asks[client] = (matrix, tokens, size)

    def fill(self) -> None:
        for client, ask in self.asks.items():
            while self.waiting[client] < self.depth:
                item = len(self.of)
                self.of[item] = client
                self.waiting[client] += 1
                self.queue.push(item, client, *ask)

    def pop(self) -> set[str]:
        """Whom the next batch serves."""
        batch = [self.of[item] for item in self.queue.pop()]
        for client in batch:
            self.waiting[client] -= 1
            self.served[client] += self.asks[client][2]
        return set(batch)

    def served_next(self, products: int) -> set[str]:
        """Whom so many products serve, while all go on asking."""
        served = set[str]()
        for _ in range(products):
            self.fill()
            served |= self.pop()
        return served


def greedy(others: list[tuple[int, int, int]], before: int) -> Backlog:
    """Clients with sixteen requests waiting each, of which so many products have been taken."""
    backlog = Backlog(FairQueue(MOST_TOKENS), depth=16)
    for number, ask in enumerate(others):
        backlog.join(str(number), *ask)
    backlog.served_next(before)
    return backlog


BYTES = (7, 100, 900)
"""A token of each matrix."""


@settings(max_examples=60, deadline=None)
@given(
    asks=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 5)), min_size=2, max_size=6
    ),
    depth=st.integers(1, 8),
)
def test_clients_that_always_wait_get_bytes_by_share(
    asks: list[tuple[int, int, int]], depth: int
) -> None:
    """However large and many their requests: apart by a request and a joined product each."""
    shares = {str(number): share for number, (*_, share) in enumerate(asks) if share > 1}
    backlog = Backlog(FairQueue(MOST_TOKENS, shares), depth + 1)
    for number, (matrix, tokens, _) in enumerate(asks):
        backlog.join(str(number), matrix, tokens, tokens * BYTES[matrix])
    largest = max(tokens * BYTES[matrix] for matrix, tokens, _ in asks)
    slack = 2 * (largest + MOST_TOKENS * max(BYTES[matrix] for matrix, *_ in asks))
    for _ in range(150):
        backlog.fill()
        backlog.pop()
        # Where one product takes all that there is nobody waits, and each gets what it asks for.
        assume(len(backlog.queue))
    served = [backlog.served[client] / shares.get(client, 1) for client in backlog.asks]
    assert max(served) - min(served) <= slack + 1


@settings(max_examples=40, deadline=None)
@given(
    others=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 1000)),
        min_size=1, max_size=6,
    ),
    lost=st.lists(PUSH, min_size=1, max_size=30),
    before=st.integers(0, 9),
    breaks=st.integers(1, 4),
)  # fmt: skip
def test_a_client_whose_links_broke_waits_no_longer_than_a_new_one(
    others: list[tuple[int, int, int]],
    lost: list[tuple[int, int, int, int]],
    before: int,
    breaks: int,
) -> None:
    """However much it had waiting, and however often."""
    backlog = greedy(others, before)
    for _ in range(breaks):
        mine = [f"lost{n}" for n in range(len(lost))]
        for item, (_, matrix, tokens, size) in zip(mine, lost, strict=True):
            backlog.queue.push(item, "ann", 100 + matrix, tokens, size)  # type: ignore[arg-type]
        for item in reversed(mine):
            assert backlog.queue.remove(item)  # type: ignore[arg-type]
    backlog.join("ann", 200, 1, 10)
    assert "ann" in backlog.served_next(len(others) + 1)


@settings(max_examples=40, deadline=None)
@given(
    others=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 1000)),
        min_size=1, max_size=6,
    ),
    before=st.integers(0, 40),
    mine=st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 10**6)),
)  # fmt: skip
def test_a_new_client_waits_for_one_request_of_each_other(
    others: list[tuple[int, int, int]], before: int, mine: tuple[int, int, int]
) -> None:
    """However much the others have waiting, and however large its own request is."""
    backlog = greedy(others, before)
    backlog.join("new", *mine)
    assert "new" in backlog.served_next(len(others) + 1)


def test_a_flood_is_not_ahead_of_one_request() -> None:
    """First come, first served would keep it waiting for all of them."""
    queue: FairQueue[str] = FairQueue(MOST_TOKENS)
    for number in range(100):
        queue.push(f"flood{number}", "flood", number, 1, 10)
    assert queue.pop() == ["flood0"]
    queue.push("one", "ann", 200, 1, 10)
    assert "one" in [*queue.pop(), *queue.pop()]


@settings(max_examples=40, deadline=None)
@given(
    asks=st.lists(st.sampled_from([1, 2, 5, 16, 100, 256]), min_size=2, max_size=5),
    token_bytes=st.integers(1, 1000),
)
def test_nobody_takes_the_worker_s_time_by_asking_for_few_tokens(
    asks: list[int], token_bytes: int
) -> None:
    """Matrices that nobody shares; a product of few tokens takes as long as one of `FEW_TOKENS`."""
    queue: FairQueue[int] = FairQueue(4096)
    took: Counter[int] = Counter()

    def ask(client: int, item: int) -> None:
        queue.push(item, str(client), item, asks[client], charged(asks[client]) * token_bytes)

    for item in range(2 * len(asks)):
        ask(item % len(asks), item)
    for item in range(2 * len(asks), 400):
        (leader,) = queue.pop()
        client = leader % len(asks)
        took[client] += max(FEW_TOKENS, asks[client])
        ask(client, item * len(asks) + client)  # one of its own
    assert max(took.values()) - min(took.values()) <= 2 * max(FEW_TOKENS, *asks)


def test_an_item_waits_once_and_weighs_something() -> None:
    """A second push, or no bytes, is the caller's mistake."""
    queue: FairQueue[str] = FairQueue(MOST_TOKENS)
    queue.push("a", "ann", 0, 1, 1)
    for item, size in (("a", 1), ("b", 0)):
        with pytest.raises(ValueError, match="waits once"):
            queue.push(item, "ann", 0, 1, size)


def test_clients_that_are_gone_are_forgotten() -> None:
    """However many have come and gone while others always wait."""
    queue: FairQueue[int] = FairQueue(MOST_TOKENS)
    for number in range(5000):
        queue.push(number, f"c{number}", number % 3, 1, 10)
        queue.push(-1 - number, f"d{number}", number, 1, 10)
        queue.remove(-1 - number)
        if number > 3:
            queue.pop()
    assert 0 < len(queue) <= 5
    assert len(queue._ends) <= 1026
    held = len(queue._all), sum(map(len, queue._of.values())), len(queue._of)
    assert max(held) < 100
