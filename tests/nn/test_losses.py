"""The loss that spends its logits is torch's cross-entropy, in less memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from backends.nn import losses
from backends.nn.losses import cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.sampled_from(DTYPES),
    st.integers(0, 99), st.sampled_from([0.01, 3.0, 60.0]), st.booleans(),
)  # fmt: skip
def test_it_is_torchs(
    batch: int, length: int, vocabulary: int, dtype: torch.dtype, seed: int, size: float,
    spend: bool,
) -> None:  # fmt: skip
    """Loss and gradient, in chunks of two tokens, with tokens that do not count."""
    generator = torch.Generator().manual_seed(seed)
    drawn = size * torch.randn(batch, length, vocabulary, generator=generator)
    targets = torch.randint(-1, vocabulary, (batch, length), generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    leaf = drawn.to(dtype).requires_grad_()
    expected = functional.cross_entropy(
        leaf.reshape(-1, vocabulary).to(wide), targets.reshape(-1), ignore_index=-1,
        reduction="sum",
    )  # fmt: skip
    (slope,) = torch.autograd.grad(0.5 * expected, leaf)
    logits = leaf.detach().clone().requires_grad_() * 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_SMALL_CHUNK_VALUES", 2 * vocabulary)
        found = cross_entropy(logits, targets, spend)
        (gradient,) = torch.autograd.grad(0.5 * found, logits)
    assert found.dtype == wide
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    tolerance = max(4e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(gradient, slope, rtol=tolerance, atol=1e-6)
    assert (gradient.data_ptr() == logits.data_ptr()) == spend
    assert not gradient[targets < 0].any()


class Largest(TorchDispatchMode):
    """The most values that an operation makes room for."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in held:
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_second_array_is_ever_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward make nothing larger than a chunk beside the logits."""
    monkeypatch.setattr(losses, "_SMALL_CHUNK_VALUES", 4 * 50)
    logits = torch.randn(2, 32, 50, dtype=dtype, requires_grad=True) * 1
    targets = torch.zeros(2, 32, dtype=torch.long)
    with Largest() as seen, torch.autograd.set_multithreading_enabled(False):
        torch.autograd.grad(cross_entropy(logits, targets, spend=True), logits)
    assert seen.most <= 4 * 50


class Capped(torch.nn.Module):
    """A model that ends in what its own gradient needs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(11, 11))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        self.logits = torch.tanh(self.table[input_ids])
        return self


class CappedAndCut(Capped):
    """One that returns a view of what its own gradient needs."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        super().forward(input_ids, use_cache)
        self.logits = self.logits[..., :11].view(*input_ids.shape, 11)
        return self


def assert_gradient_of_capped(model: Capped, tokens: torch.Tensor) -> None:
    """The loss's gradient is that of torch's own cross-entropy after a tanh."""
    (found,) = torch.autograd.grad(losses.token_losses(model, tokens), model.table)
    logits = torch.tanh(model.table[tokens])
    expected = functional.cross_entropy(
        logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1), reduction="sum"
    )
    torch.testing.assert_close(found, torch.autograd.grad(expected, model.table)[0])


def test_a_view_of_what_a_gradient_needs_is_left_alone() -> None:
    """As of a model that cuts its vocabulary after a tanh."""
    model, tokens = CappedAndCut(), torch.arange(10).reshape(2, 5)
    assert_gradient_of_capped(model, tokens)


def test_logits_that_a_gradient_needs_are_left_alone() -> None:
    """A tanh at the end keeps its result; and whoever spends it hears of it."""
    model, tokens = Capped(), torch.arange(10).reshape(2, 5)
    assert_gradient_of_capped(model, tokens)
    loss = cross_entropy(torch.tanh(model.table[tokens]), tokens, spend=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
