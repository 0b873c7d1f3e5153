"""A remote head, whose backward product the owner makes itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from backends.he.interface import OwnerMatrix, Values
from backends.he.plan import MatrixPlan
from backends.he.preparation import prepare
from backends.he.quantise import dequantise
from backends.he.rows import chosen, weighted_rows
from backends.he.store import PreparedModel
from backends.nn import head
from backends.nn.adapters import add_lora, trainable
from backends.nn.head import LocalHead
from backends.nn.local import localise
from backends.nn.losses import token_losses
from backends.nn.remote import RemoteLinear
from backends.nn.selfcheck import exact_linear
from backends.nn.skeleton import Skeleton, build_skeleton
from tests.nn.conftest import BASES, Tiny, tokens
from tests.nn.test_remote import gradients, lora

WORDS, WIDTH = 4096, 24


def some_head(seed: int = 0) -> tuple[LocalHead, torch.Tensor]:
    """A head as of a prepared model, with scales on both sides, and its floating weight."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (WORDS, WIDTH), np.int8)
    codes.setflags(write=False)
    scales = [rng.uniform(0.5, 2, n).astype(np.float32) for n in (WORDS, WIDTH)]
    matrix = OwnerMatrix("head backward", *scales, MatrixPlan(1.0, 1.0, 1.0, WORDS))
    weight = torch.from_numpy(scales[0][:, None] * codes * scales[1])
    return LocalHead.of(3, codes, matrix), weight


def softmax_gradient(count: int) -> torch.Tensor:
    """float32[count, WORDS] of a model that is sure of a few words."""
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(count, WORDS, generator=generator)
    p = torch.softmax(logits, -1)
    p[torch.arange(count), torch.randint(0, WORDS, (count,), generator=generator)] -= 1
    return p


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("chunk", [1, 5 * WORDS])
def test_the_error_is_small_and_no_bias(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one product, and of the mean of many, which tends to the product; dy is left as it was."""
    monkeypatch.setattr(head, "_SMALL_CHUNK_VALUES", chunk)
    local, weight = some_head()
    dy = softmax_gradient(7)
    before, right = dy.clone(), dy @ weight
    found = [local.input_gradient(dy) for _ in range(60)]
    assert torch.equal(dy, before)
    errors = [off(each, right) for each in found]
    assert max(errors) < 0.03
    assert off(torch.stack(found).mean(0), right) < 2 * np.mean(errors) / np.sqrt(60)


def test_a_head_of_few_words_is_multiplied_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to be drawn."""
    monkeypatch.setattr(head, "LARGEST", WORDS)
    local, weight = some_head()
    dy = softmax_gradient(3)
    torch.testing.assert_close(local.input_gradient(dy), dy @ weight, rtol=1e-4, atol=1e-4)


def test_as_many_rows_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one word or all have a gradient, or none."""
    local, _ = some_head()
    seen = []
    multiply = LocalHead._multiply
    monkeypatch.setattr(
        LocalHead, "_multiply", lambda s, v, i: seen.append(i.shape) or multiply(s, v, i)
    )
    dy = torch.zeros(3, WORDS)
    dy[1, 5], dy[2] = 1.0, 1.0
    found = local.input_gradient(dy)
    assert seen == [(3, head.LARGEST + head.SAMPLED)]
    assert not found[0].any()


def test_a_device_chooses_by_the_same_rule() -> None:
    """Torch's operations, which devices use, against the kernel, for the same offsets."""
    dy, scale = softmax_gradient(5), torch.rand(WORDS) + 0.5
    offset, largest = np.random.default_rng(0).random(5), 100
    factors, index = chosen(dy.numpy(), scale.numpy(), largest, offset, head.SAMPLED)
    theirs, places = head.chosen_by_torch(dy * scale, largest, torch.from_numpy(offset).float())
    for a, b in zip(index[:, :largest], places[:, :largest].numpy(), strict=True):
        assert len(set(a)) == largest
        assert len(set(a) & set(b)) > 0.8 * largest, "but for some as large as the last"
    sampled = factors[:, largest:], theirs[:, largest:].numpy()
    assert np.allclose(*(np.abs(each) for each in sampled), rtol=0.05)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 40), st.integers(1, 30), st.floats(0, 0.999),
    st.integers(0, 99), st.sampled_from([1.0, 1e-30, 1e30]),
)  # fmt: skip
def test_what_is_chosen_by_hand(
    words: int, largest: int, count: int, offset: float, seed: int, size: float
) -> None:
    """None that is left is larger by a bin than one that was taken; others are taken as often as
    their share of a step says; every one has its sign."""
    rng, largest = np.random.default_rng(seed), min(largest, words)
    dy = rng.standard_normal((1, words)) * (rng.random((1, words)) < 0.6) * size
    dy, scale = dy.astype(np.float32), rng.uniform(0.5, 2, words).astype(np.float32)
    factors, index = chosen(dy, scale, largest, np.array([offset]), count)
    values, top, drawn = dy[0] * scale, index[0, :largest], index[0, largest:]
    assert len(set(top)) == largest
    assert np.array_equal(factors[0, :largest], values[top])
    rest = np.abs(values).astype(np.float64)
    rest[top] = 0
    if largest:
        assert rest.max() <= np.abs(values[top]).min() * (1 + 2**-4)
    step = rest.sum() / count
    if step == 0:
        assert not factors[0, largest:].any()
        return
    assert np.allclose(factors[0, largest:], np.sign(values[drawn]) * step, rtol=1e-5)
    taken = np.bincount(drawn, minlength=words)
    assert np.all(np.abs(taken - rest / step) <= 1 + 1e-4)
    assert not taken[rest == 0].any()
    assert np.all(np.diff(drawn) >= 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 70), st.integers(0, 99))
def test_weighted_rows_by_hand(tokens_: int, count: int, width: int, seed: int) -> None:
    """Against numpy's own indexing in float64."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (30, width)).astype(np.int8)
    index = rng.integers(0, 30, (tokens_, count))
    values = rng.standard_normal((tokens_, count)).astype(np.float32)
    right = np.einsum("ti,tik->tk", values.astype(np.float64), codes[index].astype(np.float64))
    assert np.allclose(weighted_rows(values, index, codes), right, rtol=1e-4, atol=1e-3)


def test_training_through_a_remote_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are those of the local model with the worker's weights."""
    monkeypatch.setattr(head, "LARGEST", 4096)  # so that nothing is drawn
    skeleton = build_skeleton(BASES["llama"], remote_head=True)
    assert skeleton.head == "lm_head"
    assert "lm_head" not in skeleton.adapted
    prepared = prepare(
        tmp_path, skeleton.groups, skeleton.load_weight, None, lambda label, done: None
    )
    reference = build_skeleton(BASES["llama"], remote_head=True)
    localise(reference, prepared)
    ids = tokens(2, 12)
    adapted = add_lora(reference.model, 4, 8, seed=1, linears=reference.adapted)
    names = list(trainable(adapted))
    share = skeleton.local_head(prepared)
    assert share is not None
    model = lora(skeleton.model)
    assert list(trainable(model)) == names
    with torch.no_grad():
        for ours, theirs in zip(
            trainable(model).values(), trainable(adapted).values(), strict=True
        ):
            theirs.copy_(ours)
    expected_loss, expected = gradients(adapted, ids)
    asked, rest = [], exact_linear(reference_of(skeleton, prepared))

    def linear(matrix: int, x: Values) -> Values:
        asked.append(matrix)
        return rest(matrix, x)

    with skeleton.remote.connected(linear, share):
        loss, found = gradients(model, ids)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert skeleton.unasked == {2 * share.group + 1}
    assert 2 * share.group in asked
    assert 2 * share.group + 1 not in asked, "its backward product is the owner's"


def reference_of(skeleton: Skeleton, prepared: PreparedModel) -> Skeleton:
    """The skeleton with weights as the worker has them."""
    weights, matrices = prepared.worker_weights(), prepared.owner_matrices()
    parts = {}
    for i, group in enumerate(skeleton.groups):
        whole = dequantise(weights[i], matrices[2 * i].out_scale)
        for name, part in zip(group.members, whole.split(list(group.out_features)), strict=True):
            parts[name] = part
    return replace(skeleton, read=parts.__getitem__, transposed=frozenset())


def test_a_remote_head_gets_no_adapter() -> None:
    """Nor does one that is asked for by nobody."""
    model = add_lora(build_skeleton(BASES["gpt2"], remote_head=True).model, 4, 8, seed=0)
    heads = [m for m in model.modules() if isinstance(m, RemoteLinear) and m.is_head]
    assert len(heads) == 1
    assert not any("lm_head" in name for name in trainable(model))


def test_nothing_is_sent_back_below_the_lowest_adapter(tiny: Tiny) -> None:
    """With adapters in the upper layer only, the lower one's products are of forward alone."""
    skeleton = tiny.skeleton()
    leaves = sorted({name.rpartition(".")[2] for name in skeleton.shapes})
    config = LoraConfig(
        r=4, target_modules=leaves, layers_to_transform=[1], task_type="CAUSAL_LM",
        fan_in_fan_out=False,
    )  # fmt: skip
    model = get_peft_model(skeleton.model, config)
    asked, exact = [], exact_linear(skeleton)

    def linear(matrix: int, x: Values) -> Values:
        asked.append(matrix)
        return exact(matrix, x)

    with skeleton.remote.connected(linear):
        torch.autograd.grad(
            token_losses(model, tokens(1, 8)), list(trainable(model).values()), allow_unused=True
        )
    forward = list(range(0, 2 * len(skeleton.groups), 2))
    assert asked[: len(forward)] == forward
    # The upper layer has half of the groups; the input of its first needs no gradient.
    assert len(asked) == len(forward) + len(forward) // 2 - 1
    assert all(matrix // 2 > len(forward) // 2 for matrix in asked[len(forward) :])
