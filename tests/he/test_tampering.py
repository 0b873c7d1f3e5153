"""Whatever is altered in a prepared model, with or without its digests, is found and said."""

from __future__ import annotations

import json
import os
import pickle  # to write what must not be read
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.he import verification
from backends.he.manifest import PreparationError
from backends.he.params import NTT_PRIME
from backends.he.public import HintBuilder, PublicMatrix
from backends.he.store import PreparedModel
from backends.he.verification import Trust, open_trusted
from tests.he.small_model import (
    at,
    changed,
    covered_up,
    manifest_of,
    places,
    put_manifest,
    rewritten,
    small,
)

FILES = [
    f"{role}/g{index:04d}.{kind}.npy"
    for index in (0, 1)
    for role, kind in (
        ("worker", "weight"), ("owner", "scale"), ("owner", "channels"), ("owner", "forward"),
        ("owner", "backward"),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good one, only to be copied."""
    directory = tmp_path_factory.mktemp("made") / "model"
    small(directory)
    return directory


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A good one to spoil."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def complaint(act: Callable[[], object]) -> str:
    """What the PreparationError said; anything else that is raised is a failure, as is nothing."""
    try:
        act()
    except PreparationError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 1000
        assert "delete" in text or "run it again" in text  # what to do
        return text
    except Exception as error:
        return f"NOT CLEAR: {error!r}"
    return "ACCEPTED"


def before_any_kernel(directory: Path) -> str:
    """What opening says that only looks at the manifest, sizes and headers."""
    return complaint(lambda: PreparedModel.open(directory))


def opening(directory: Path) -> str:
    """What opening says that trusts nothing."""
    return complaint(lambda: open_trusted(directory, None, Trust()))


def good(said: str) -> bool:
    """Whether it was refused as it should be."""
    return not said.startswith(("ACCEPTED", "NOT CLEAR"))


def test_the_good_one_is_accepted(model: Path) -> None:
    """As it is, and with its own manifest covered up again: the tests below test something."""
    assert opening(model) == "ACCEPTED"
    put_manifest(model, covered_up(manifest_of(model)))
    assert opening(model) == "ACCEPTED"


def lookalikes(value: Any) -> Iterator[Any]:
    """Other values that could stand in the same place."""
    if isinstance(value, str):
        yield "0" * len(value)
        yield value[:-1] + ("0" if value[-1:] != "0" else "1")
        yield value + "00"
        yield value.upper() + "A"
        yield ""
    elif isinstance(value, int):
        yield from (value + 1, value - 1, 0, 1, -value, value * 2, float(value), str(value))
    elif isinstance(value, float):
        yield from (value * 1.001, value * 0.999, value / 2, -value, 0.0, 1e308, 5e-324)
    elif isinstance(value, list):
        yield from ([], value[:-1], [*value, value[-1]], value[::-1])
    elif isinstance(value, dict):
        yield from ({key: value[key] for key in value if key != gone} for gone in value)
        yield value | {"more": 1}
        yield from (value | {gone: None} for gone in value)


STRANGE: list[Any] = [
    None, True, -1, 1.5, 1 << 70, "", "\ud800", "9" * 5000, [], {}, [[]],
]  # fmt: skip


@pytest.mark.slow
def test_every_value_of_a_strange_type_is_refused(model: Path) -> None:
    """At each place, before anything but the manifest is read."""
    record = manifest_of(model)
    survivors = []
    for path in places(record):
        for value in STRANGE:
            if json.dumps(value) == json.dumps(at(record, path)):
                continue
            altered = changed(record, path, value)
            for text in (altered, covered_up(altered)):
                if text == record:
                    continue
                put_manifest(model, text)
                said = opening(model)
                survivors += [] if good(said) else [(path, value, said)]
    assert not survivors


def test_numbers_that_are_none(model: Path) -> None:
    """NaN, infinities and what overflows to one, wherever a number stands."""
    record = manifest_of(model)
    for path in places(record):
        if isinstance(at(record, path), int | float):
            text = json.dumps(changed(record, path, "HERE"))
            for word in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000):
                (model / "manifest.json").write_text(text.replace('"HERE"', word))
                assert good(before_any_kernel(model)), (path, word)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b" " * (17 << 20),
     b'{"a": ' * 50_000, pickle.dumps({"format": 3})],
)  # fmt: skip
def test_a_manifest_that_is_none(model: Path, content: bytes) -> None:
    """Refused in a line."""
    (model / "manifest.json").write_bytes(content)
    assert good(before_any_kernel(model))


def test_a_key_that_stands_twice(model: Path) -> None:
    """Readers differ in which one they take."""
    text = (model / "manifest.json").read_text()
    (model / "manifest.json").write_text(text.replace('"format": 3', '"format": 3, "format": 3'))
    assert "twice" in before_any_kernel(model)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


OBSTACLES: list[Callable[[Path], None]] = [Path.unlink, _directory, _nowhere, _pipe, _endless]


@pytest.mark.parametrize("name", ["manifest.json", *FILES])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_is_no_file(model: Path, name: str, obstacle: Callable[[Path], None]) -> None:
    """Nothing, a directory, a link to nowhere, a pipe (nobody waits for it), a device."""
    obstacle(model / name)
    assert Path(name).name in before_any_kernel(model) or name == "manifest.json"
    assert good(before_any_kernel(model))


def spoilt(content: bytes, array: np.ndarray[Any, Any], path: Path) -> Iterator[bytes]:
    """Files that are not quite that array."""
    yield b""
    yield content[:-1]
    yield content[: len(content) // 2]
    yield content[:64]
    yield content + b"\0"
    yield content + content
    yield bytes([content[0] ^ 1]) + content[1:]
    yield content.replace(b"False", b"True ")
    objects = np.empty(3, object)
    unsigned = {"int8": np.uint8, "float32": np.int32, "int32": np.float32}[array.dtype.name]
    swapped = array.astype(array.dtype.newbyteorder(">"))
    for other in (
        array[:-1], array[:1], np.concatenate([array, array]), array[None], array.reshape(-1),
        np.asfortranarray(array), array.astype(np.float64), array.view(unsigned), swapped,
        array.astype(np.int16), np.zeros((0, *array.shape[1:]), array.dtype), objects,
        np.float32(1.0),
    ):  # fmt: skip
        same = other.dtype == array.dtype and other.shape == array.shape
        if same and np.asarray(other).flags.c_contiguous and other.dtype.byteorder != ">":
            continue
        np.save(path, other)
        yield path.read_bytes()
    for shape in ("(1000000000000, 9)", "(-1, 2)", "(" + "9" * 30 + ",)", "__import__('os')"):
        start = content.index(b"(")
        stop = content.index(b")") + 1
        yield content[:start] + shape.encode() + content[stop:]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_shape_is_found_before_it_is_read(
    model: Path, name: str, tmp_path: Path
) -> None:
    """Cut, doubled, of another type, order or shape; with the digest of what it holds, or not."""
    content, array = (model / name).read_bytes(), np.load(model / name)
    count = 0
    for spoiled in spoilt(content, array, tmp_path / "other.npy"):
        (model / name).write_bytes(spoiled)
        assert f"{Path(name).name} is damaged" in before_any_kernel(model), spoiled[:128]
        count += 1
    assert count > 18


@pytest.mark.parametrize("name", FILES)
def test_too_few_tiles_whatever_the_manifest_says(model: Path, name: str) -> None:
    """A shape in the manifest that fits the file is not believed either."""
    array = np.load(model / name)
    index, kind = int(Path(name).name[1:5]), name.split(".")[1]
    for other in (array[:-1], np.concatenate([array, array[-1:]])):
        rewritten(model, name, other)
        record = manifest_of(model)
        record["groups"][index]["arrays"][kind]["shape"] = list(other.shape)
        put_manifest(model, covered_up(record))
        assert good(before_any_kernel(model))


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_damage(model: Path, name: str) -> None:
    """Anywhere in the elements."""
    content = (model / name).read_bytes()
    for place in (128, len(content) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[max(place, 128)] ^= 1
        (model / name).write_bytes(flipped)
        assert f"{Path(name).name} is damaged" in opening(model)


def other_elements(name: str, array: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """The same shape with other contents, large changes and small ones."""
    first, last = (0,) * array.ndim, tuple(n - 1 for n in array.shape)
    values: dict[str, list[Any]] = {
        "weight": [-128, 127, 0],
        "scale": [np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-3, 1e38],
        "channels": [np.nan, np.inf, 0.0, -1.0, 1.5, 0.5, 4.0, 2.0**21],
        "forward": [1, NTT_PRIME // 2, -(NTT_PRIME // 2) - 1, -(1 << 31), (1 << 31) - 1],
    }
    values["backward"] = values["forward"]
    for value in values[name.split(".")[1]]:
        for place in (first, last):
            if array[place] != value:
                copy = array.copy()
                copy[place] = value
                yield copy
    if array.dtype == np.int32:
        copy = array.copy()
        copy[first] += NTT_PRIME if copy[first] < 0 else -NTT_PRIME  # the same residue
        yield copy
        yield np.zeros_like(array)
        yield array[..., ::-1].copy()
        yield np.roll(array, 1, axis=2)
    if not np.array_equal(array, array[::-1]):
        yield array[::-1].copy()


@pytest.mark.parametrize("name", FILES)
def test_elements_that_do_not_follow_from_the_weights(model: Path, name: str) -> None:
    """With all digests made to fit: only verification can tell, and it does."""
    array = np.load(model / name)
    for other in other_elements(name, array):
        rewritten(model, name, other)
        assert before_any_kernel(model) == "ACCEPTED"
        assert good(opening(model))


def remade(directory: Path, weight: np.ndarray[Any, Any], scale: np.ndarray[Any, Any]) -> None:
    """Group 1 with other weights or scales, and with plans and hints to them, as an owner would."""
    rewritten(directory, FILES[5], weight)
    rewritten(directory, FILES[6], scale)
    record = manifest_of(directory)
    with np.errstate(all="ignore"):
        for direction, wide, s in (("forward", weight, scale), ("backward", weight.T, None)):
            wide = wide.astype(np.int64)
            squares = (wide**2).sum(axis=1)
            s = np.ones(len(wide)) if s is None else s.astype(np.float64)
            record["groups"][1][f"{direction}_plan"] = {
                "max_norm": float(np.sqrt(squares.max())),
                "max_l1": float(np.abs(wide).sum(axis=1).max()),
                "noise_gain": float((s**2).sum() / (squares @ s**2)),
                "in_features": wide.shape[1],
                "up_bits": 24,
                "down_bits": 16,
            }
    put_manifest(directory, covered_up(record))
    # A's seed is another one now, for every group.
    seed = bytes.fromhex(manifest_of(directory)["seed"])
    builder = HintBuilder(PublicMatrix(seed, record["parameters"]["rank"]))
    for index in (0, 1):
        codes = np.load(directory / FILES[5 * index])
        for direction in ("forward", "backward"):
            hint = builder.build(codes, direction == "forward")
            rewritten(directory, f"owner/g{index:04d}.{direction}.npy", hint)


def test_all_made_to_fit(model: Path) -> None:
    """Another model is a right one; one of weights or scales that no quantiser makes is not."""
    weight, scale = (np.load(model / name) for name in FILES[5:7])
    remade(model, -weight, scale * 2)
    assert opening(model) == "ACCEPTED"
    below = weight.copy()
    below[3, 5] = -128
    remade(model, below, scale)
    assert "-128" in opening(model)
    for value in (np.nan, np.inf, 0.0, -1.0):
        strange = scale.copy()
        strange[7] = value
        remade(model, weight, strange)
        assert good(opening(model))


def test_no_kernel_sees_what_has_another_shape(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even verification's own."""

    def never(*arguments: object) -> None:
        raise AssertionError

    for name in ("_combine_tiles", "_combine_codes", "_sum_norms", "expand_tile"):
        monkeypatch.setattr(verification, name, never)
    hint = np.load(model / FILES[3])
    np.save(model / FILES[3], hint[:-1])
    assert "is damaged" in opening(model)
