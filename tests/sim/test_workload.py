"""Cost traces: what is traced without numbers is what the real program does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from backends.he.manifest import GroupSpec
from backends.he.params import preset
from backends.he.preparation import prepare
from backends.he.store import nominal_formats
from backends.nn import head as head_module
from backends.nn.adapters import add_lora, trainable
from backends.nn.head import LocalHead
from backends.nn.losses import token_losses
from backends.nn.marks import read_rows
from backends.nn.remote import Remote
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import RandomBase
from protocol.catalogue import MatrixShape
from sim.device import DeviceProfile, Origin, Work
from sim.layers import shortened, trace_deep
from sim.models import MODELS, model_config
from sim.tally import TRANSCENDENTAL, NoNumbersError, Tally
from sim.tracing import LaneTrace, Segment, trace_lane, trace_update
from sim.workload import (
    Linear,
    Local,
    Workload,
    WorkloadError,
    decrypt_work,
    encrypt_work,
    multiply_work,
    trace_step,
)


def based(config: PretrainedConfig) -> RandomBase:
    """Random weights for a config."""
    return RandomBase(config, 0, deviation=0.1)


def tiny_llama(layers: int = 2, tied: bool = True) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def tiny_gpt2(layers: int = 2, dropout: float = 0.1) -> GPT2Config:
    return GPT2Config(
        vocab_size=96, n_embd=48, n_layer=layers, n_head=4, n_positions=64, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip


def tiny_qwen(layers: int = 2, window_from: int | None = None) -> Qwen2Config:
    """A Qwen2, with biases; its layers from `window_from` on look at a short window only."""
    return Qwen2Config(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, use_sliding_window=window_from is not None,
        sliding_window=4, max_window_layers=window_from or 0,
    )  # fmt: skip


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": tiny_llama(),
    "untied": tiny_llama(tied=False),
    "gpt2": tiny_gpt2(),
    "gpt2 without dropout": tiny_gpt2(dropout=0.0),
    "qwen2": tiny_qwen(),
    "qwen2 with windows": tiny_qwen(window_from=1),
}


class CpuRecorder(Remote):
    """Real remote linears whose products are ones; notes what was computed between them."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally
        self.groups: list[GroupSpec] = []
        self.segments: list[Segment] = []

    def compute(self, matrix: int, rows: torch.Tensor) -> torch.Tensor:
        """Ones of the product's shape."""
        assert rows.dtype == torch.float32
        self.segments.append(Segment(self.tally.take(), matrix))
        group = self.groups[matrix // 2]
        self.tally.counting = False
        product = torch.ones(len(rows), group.in_features if matrix % 2 else group.total_out)
        self.tally.counting = True
        return product


def lane(config: PretrainedConfig, remote_head: bool = False) -> LaneTrace:
    """Two sequences of twelve tokens, adapters of rank 4."""
    return trace_lane(config, 2, 12, 4, remote_head, torch.float32)


@pytest.mark.parametrize("remote_head", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_trace_is_the_cost_of_a_real_pass(
    monkeypatch: pytest.MonkeyPatch, name: str, remote_head: bool
) -> None:
    """The same operations, counted while the model computes real numbers on the CPU."""
    monkeypatch.setattr(head_module, "_has_kernels", lambda tensor: False)  # it counts torch's
    tally = Tally()
    remote = CpuRecorder(tally)
    skeleton = build_skeleton(based(CONFIGS[name]), remote_head, remote=remote)
    remote.groups = skeleton.groups
    if remote_head:
        codes = torch.ones(96, 48, dtype=torch.int8)
        head = len(remote.groups) - 1
        remote.head = LocalHead(head, codes, torch.ones(96), torch.ones(48))
    model = add_lora(skeleton.model, 4, 8, seed=1)
    model.train()
    rows = read_rows(torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0)))
    parameters = trainable(model)
    with tally:
        loss = token_losses(model, rows) / (2 * 11)
        torch.autograd.grad(loss, list(parameters.values()))
    real = [*remote.segments, Segment(tally.take(), None)]
    traced = lane(CONFIGS[name], remote_head)
    assert [s.matrix for s in traced.segments] == [s.matrix for s in real]
    assert list(traced.segments) == real
    assert list(traced.groups) == skeleton.groups
    assert traced.parameters == {key: tuple(value.shape) for key, value in parameters.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_lane_asks_for_the_matrices_that_a_session_is_asked_for(name: str) -> None:
    """The order of the requests that leave a connected model, sizes included."""
    workload = trace_step(CONFIGS[name], 24, 12, lora_rank=4)
    skeleton = build_skeleton(based(CONFIGS[name]))
    model = add_lora(skeleton.model, 4, 8, seed=1)
    asked: list[int] = []

    def linear(matrix: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
        shape = workload.matrices[matrix]
        assert x.shape == (workload.tokens, shape.in_features)
        asked.append(matrix)
        return np.ones((len(x), shape.out_features), np.float32)

    tokens = torch.zeros(2, 12, dtype=torch.long)
    with skeleton.remote.connected(linear):
        torch.autograd.grad(token_losses(model, tokens), list(trainable(model).values()))
    assert [item.matrix for item in workload.lane if isinstance(item, Linear)] == asked


def test_matrices_are_those_of_a_prepared_model(tmp_path: Path) -> None:
    """Names, shapes and bytes equal the catalogue that owner and worker agree on."""
    config = tiny_llama(layers=1)
    skeleton = build_skeleton(based(config))
    prepared = prepare(
        tmp_path,
        skeleton.groups,
        skeleton.load_weight,
        preset("conservative"),
        lambda label, done: None,
    )
    workload = trace_step(config, 8, preset="conservative")
    assert workload.matrices == prepared.catalogue().matrices


def test_the_1b_is_what_the_design_counts() -> None:
    """DESIGN section 4: 64 groups, 607k values up per token with the head local."""
    workload = trace_step(MODELS["llama-3.2-1b"](), 256, preset="exact")
    assert len(workload.matrices) == 2 * 64
    values = sum(m.in_features for m in workload.matrices)
    assert values == 16 * ((2048 + 2048 + 2048 + 8192) + (3072 + 2048 + 16_384 + 2048)) == 606_208
    # The first layer's q, k, v have nothing below them to train: no product in backward.
    assert len(workload.linears) == 2 * 64 - 1
    assert workload.up_bytes == 256 * 3 * (606_208 - 3072)
    assert workload.down_bytes == 256 * 2 * (606_208 - 2048)
    remote = trace_step(MODELS["llama-3.2-1b"](), 256, remote_head=True, preset="exact")
    assert len(remote.linears) == 2 * 65 - 2, "a head's backward is the owner's"
    assert remote.up_bytes - workload.up_bytes == 256 * 3 * 2048


def test_bytes_and_digits_follow_the_formats() -> None:
    """Of the thin 1B: at most 2.2 MB a token, some of it in two limbs; its head is precise."""
    model = MODELS["llama-3.2-1b"]()
    workload = trace_step(model, 256, remote_head=True, preset="thin-6bit")
    formats = nominal_formats(workload.groups, preset("thin-6bit"))
    asked = [item.matrix for item in workload.lane if isinstance(item, Linear)]
    up = sum(formats[m].up_bytes(workload.matrices[m].in_features) for m in asked)
    assert workload.up_bytes == 256 * up
    for shape, form in zip(workload.matrices, formats, strict=True):
        kind = "int8_pair" if form.limbs == 2 else "int8"
        products = form.limbs * 256 * shape.in_features * shape.out_features
        assert multiply_work(shape, 256).operations == {kind: products}
    assert {form.limbs for form in formats} == {2, 3}
    assert [group.name for group in workload.groups if group.precise] == [".lm_head"]
    both = workload.up_bytes + workload.down_bytes
    head = sum(m.up_bytes(1) + m.down_bytes(1) for m in workload.matrices[-2:])
    assert both / 256 - head <= 2.2e6


def total(workload: Workload) -> Work:
    """All local work of a pass."""
    locals_ = [item for item in workload.lane if isinstance(item, Local)]
    return sum((part for item in locals_ for part in item.parts), Work(launches=0.0))


def test_multiply_adds_of_the_1b_by_hand() -> None:
    """Head, adapters and attention of a micro-batch of two sequences of 128 tokens."""
    tokens, sequence, rank = 256, 128, 16
    workload = trace_step(MODELS["llama-3.2-1b"](), tokens, sequence, rank)
    head = 2 * tokens * 2048 * 128_256
    sides = [(2048, 2048), (2048, 512), (2048, 512), (2048, 2048)]
    sides += [(2048, 8192), (2048, 8192), (8192, 2048)]
    one_way = sum(tokens * rank * (inputs + outputs) for inputs, outputs in sides)
    # Backward: by weights and by inputs; but the first layer's q, k, v inputs need no gradient.
    adapters = 16 * 3 * one_way - 3 * tokens * rank * 2048
    attention = 16 * (2 + 5) * tokens * sequence * 2048
    products = head + adapters + attention
    silu = 2 * 16 * tokens * 8192
    softmax = 2 * tokens * 128_256  # about: the last token of each sequence predicts nothing
    functions = TRANSCENDENTAL * (silu + softmax)
    counted = total(workload).operations["float"]
    assert counted == pytest.approx(products + functions, rel=1e-3)
    assert counted > products


def test_the_five_models_are_the_published_ones() -> None:
    """Weights that a worker holds, and remote linears of a pass, against the model cards."""
    remote_weights = {
        "llama-3.2-1b": 16 * 2048 * (2048 + 2 * 512 + 2048 + 3 * 8192),
        "llama-3.2-3b": 28 * 3072 * (3072 + 2 * 1024 + 3072 + 3 * 8192),
        "llama-3.1-8b": 32 * 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14_336),
        "llama-3.1-70b": 80 * 8192 * (8192 + 2 * 1024 + 8192 + 3 * 28_672),
        "gpt2": 12 * 768 * 12 * 768,
    }
    assert list(MODELS) == list(remote_weights)
    for name, weights in remote_weights.items():
        workload = trace_step(model_config(name), 64, name=name)
        forward = workload.matrices[::2]
        assert sum(m.in_features * m.out_features for m in forward) == weights
        assert workload.name == name
    assert workload.matrices[-1].name == "transformer.h.11.mlp.c_proj backward"
    with pytest.raises(ValueError, match=r"no model 'llama'; choose one of llama-3\.2-1b"):
        model_config("llama")


@pytest.mark.parametrize("remote_head", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_qwen])
def test_a_few_layers_tell_of_all(
    make: Callable[[int], PretrainedConfig], remote_head: bool
) -> None:
    """The trace made longer is, to the last count, the trace of all layers."""
    config = make(11)
    traced: list[int] = []

    def trace(some: PretrainedConfig) -> LaneTrace:
        traced.append(some.num_hidden_layers)
        return lane(some, remote_head)

    assert trace_deep(config, trace) == lane(config, remote_head)
    assert traced == [4]


def test_layers_that_differ_are_all_traced() -> None:
    """By what the config says of them, or by what they are made of; and short models."""
    windows = tiny_qwen(7, window_from=5)
    mixed = Qwen3MoeConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, moe_intermediate_size=16,
        num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=4, num_experts=2,
        num_experts_per_tok=1, mlp_only_layers=[5],
    )  # fmt: skip
    for config in (windows, mixed, tiny_llama(4)):
        assert shortened(config) is None
    traced: list[int] = []

    def trace(some: PretrainedConfig) -> LaneTrace:
        traced.append(some.num_hidden_layers)
        return lane(some)

    assert trace_deep(windows, trace) == lane(windows)
    assert traced == [7]


def test_a_trace_whose_middle_layers_differ_is_not_stretched() -> None:
    """The last guard: whatever the modules look like, the traces must agree."""
    config = tiny_llama(6)
    traced: list[int] = []

    def trace(some: PretrainedConfig) -> LaneTrace:
        traced.append(some.num_hidden_layers)
        found = lane(some)
        segments = list(found.segments)
        segments[6] = Segment((Work(),), segments[6].matrix)
        return LaneTrace(found.groups, tuple(segments), found.parameters)

    trace_deep(config, trace)
    assert traced == [4, 6]


def test_the_update_is_what_the_optimiser_does() -> None:
    """Clipping and AdamW counted while they run on real parameters."""
    shapes = [(4, 48), (32, 4), (4, 48), (4, 80)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    tally = Tally()
    for _ in range(2):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with tally:
            for gradient in gradients:
                gradient.add_(gradient)
            added = tally.take()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            updated = tally.take()
    accumulate, update = trace_update(shapes, torch.float32)
    assert (accumulate,) == added
    assert accumulate.bytes_moved == 3 * 4 * sum(a * b for a, b in shapes)
    assert (update,) == updated


def test_what_an_operation_costs() -> None:
    """Multiply-adds, bytes and launches of single operations, by hand."""
    a, b = torch.empty(8, 32, device="meta"), torch.empty(32, 16, device="meta")
    row = torch.empty(16, device="meta")
    table, ids = torch.empty(1000, 32, device="meta"), torch.zeros(8, dtype=torch.int64)
    with Tally() as tally:
        c = a @ b
        assert tally.take() == (Work({"float": 8 * 32 * 16}, 4 * (256 + 512 + 128)),)
        c.view(16, 8).t()[2:].unsqueeze(0).expand(3, -1, -1).detach()
        torch.empty_like(c)
        assert tally.take() == ()
        c + row.expand(8, 16)
        assert tally.take() == (Work({}, 4 * (128 + 16 + 128)),)
        c.add_(1.0)
        c.mul_(2.0)
        assert tally.take() == (Work({}, 2 * 4 * (128 + 128), 2),)
        torch.tanh(c)
        assert tally.take() == (Work({"float": TRANSCENDENTAL * 128}, 4 * (128 + 128)),)
        nn.functional.embedding(ids.to("meta"), table)
        # A copy of the ids to the meta device; then 8 rows of the table, not a thousand.
        assert sum(tally.take(), Work(launches=0.0)).bytes_moved == 2 * 64 + 64 + 2 * 4 * 8 * 32


def roofline(products: float, size_bytes: float, ridge: float) -> float:
    """Seconds on a device that moves a byte in a second and does `ridge` products meanwhile."""
    return max(products / ridge, size_bytes)


@given(
    st.lists(st.tuples(*[st.integers(1, 300)] * 3), min_size=1, max_size=12),
    st.floats(0.05, 50.0),
)
def test_octaves_keep_the_sum_of_rooflines(
    shapes: list[tuple[int, int, int]], ridge: float
) -> None:
    """The parts' times add up to the operations' own, to within the stated 17 %."""
    exact = 0.0
    with Tally() as tally:
        for m, k, n in shapes:
            torch.empty(m, k, device="meta") @ torch.empty(k, n, device="meta")
            exact += roofline(m * k * n, 4 * (m * k + k * n + m * n), ridge)
        parts = tally.take()
    found = sum(roofline(p.operations["float"], p.bytes_moved, ridge) for p in parts)
    assert exact / 1.172 <= found <= exact * (1 + 1e-9)


def test_programs_that_ask_for_data_are_refused() -> None:
    """A number that follows from shapes is given; one that data decides is not guessed."""
    with Tally(), torch.device("meta"):
        steps = torch.arange(6).view(2, 3)
        assert int(steps[1].max()) == 5
        assert bool((steps[:, -1] == 2).any())
        unknown = torch.empty(3, dtype=torch.long)
        with pytest.raises(NoNumbersError, match="cannot be traced"):
            bool((unknown == 0).all())
        known = torch.zeros(3, dtype=torch.long)
        known[0] = 7
        assert int(known.sum()) == 7
        known[1:].copy_(unknown[1:])  # a view, and through it the whole, is known no more
        with pytest.raises(NoNumbersError):
            int(known.sum())


def test_tracing_leaves_no_mark() -> None:
    """The config is as it was, and so are the random numbers that come next."""
    config = tiny_llama(layers=6)
    before = config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    workload = trace_step(config, 6)
    assert torch.equal(torch.rand(3), expected)
    assert config.to_dict() == before
    assert trace_step(config, 6) == workload


def test_cipher_work_by_hand() -> None:
    """Counts of one linear of 100 inputs, 40 outputs and 300 tokens (two blocks)."""
    parameters = preset("exact")
    shape = MatrixShape("x forward", 100, 40, 300, 80)
    sealing = encrypt_work(shape, 300, parameters)
    assert sealing.operations == {"ring_row": 2 * 112, "value": 1.2 * 300 * 100}
    assert sealing.bytes_moved == 100 * 5 * 1024 + 300 * 100 * (4 + 4 + 4 + 5 + 5 + 3)
    opening = decrypt_work(shape, 300, parameters)
    assert opening.operations["ring_row"] == 2 * 48
    assert opening.operations["value"] == pytest.approx((0.35 + 0.2) * 300 * 40)
    assert opening.bytes_moved == 40 * 5 * 1024 + 300 * 40 * (2 + 4 + 4 + 4)
    product = multiply_work(shape, 300)
    assert product.operations == {"int8": 3 * 300 * 100 * 40}
    assert product.bytes_moved == 100 * 40 + 300 * (100 * 3 + 40 * 2)
    wider = encrypt_work(shape, 256, preset("paranoid"))
    assert wider.operations["ring_row"] == pytest.approx(112 * (0.16 + 8 * 0.024) / 0.28)


def test_a_local_on_a_device_takes_the_time_of_its_parts() -> None:
    """One work in place of several, for queues that take one."""
    origin = Origin("datasheet", "test", "2026-01-01")
    profile = DeviceProfile("d", origin, 4.0, {"float": 1e9}, 1e9, {"local": 1e-5})
    local = Local("x", (Work({"float": 4e6}, 1e6, 3), Work({}, 2e6, 2)))
    assert profile.seconds(local.on(profile), "local") == pytest.approx(4e-3 + 2e-3 + 5e-5)


def test_labels_say_where_a_lane_is() -> None:
    """A local item between any two linears, named by what comes after it."""
    items = trace_step(tiny_llama(layers=1), 8).lane
    assert [type(item) for item in items[:-1]] == [Local, Linear] * (len(items) // 2)
    labels = [item.label for item in items if isinstance(item, Local)]
    assert labels[0] == "before model.layers.0.self_attn.q_proj+k_proj+v_proj forward"
    assert labels[4] == "loss"
    assert labels[-1] == "last gradients"


def test_errors_say_what_to_do() -> None:
    """Sizes that do not fit, and an unknown preset, before anything is traced."""
    with pytest.raises(WorkloadError, match=r"100 tokens in sequences of 64 .* multiple"):
        trace_step(tiny_llama(), 100, 64)
    with pytest.raises(WorkloadError, match="65 tokens is longer than the 64 that gpt2 takes"):
        trace_step(tiny_gpt2(), 65)
    with pytest.raises(WorkloadError, match="at least 2"):
        trace_step(tiny_gpt2(), 4, 1)
    with pytest.raises(ValueError, match="no preset 'weak'"):
        trace_step(tiny_gpt2(), 8, preset="weak")
