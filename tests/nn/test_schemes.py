"""A model over a scheme that packs tokens into blocks, through the whole session; and who may."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends import session
from backends.defaults import SCHEMES
from backends.errors import UserError
from backends.hardware import CPU
from backends.he.openfhe import NAMES
from backends.he.openfhe.library import OpenFheError, openfhe
from backends.he.scaled import ScaledOwner
from backends.nn.adapters import add_lora
from backends.nn.local import localise
from backends.session import HERE, SchemeError, Workers, opened, require_scheme
from docs.skeleton_backend import SkeletonOwner, SkeletonWorker
from scenarios.quickstart.__main__ import parse
from scenarios.quickstart.run import Quickstart
from tests.nn.conftest import Tiny, tokens


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    loss = model(input_ids=ids, labels=ids).loss
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("backend", ["clear", "mlwe"])
def test_a_session_runs_over_another_scheme(
    llama: Tiny, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, of a model that was prepared for another one: its weights serve all."""
    made: list[ScaledOwner] = []

    def ciphers(*_: object) -> tuple[ScaledOwner, list[SkeletonWorker]]:
        made.append(SkeletonOwner())
        return made[0], [SkeletonWorker()]

    monkeypatch.setattr(session, "make_ciphers", ciphers)
    prepared, ids = llama.prepared[backend], tokens(2, 9)
    there, here = llama.skeleton(), llama.skeleton()
    localise(here, prepared)
    private, clear = (add_lora(each.model, 4, 8, seed=0) for each in (there, here))
    with opened(there, prepared, scheme=NAMES[0]) as running:
        found = gradients(private, ids)
        there.remote.forget_lane()
        used = running.usage()
        assert used.blocks >= 18 * used.answers / 2
        assert running.exactness() is not None
        packing = made[0].packing
        assert packing is not None
        assert used.bytes_up > packing.bytes_of(48, 18)
    for ours, theirs in zip(found, gradients(clear, ids), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_schemes_to_compare_with_serve_in_this_process_only(tmp_path: Path) -> None:
    """Said before anything is prepared, in one line."""
    away = Workers(("gpu.example:7443",))
    for name in SCHEMES[1:]:
        with pytest.raises(SchemeError, match=rf"{name} .*leave --worker out") as caught:
            require_scheme(name, CPU, away)
        assert "\n" not in str(caught.value)
    require_scheme(SCHEMES[0], CPU, away)
    require_scheme(SCHEMES[0], CPU, HERE)
    assert not any(tmp_path.iterdir())


def test_a_run_without_openfhe_ends_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for it is told what is missing; nothing was prepared."""

    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    openfhe.cache_clear()
    monkeypatch.setattr("backends.he.openfhe.library.importlib.import_module", missing)
    cache = tmp_path / "cache"
    for name in SCHEMES[1:]:
        words = ["--scheme", name, "--cache", str(cache), "--out", str(tmp_path / "out")]
        with pytest.raises(OpenFheError, match="does not load") as caught:
            Quickstart(parse(words))
        assert isinstance(caught.value, UserError)
    assert not cache.exists()
