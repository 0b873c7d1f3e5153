"""What tests with tiny models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, which is faster than two on so little; no hub; transformers says nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
