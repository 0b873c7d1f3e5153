"""A remote head: the owner's share of its backward product, and what is left for a worker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from backends.he.interface import OwnerMatrix, Values
from backends.he.plan import MatrixPlan
from backends.he.preparation import prepare
from backends.he.quantise import dequantise
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


@pytest.mark.parametrize("chunk", [1, 5 * WORDS])
def test_both_shares_make_the_whole_product(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker gets all but the same number of entries of each token; then dy is as it was."""
    monkeypatch.setattr(head, "_SMALL_CHUNK_VALUES", chunk)
    local, weight = some_head()
    dy = softmax_gradient(7)
    before, sent = dy.clone(), []

    def product(rest: torch.Tensor) -> torch.Tensor:
        sent.append(rest.clone())
        return rest @ weight

    found = local.input_gradient(dy, product)
    torch.testing.assert_close(found, before @ weight, rtol=1e-4, atol=1e-4)
    assert torch.equal(dy, before)
    kept = sent[0] == before
    assert (kept.sum(-1) == WORDS - head.K_LOCAL).all()
    assert (sent[0].norm(dim=-1) < 0.2 * before.norm(dim=-1)).all()


def test_the_largest_drown_no_others() -> None:
    """With an error as large as a product of this length has, most of it is gone."""
    local, weight = some_head()
    dy = softmax_gradient(32)
    generator = torch.Generator().manual_seed(2)

    def noisy(rows: torch.Tensor) -> torch.Tensor:
        error = torch.randn(len(rows), WIDTH, generator=generator)
        return rows @ weight + 20 * rows.norm(dim=-1, keepdim=True) * error

    def off(found: torch.Tensor) -> float:
        return float(torch.linalg.norm(found - dy @ weight) / torch.linalg.norm(dy @ weight))

    assert off(noisy(dy)) > 0.1
    assert off(local.input_gradient(dy, noisy)) < off(noisy(dy)) / 15


def test_training_through_a_remote_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are those of the local model with the worker's weights."""
    monkeypatch.setattr(head, "K_LOCAL", 8)
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
        asked.append((matrix, int((np.asarray(x) == 0).sum(-1).min())))
        return rest(matrix, x)

    with skeleton.remote.connected(linear, share):
        loss, found = gradients(model, ids)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert [zeros for matrix, zeros in asked if matrix == 2 * share.group + 1] == [8]


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
