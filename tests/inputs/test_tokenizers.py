"""Every tokenizer of the table: it encodes a text and gives it back, or is refused in one line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from backends.nn.tokenizer import TokenizerError, load_tokenizer
from tests.inputs.table import Row
from tests.inputs.tokenizers import PART

pytestmark = pytest.mark.usefixtures("tiny_models")
ROWS = {row.brings: row for row in PART.rows()}
TEXT = "def f(x):\n    return x  # naïve\n"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_is_brought(row: Row, tmp_path: Path) -> None:
    """Of files alone: nothing is asked of the hub."""
    if "without the package" in row.brings and find_spec("sentencepiece"):
        pytest.skip("the package is here")
    brought = row.make(tmp_path)
    if row.refusal is None:
        tokenizer = load_tokenizer(brought)
        assert tokenizer.decode(tokenizer.encode([TEXT])[0].tolist()) == TEXT
        return
    with pytest.raises(TokenizerError, match=row.refusal) as refused:
        load_tokenizer(brought)
    assert "\n" not in str(refused.value)
