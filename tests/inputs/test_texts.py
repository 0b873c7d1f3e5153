"""Every row of the table of texts, and what a table cannot show."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.nn import documents as documents_module
from backends.nn.documents import pieces, sample
from backends.nn.records import RecordError
from backends.nn.texts import DataError, Texts, find_texts
from tests.inputs.table import Row
from tests.inputs.texts import CHAT, LINE, PART, _lines


def documents(texts: Texts, size: int = documents_module.PIECE) -> list[str]:
    """The documents, put together again from their pieces."""
    found: list[str] = []
    for piece in pieces(texts, lambda messages: None, size):
        assert 0 < len(piece.text) <= size
        if piece.begins:
            found.append("")
        found[-1] += piece.text
    return found


@pytest.mark.parametrize("row", PART.rows(), ids=lambda row: row.brings)
def test_texts_that_people_bring(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as it is meant, or refused in one line that quotes nothing of it."""
    monkeypatch.chdir(tmp_path)
    brought = row.make(tmp_path)
    if row.refusal is not None:
        with pytest.raises(DataError) as refused:
            documents(find_texts([brought.path], brought.own))
        said = str(refused.value)
        assert re.search(row.refusal, said), said
        assert "\n" not in said
        assert "secret" not in said
        return
    texts = find_texts([brought.path], brought.own)
    assert documents(texts) == brought.documents
    assert re.search(brought.summary, texts.summary()), texts.summary()


DOCUMENTS = {
    b"%PDF-1.7\n1 0 obj\n": "a PDF document", b"{\\rtf1 text}": "an RTF document",
    b"%!PS-Adobe-3.0\n": "a PostScript document", b"%FDF-1.2\n": "data of a PDF form",
}  # fmt: skip


@pytest.mark.parametrize("name", ["a.txt", "a", "a.pdf", "a.jsonl"])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n", b" \r\n\t", b"\x04"])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_that_are_all_ascii_are_no_text(
    document: bytes, before: bytes, name: str, tmp_path: Path
) -> None:
    """Whatever they are called, and whatever stands before their mark, as their readers have it;
    and a text that speaks of one is a text."""
    path = tmp_path / name
    path.write_bytes(before + document * 20)
    with pytest.raises(DataError, match=f"it is {DOCUMENTS[document]}; "):
        find_texts([path])
    (tmp_path / "b.txt").write_bytes(b"It begins with " + document)
    assert len(find_texts([tmp_path]).files) == 1


def test_a_chat_template_writes_conversations_and_says_what_it_cannot(tmp_path: Path) -> None:
    """Marked, so that nothing is put around them twice; a refusal names the line."""
    path = tmp_path / "a.jsonl"
    path.write_text(_lines({"text": "plain"}, {"messages": CHAT}))
    texts = find_texts([path])
    found = list(pieces(texts, lambda messages: f"<s>{messages[0]['content']}</s>"))
    assert [(p.text, p.marked) for p in found] == [("plain", False), ("<s>Hello?</s>", True)]

    def refuses(messages: object) -> str:
        raise RecordError("not this one")

    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not this one"):
        list(pieces(texts, refuses))


def test_long_documents_come_in_pieces_cut_where_tokens_end(tmp_path: Path) -> None:
    """Before single spaces where there are some; whatever the size, nothing is lost."""
    text = "".join(f"word {i} indented\n    more\n\nnext\n" for i in range(200)) + "x" * 500
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(_lines({"text": text}))
    texts = find_texts([tmp_path])
    for size in (1, 7, 64, 300, 10**6):
        assert documents(texts, size) == [text, text]
    later = [piece.text for piece in pieces(texts, lambda messages: None, 300) if not piece.begins]
    assert len(later) > 20
    assert all(piece[0] == " " and piece[1] != " " for piece in later if "x" not in piece)
    (tmp_path / "c.txt").write_text("日本\n" * 200)
    lines = list(pieces(find_texts([tmp_path / "c.txt"]), lambda messages: None, 100))
    assert all(piece.text.endswith("\n") for piece in lines)
    assert [p.done_bytes for p in pieces(texts, lambda messages: None)][-1] == texts.size_bytes


def test_a_file_that_changes_between_is_not_read_on(tmp_path: Path) -> None:
    """What is trained on is what was looked through and said."""
    path = tmp_path / "a.txt"
    path.write_text(LINE * 10)
    texts = find_texts([path])
    path.write_text("another\n")
    with pytest.raises(DataError, match="has changed"):
        documents(texts)


def test_files_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    """By folder and name, whatever order the system lists them in; so a resumed run agrees."""
    names = ["b/z", "a-b", "a/c/d", "a/c-d", "a.txt", "A", "a/b"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(find_texts([tmp_path])) == [
        str(path.relative_to(tmp_path)) for path in sorted(tmp_path / name for name in names)
    ]


def test_what_cannot_be_opened_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder and a file that the system refuses; named, the file is an error."""
    (tmp_path / "a.txt").write_text(LINE)
    (tmp_path / "b.txt").write_text(LINE)
    (tmp_path / "c").mkdir()
    really_open, really_scan = os.open, os.scandir

    def refusing(path: object, *rest: int, **more: int) -> int:
        if str(path).endswith("b.txt"):
            raise PermissionError(13, "Permission denied")
        return really_open(path, *rest, **more)  # type: ignore[call-overload]

    def not_listing(path: str) -> object:
        if str(path).endswith("c"):
            raise PermissionError(13, "Permission denied")
        return really_scan(path)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(os, "scandir", not_listing)
    texts = find_texts([tmp_path])
    assert documents(texts) == [LINE]
    assert "left out 2: 2 not readable" in texts.summary()
    with pytest.raises(DataError, match=r"b\.txt: it cannot be read \(Permission denied\)"):
        find_texts([tmp_path / "b.txt"])


def test_a_sample_is_of_files_all_over(tmp_path: Path) -> None:
    """Some of each of at most so many; of a single one, several parts."""
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{i}\n")
    texts = find_texts([tmp_path])
    found = sample(texts, lambda messages: None, count=10)
    assert found == [f"{i}\n" for i in range(0, 40, 4)]
    (tmp_path / "a.txt").write_text(LINE * 100)
    assert len(sample(find_texts([tmp_path / "a.txt"]), lambda messages: None, 8, 100)) == 8


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_sample_is_of_places_all_over_a_file(tmp_path: Path, name: str) -> None:
    """What a tokenizer loses may begin late."""
    lines = [f"line {i}\n" for i in range(40_000)]
    if name == "a.jsonl":
        lines = [_lines({"text": line}) for line in lines]
    (tmp_path / name).write_text("".join(lines))
    found = sample(find_texts([tmp_path]), lambda messages: None, 8, 100)
    places = [int(re.findall(r"line (\d+)\n", text)[0]) for text in found]
    assert places == sorted(places)
    assert len(places) == 8
    assert max(b - a for a, b in zip(places, [*places[1:], 40_000], strict=True)) < 8_000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(("text", "messages", "role", "content", "prompt", "completion", "from",
                         "conversations", "instruction", "output", "input", "type", "tools", "x")),
        inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=40)
    | st.text(max_size=20).map(lambda text: text.encode("utf-16"))
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.lists(VALUES).map(lambda values: _lines(*values).encode()),
    suffix=st.sampled_from((".txt", ".json", ".jsonl", "")),
    in_folder=st.booleans(),
)
def test_any_file_is_read_or_refused_in_a_line(
    content: bytes, suffix: str, in_folder: bool, tmp_path: Path
) -> None:
    """Whatever it holds, nothing but a DataError comes of it."""
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    refusals: list[str] = []
    try:
        found = documents(find_texts([tmp_path if in_folder else path]))
    except DataError as error:
        found, refusals = [], [str(error)]
    path.unlink()
    assert not any("\n" in said for said in refusals)
    assert not any("\0" in text for text in found)
