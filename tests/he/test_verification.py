"""Verification against plain integers, and the verdicts that an owner keeps of it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.he import verification
from backends.he.manifest import GroupSpec, PreparationError, Wanted
from backends.he.params import NTT_PRIME, preset
from backends.he.preparation import prepare
from backends.he.public import PublicMatrix, expand_tile
from backends.he.quantise import quantise
from backends.he.store import PreparedModel, array_path
from backends.he.verdict import Verdicts, owner_verdicts
from backends.he.verification import (
    Progress,
    Trust,
    draw_challenge,
    open_trusted,
    times_public,
    verify,
)
from tests.he.conftest import make_case
from tests.he.small_model import GROUPS, STANDARD, TAG, quiet, small, weight_of

HALF = NTT_PRIME // 2


def slow_rows(tiles: NDArray[np.int32], count: int) -> list[list[int]]:
    """The first rows of a tiled matrix, as Python integers."""
    flat = tiles.transpose(0, 3, 1, 2).reshape(tiles.shape[0] * tiles.shape[3], -1)
    return [[int(v) for v in row] for row in flat[:count]]


def slow_product(factors: list[int], rows: list[list[int]]) -> list[int]:
    """factors * rows mod q, as the words say."""
    slots = range(len(rows[0]))
    return [
        sum(f * row[s] for f, row in zip(factors, rows, strict=True)) % NTT_PRIME for s in slots
    ]


def slow_hint_is_right(
    matrix: NDArray[np.int8], hint: NDArray[np.int32], a: NDArray[np.int32]
) -> bool:
    """Whether H = M*A mod q, every row of it, without any random combination."""
    a_rows = slow_rows(a, matrix.shape[1])
    rows = slow_rows(hint, len(matrix))
    return all(
        [v % NTT_PRIME for v in row] == slow_product([int(w) for w in weights], a_rows)
        for row, weights in zip(rows, matrix, strict=True)
    )


def claims_hold(
    weight: NDArray[np.int8], forward: bool, hint: NDArray[np.int32], seed: bytes
) -> bool:
    """What `verify` computes of one hint, by its own parts."""
    matrix = weight if forward else weight.T
    challenge = draw_challenge(len(matrix))
    pads = verification._by_tiles
    down, across = np.zeros(len(weight), np.int32), np.zeros(weight.shape[1], np.int32)
    (down if forward else across)[:] = challenge
    columns, rows = np.zeros(weight.shape[1], np.int64), np.zeros(len(weight), np.int64)
    verification._combine_codes(weight, down, across, columns, rows)
    combined = verification.centre((columns if forward else rows) % NTT_PRIME)
    slots = hint[0].size // 16
    low, high = np.zeros((2, slots), np.int64)
    verification._combine_tiles(hint.reshape(-1, slots, 16), pads(challenge), low, high)
    (right,) = times_public([pads(combined)], seed, hint.shape[1])
    return bool(np.array_equal(verification._residues(low, high), right))


@settings(max_examples=15, deadline=None)
@given(
    inputs=st.integers(1, 40), outputs=st.integers(1, 40), forward=st.booleans(),
    seed=st.integers(0, 1000), data=st.data(),
)  # fmt: skip
def test_a_hint_is_accepted_exactly_when_it_is_right(
    inputs: int, outputs: int, forward: bool, seed: int, data: st.DataObject
) -> None:
    """The right one, and one with a wrong residue anywhere, by plain integers and by this."""
    case = make_case(inputs, outputs, forward, seed)
    assert case.matrix.hint is not None
    hint, key = case.matrix.hint.copy(), case.public.seed
    matrix = case.weight if forward else case.weight.T
    a = case.public.rows(inputs)
    assert slow_hint_is_right(matrix, hint, a)
    assert claims_hold(case.weight, forward, hint, key)
    row = data.draw(st.integers(0, outputs - 1))
    place = row // 16, data.draw(st.integers(0, 4)), data.draw(st.integers(0, 255)), row % 16
    hint[place] = data.draw(st.integers(-HALF, HALF).filter(lambda v: v != hint[place]))
    assert not slow_hint_is_right(matrix, hint, a)
    assert not claims_hold(case.weight, forward, hint, key)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_sums_are_exact_at_their_bounds(signs: tuple[int, int]) -> None:
    """Every factor and every value as large as it may be, for many tiles."""
    tiles = np.full((300, 7, 16), signs[0] * HALF, np.int32)
    factors = np.full((300, 16), signs[1] * HALF, np.int32)
    low, high = np.zeros((2, 7), np.int64)
    verification._combine_tiles(tiles, factors, low, high)
    exact = 300 * 16 * signs[0] * signs[1] * HALF * HALF
    assert [int(a) + (int(b) << 32) for a, b in zip(low, high, strict=True)] == [exact] * 7
    assert set(verification._residues(low, high)) == {exact % NTT_PRIME}
    codes = np.full((2000, 33), -127, np.int8)
    columns, rows = np.zeros(33, np.int64), np.zeros(2000, np.int64)
    down, across = np.full(2000, HALF, np.int32), np.full(33, -HALF, np.int32)
    verification._combine_codes(codes, down, across, columns, rows)
    assert set(columns) == {-127 * 2000 * HALF}
    assert set(rows) == {127 * 33 * HALF}


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (513, 40)])
def test_norms_are_the_planners(shape: tuple[int, int]) -> None:
    """Summed slab by slab, against wide integers."""
    codes = np.random.default_rng(1).integers(-127, 128, shape).astype(np.int8)
    codes[0] = -127
    rows, columns = np.zeros((2, shape[0]), np.int64), np.zeros((2, shape[1]), np.int64)
    for start in range(0, shape[0], 100):
        part = slice(start, start + 100)
        verification._sum_norms(codes[part], rows[:, part], columns)
    for kind, values in enumerate((codes.astype(object) ** 2, abs(codes.astype(object)))):
        assert list(rows[kind]) == list(values.sum(axis=1))
        assert list(columns[kind]) == list(values.sum(axis=0))


def test_products_with_the_public_matrix() -> None:
    """Vectors of several lengths, against plain integers."""
    rng, seed = np.random.default_rng(3), bytes(range(32))
    vectors = [rng.integers(-HALF, HALF + 1, (n, 16)).astype(np.int32) for n in (1, 4, 3)]
    a = np.stack([expand_tile(seed, tile, 6) for tile in range(4)])
    for vector, found in zip(vectors, times_public(vectors, seed, 6), strict=True):
        factors = [int(v) for v in vector.reshape(-1)]
        assert list(found) == slow_product(factors, slow_rows(a, len(factors)))
    assert np.array_equal(a, PublicMatrix(seed, 6).rows(64))


def test_challenges_are_uniform_fresh_and_the_systems() -> None:
    """Centred, all over the range, never the same twice."""
    drawn = draw_challenge(20_000)
    assert drawn.min() >= -HALF
    assert drawn.max() <= HALF
    counts, _ = np.histogram(drawn, 16, (-HALF, HALF))
    assert np.all(np.abs(counts - 1250) < 8 * 1250**0.5)
    assert not np.array_equal(drawn, draw_challenge(20_000))
    assert len(draw_challenge(0)) == 0


class Watch:
    """Counts verifications, their reasons and bytes."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.announced = self.told = 0

    @contextmanager
    def __call__(self, reason: str, total: int) -> Iterator[Progress]:
        self.reasons.append(reason)
        self.announced += total

        def advance(label: str, done: int) -> None:
            self.told += done

        yield advance


def test_what_is_on_the_disk_is_verified_whoever_made_it(tmp_path: Path) -> None:
    """Without verdicts: after it was made, and each time it is found, with progress."""
    watch = Watch()
    for count in (1, 2, 3):
        assert small(tmp_path / "a", trust=Trust(watch=watch)).trusted
        assert len(watch.reasons) == count
    assert watch.told == watch.announced > 0


@pytest.mark.parametrize("kind", ["weight", "scale"])
def test_what_changes_under_the_hands_of_its_maker_is_found(tmp_path: Path, kind: str) -> None:
    """Another process writes into a file between its making and the end of the preparation."""

    def progress(label: str, done: int) -> None:
        path = array_path(tmp_path, 0, kind)
        if label.startswith("hint") and path.exists():
            array = np.load(path)
            array.reshape(-1)[0] = np.nan if kind == "scale" else 1 - array.reshape(-1)[0] // 2
            np.save(path, array)

    with pytest.raises(PreparationError, match="is damaged"):
        small(tmp_path, progress=progress)


@pytest.mark.parametrize("spoil", ["folder", "worker", "file", "manifest"])
def test_what_everybody_may_change_is_not_used(tmp_path: Path, spoil: str) -> None:
    """It is mapped where it lies: whoever can write there can change it after any check."""
    model = small(tmp_path)
    paths = {
        "folder": tmp_path, "worker": tmp_path / "worker", "manifest": tmp_path / "manifest.json",
        "file": array_path(tmp_path, 0, "weight"),
    }  # fmt: skip
    path = paths[spoil]
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(PreparationError, match="can be changed by every user"):
        open_trusted(model.directory, None, Trust())
    if spoil in ("folder", "worker"):
        (tmp_path / "manifest.json").unlink()
        with pytest.raises(PreparationError, match="can be changed by every user"):
            small(tmp_path)


def test_an_interrupted_preparation_is_verified(tmp_path: Path) -> None:
    """A former run's file among this one's: the whole is verified, and a wrong one found."""
    whole = small(tmp_path / "a").directory
    for name in ("owner/g0000.forward.npy", "owner/g0000.scale.npy"):
        (whole / "manifest.json").unlink()
        (whole / "owner" / "g0001.backward.json").unlink()
        watch = Watch()
        assert small(whole, trust=Trust(watch=watch)).trusted
        assert len(watch.reasons) == 1
        (whole / "manifest.json").unlink()
        array = np.load(whole / name)
        np.save(whole / name, array[::-1])
        with pytest.raises(PreparationError, match="is damaged"):
            small(whole)
        np.save(whole / name, array)
        small(whole)


@pytest.mark.parametrize("record", ["g0000.json", "g0000.forward.json"])
def test_records_of_a_former_run_are_not_taken_on_trust(tmp_path: Path, record: str) -> None:
    """One that is no record is as good as none; its files are made again."""
    directory = small(tmp_path / "a").directory
    good = (directory / "manifest.json").read_bytes()
    for content in (b"", b"{}", b"[" * 100_000, b'{"seed": 1}'):
        (directory / "manifest.json").unlink()
        (directory / "owner" / record).write_bytes(content)
        small(directory)
        assert (directory / "manifest.json").read_bytes() == good


def test_nothing_leaves_a_model_that_is_not_trusted(tmp_path: Path) -> None:
    """However it was opened."""
    small(tmp_path)
    model = PreparedModel.open(tmp_path)
    for use in (model.worker_weights, model.owner_matrices):
        with pytest.raises(PreparationError, match="not been verified"):
            use()
    verify(model, quiet)
    assert not model.trusted  # whoever verified it says so


def test_a_clear_one_is_verified_too(tmp_path: Path) -> None:
    """It has no hints, and plans and scales all the same."""
    small(tmp_path, parameters=None)
    watch = Watch()
    assert small(tmp_path, parameters=None, trust=Trust(watch=watch)).trusted
    assert len(watch.reasons) == 1


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted(tuple(GROUPS), preset("paranoid"), TAG), "rank 5, not name 'paranoid', rank 8"),
        (Wanted(tuple(GROUPS), None, TAG), "'exact', not no hints"),
        (Wanted(tuple(GROUPS), STANDARD, b""), "owner tag 'an owner', not no owner tag"),
        (Wanted(tuple(GROUPS), STANDARD, b"\xff"), r"not owner tag '\\\\xff'"),
        (Wanted(tuple(GROUPS[:1]), STANDARD, TAG), "2 groups of modules, not 1"),
        (
            Wanted((GROUPS[0], replace(GROUPS[1], name="b")), STANDARD, TAG),
            "group 'a.o' where 'b' is wanted",
        ),
    ],
)
def test_what_was_asked_for_is_compared(tmp_path: Path, wanted: Wanted, said: str) -> None:
    """Every difference is named, with what to do; nothing is made or changed."""
    small(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for trust in (Trust(), Trust(anew=True)):
        with pytest.raises(PreparationError, match=f"{said}.*--cache"):
            prepare(
                tmp_path, wanted.groups, weight_of, wanted.parameters, quiet,
                owner_tag=wanted.owner_tag, trust=trust,
            )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_tag_gives_other_hints_of_the_same_weights(tmp_path: Path) -> None:
    """And one that is too long is refused."""
    ours, shared = small(tmp_path / "a"), small(tmp_path / "b", tag=b"")
    assert ours.model_digest == shared.model_digest
    assert ours.setup_digest != shared.setup_digest
    pairs = zip(ours.owner_matrices(), shared.owner_matrices(), strict=True)
    assert not any(np.array_equal(a.hint, b.hint) for a, b in pairs)
    with pytest.raises(PreparationError, match="at most 1024 bytes"):
        small(tmp_path / "c", tag=b"x" * 1025)


def test_a_verdict_spares_verification_to_its_owner_alone(tmp_path: Path) -> None:
    """Another owner's, one of another key, of another set-up, or made up is not believed."""
    mine, theirs = Verdicts(tmp_path / "mine"), Verdicts(tmp_path / "theirs")
    model = small(tmp_path / "m", trust=Trust(mine))
    digest = model.setup_digest
    watch = Watch()
    assert small(tmp_path / "m", trust=Trust(mine, watch=watch)).trusted
    assert watch.reasons == []
    assert mine.holds(digest)
    assert not theirs.holds(digest)
    assert not mine.holds(bytes(32))
    theirs.keep(bytes(32))
    verdict = tmp_path / "mine" / "verdicts" / digest.hex()
    content = verdict.read_bytes()
    copied = tmp_path / "theirs" / "verdicts" / digest.hex()
    copied.write_bytes(content)  # another key
    assert not theirs.holds(digest)
    (tmp_path / "mine" / "verdicts" / (b"\1" * 32).hex()).write_bytes(content)  # another digest
    assert not mine.holds(b"\1" * 32)
    for forged in (b"", b"0" * 64 + b"\n", content[:-2], content * 9, "ä".encode() * 32):
        verdict.write_bytes(forged)
        assert not mine.holds(digest)
    assert small(tmp_path / "m", trust=Trust(mine, watch=watch)).trusted
    assert len(watch.reasons) == 1
    assert verdict.read_bytes() == content
    small(tmp_path / "m", trust=Trust(mine, anew=True, watch=watch))
    assert watch.reasons[1:] == ["as asked"]


def test_a_verdict_does_not_cover_files_changed_since(tmp_path: Path) -> None:
    """Digests are compared all the same, and another manifest has another digest."""
    verdicts = Verdicts(tmp_path / "state")
    small(tmp_path / "m", trust=Trust(verdicts))
    path = tmp_path / "m" / "owner" / "g0000.forward.npy"
    np.save(path, np.load(path)[::-1])
    with pytest.raises(PreparationError, match="is damaged"):
        open_trusted(tmp_path / "m", None, Trust(verdicts))


def test_a_failed_verification_leaves_no_verdict(tmp_path: Path) -> None:
    """And the next opening fails again."""
    verdicts = Verdicts(tmp_path / "state")
    small(tmp_path / "m")
    path = tmp_path / "m" / "owner" / "g0000.forward.npy"
    np.save(path, np.load(path)[::-1])
    for _ in range(2):
        with pytest.raises(PreparationError):
            open_trusted(tmp_path / "m", None, Trust(verdicts))
    assert not (tmp_path / "state").exists()


def test_the_owners_key(tmp_path: Path) -> None:
    """Random, for its owner's eyes only; one that others can read or replace is refused."""
    verdicts = [Verdicts(tmp_path / name / "deep") for name in "ab"]
    keys = []
    for one in verdicts:
        one.keep(bytes(32))
        key = one.directory / "owner.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(one.directory.stat().st_mode) == 0o700
        keys.append(key.read_bytes())
        assert [path.name for path in one.directory.iterdir() if path.name[0] == "."] == []
    assert len({*keys}) == 2
    assert all(len(key) == 32 for key in keys)
    for place, mode in (
        (verdicts[0].directory, 0o750),
        (verdicts[1].directory / "owner.key", 0o644),
    ):
        place.chmod(mode)
    for one in verdicts:
        for use in (one.holds, one.keep):
            with pytest.raises(PreparationError, match="open to others"):
                use(bytes(32))


def test_a_key_that_is_none(tmp_path: Path) -> None:
    """Of another length, a directory, a link to nowhere: said, never a verdict under it."""
    verdicts = Verdicts(tmp_path / "state")
    verdicts.keep(bytes(32))
    key = tmp_path / "state" / "owner.key"
    for content in (b"", b"x" * 31, b"x" * 33):
        key.write_bytes(content)
        with pytest.raises(PreparationError, match=r"owner\.key"):
            verdicts.holds(bytes(32))
    key.unlink()
    key.mkdir(mode=0o700)
    with pytest.raises(PreparationError, match=r"owner\.key"):
        verdicts.holds(bytes(32))
    key.rmdir()
    assert not verdicts.holds(bytes(32))
    verdicts.keep(bytes(32))  # under a new key
    assert verdicts.holds(bytes(32))


def test_a_state_directory_that_takes_nothing_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is used, and verified again next time."""
    (tmp_path / "file").write_bytes(b"")
    verdicts = Verdicts(tmp_path / "file" / "state")
    assert small(tmp_path / "m", trust=Trust(verdicts)).trusted
    assert "XDG_STATE_HOME" in caplog.text


def test_a_state_directory_that_cannot_be_searched_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds no verdict and takes none; told once, before anything is prepared."""
    beyond = tmp_path / ("x" * 300)  # a name that no system looks up
    verdicts = Verdicts(beyond / "private-lora")
    assert not verdicts.holds(bytes(32))
    assert "XDG_STATE_HOME" in caplog.text
    verdicts.keep(bytes(32))
    assert small(tmp_path / "m", trust=Trust(verdicts)).trusted
    caplog.clear()
    monkeypatch.setenv("XDG_STATE_HOME", str(beyond))
    assert owner_verdicts() is None
    assert len(caplog.records) == 1
    assert "verified again" in caplog.text
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert owner_verdicts() is not None


def test_a_user_without_a_home_has_no_verdicts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HOME unset and nobody of that number in the system's list, as in some containers."""
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert owner_verdicts() is None
    assert "XDG_STATE_HOME" in caplog.text


def homeless(cls: type[Path]) -> Path:
    """What `Path.home` does there."""
    raise RuntimeError("Could not determine home directory.")


def test_a_place_that_cannot_be_looked_into_is_said(tmp_path: Path) -> None:
    """A name that no system looks up: in one line, before any weight is read."""
    with pytest.raises(PreparationError, match="--cache") as refused:
        small(tmp_path / ("x" * 300))
    assert "\n" not in str(refused.value)


def test_two_processes_that_make_a_key_at_once_agree(tmp_path: Path) -> None:
    """The first one counts."""
    first, second = Verdicts(tmp_path / "state"), Verdicts(tmp_path / "state")
    key = first._new_key()
    assert second._new_key() == key
    assert os.listdir(tmp_path / "state") == ["owner.key"]


def test_a_group_with_one_row(tmp_path: Path) -> None:
    """The smallest there is."""
    group = [GroupSpec("a.o", ("a.o",), 32, (1,))]
    for _ in range(2):
        made = prepare(
            tmp_path / "m", group, lambda name: weight_of(name)[:1], STANDARD, quiet
        )  # fmt: skip
        assert made.trusted
    shutil.rmtree(tmp_path / "m")


MAGNITUDES = st.sampled_from([0.0, 1e-45, 9e-44, 1e-40, 1.5e-36, 1e-5, 1.0, 3e38])
ENTRIES = st.builds(lambda size, share: size * share, MAGNITUDES, st.floats(-1, 1))
ROWS_OF_ALL_SIZES = st.lists(st.lists(ENTRIES, min_size=3, max_size=3), min_size=1, max_size=20)


@given(ROWS_OF_ALL_SIZES)
@settings(max_examples=30, deadline=None)
@example([[1e-45, 0.0, -1e-45], [1.0, 2.0, 3.0]])
@example([[9e-44, 0.0, 0.0], [3e38, 1e-45, 0.0], [0.0, 0.0, 0.0]])
def test_whatever_the_quantiser_makes_is_accepted(rows: list[list[float]]) -> None:
    """Rows of zeros, subnormal ones, huge ones: prepared, then verified by somebody else."""
    weight = torch.tensor(rows, dtype=torch.float32)
    codes, scales = quantise(weight)
    assert scales.min() >= np.finfo(np.float32).tiny
    off = codes * scales.astype(np.float64)[:, None] - weight.numpy()
    assert (np.abs(off) <= 0.5001 * scales[:, None]).all()
    with TemporaryDirectory() as place:
        directory = Path(place) / "m"
        groups = [GroupSpec("a", ("a",), 3, (len(rows),))]
        prepare(directory, groups, lambda name: weight, None, quiet)
        assert open_trusted(directory, None, Trust()).trusted


def test_what_was_prepared_otherwise_is_said_in_few_words(tmp_path: Path) -> None:
    """Whoever wrote it chose its names: the group is named, and what differs, in bounded text."""
    long = tuple(f"{'m' * 1900}{index}" for index in range(20))
    spec = GroupSpec("g" * 1990, long, 4, (1,) * 20)
    tag = b"\xff" * 1000
    prepare(tmp_path, [spec], lambda name: torch.ones(1, 4), None, quiet, owner_tag=tag)
    for other, words in (
        (replace(spec, name="another"), "where 'another' is wanted"),
        (replace(spec, members=(*long[:-1], "last")), "with members 'mm"),
        (replace(spec, members=long[:-1], out_features=(1,) * 19), "number of members 20, not 19"),
        (replace(spec, in_features=5), "with in features 4, not 5"),
        (replace(spec, out_features=(1,) * 19 + (2,)), "with out features 1, not 2"),
    ):
        wanted = Wanted((other,), replace(STANDARD, name="p" * 1500), b"x" * 900)
        with pytest.raises(PreparationError, match="prepared otherwise") as refused:
            PreparedModel.open(tmp_path, wanted)
        text = str(refused.value).replace(str(tmp_path), "")
        assert words in text
        assert len(text) < 700
