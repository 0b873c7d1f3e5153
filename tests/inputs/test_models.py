"""Every base model of the table: the same as in clear, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.errors import UserError
from benchmarks.zoo.comparing import compare
from benchmarks.zoo.ours import open_skeleton
from tests.inputs.models import PART
from tests.inputs.table import Row

pytestmark = pytest.mark.usefixtures("tiny_models")
ROWS = {row.brings: row for row in PART.rows()}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_is_brought(row: Row, tmp_path: Path) -> None:
    """Logits and gradients within 2e-5 of the model in clear, or the words of the refusal."""
    brought = row.make(tmp_path)
    if row.refusal is None:
        outcome = compare(brought.path, brought.truth)
        assert outcome.status == "exact", outcome
        return
    with pytest.raises(UserError, match=row.refusal) as refused:
        open_skeleton(brought.path)
    assert "\n" not in str(refused.value)
