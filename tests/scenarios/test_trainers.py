"""`transformers.Trainer`, TRL's `SFTTrainer` and a plain loop, unchanged, on a private model."""

from __future__ import annotations

import copy
import re
import runpy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    OPTConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import private_lora as pl
from tests.nn.conftest import LLAMA, tokens

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "scenarios" / "assets" / "tiny-llama"
NOISE = 2e-3
"""Relative, between losses in clear and under `thin`, of these models after a few steps."""


def theirs(vocabulary: int = 96) -> PreTrainedModel:
    """A model that a user holds."""
    torch.manual_seed(0)
    config = copy.deepcopy(LLAMA)
    config.vocab_size = vocabulary
    return AutoModelForCausalLM.from_config(config)


def adapted(model: PreTrainedModel, **more: Any) -> PeftModel:
    """With adapters as peft makes them."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": "all-linear"} | more)))


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> pl.Public:
    """Prepared once, under `thin`."""
    return pl.prepare(theirs(), cache=tmp_path_factory.mktemp("cache"))


def examples(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """A dataset as a Trainer takes it."""
    return [{"input_ids": ids, "labels": ids} for ids in tokens(count, 12, seed)]


def arguments(place: Path, **more: Any) -> dict[str, Any]:
    """What every trainer here is told."""
    return {
        "output_dir": str(place), "max_steps": 6, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "logging_strategy": "steps", "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 0,
    } | more  # fmt: skip


class StopAt(TrainerCallback):
    """As somebody who presses Ctrl-C after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


@contextmanager
def seen_by(model: PeftModel) -> Iterator[list[list[int]]]:
    """Tokens of every pass of the model, in order."""
    seen: list[list[int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].flatten().tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def losses(trainer: Trainer, key: str = "loss") -> list[float]:
    """Of every step that a trainer logged."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def run(model: PeftModel, place: Path, resume: bool | None = None, **more: Any) -> Trainer:
    """What a script of theirs does."""
    callbacks = more.pop("callbacks", [])
    trainer = Trainer(
        model=model, args=TrainingArguments(**arguments(place, **more)), callbacks=callbacks,
        train_dataset=examples(8), eval_dataset=examples(4, seed=1),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_accumulation_evaluation_and_schedule(public: pl.Public, tmp_path: Path) -> None:
    """Steps, rates and held-out losses are those of the same script in clear."""
    more = {
        "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3,
        "lr_scheduler_type": "cosine", "warmup_steps": 2,
    }  # fmt: skip
    clear = run(adapted(theirs()), tmp_path / "clear", **more)
    model = adapted(pl.remote(theirs(), public))
    with pl.connect(model):
        private = run(model, tmp_path / "private", **more)
    assert losses(private, "learning_rate") == losses(clear, "learning_rate")
    assert len(losses(private, "eval_loss")) == 2
    for key in ("loss", "eval_loss"):
        assert losses(private, key) == pytest.approx(losses(clear, key), rel=NOISE)


def test_resuming_takes_up_steps_and_data_where_they_were(
    public: pl.Public, tmp_path: Path
) -> None:
    """Stopped after 3 of 6 steps by a callback, and gone on with in another model and session."""
    with seen_by(whole := adapted(theirs())) as wanted:
        clear = run(whole, tmp_path / "clear")
    found: list[list[int]] = []
    saving = {"save_strategy": "steps", "save_steps": 3}
    for resume, callbacks in ((None, [StopAt(3)]), (True, [])):
        model = adapted(pl.remote(theirs(), public))
        with pl.connect(model), seen_by(model) as seen:
            trainer = run(model, tmp_path / "private", resume, callbacks=callbacks, **saving)
        found += seen
    assert found == wanted
    assert trainer.state.global_step == 6
    assert losses(trainer) == pytest.approx(losses(clear), rel=NOISE)
    assert losses(trainer, "learning_rate") == losses(clear, "learning_rate")


def test_early_stopping(public: pl.Public, tmp_path: Path) -> None:
    """Where the held-out loss gets no better, the best adapter is loaded again."""
    model = adapted(pl.remote(theirs(), public))
    with pl.connect(model):
        trainer = run(
            model, tmp_path, callbacks=[EarlyStoppingCallback(1, early_stopping_threshold=9.0)],
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            load_best_model_at_end=True, metric_for_best_model="eval_loss",
        )  # fmt: skip
    assert trainer.state.global_step == 2


def test_half_precision_of_the_owners_side(public: pl.Public, tmp_path: Path) -> None:
    """bf16 autocast of what the owner computes; what workers compute is as exact as before."""
    clear = run(adapted(theirs()), tmp_path / "clear", bf16=True)
    model = adapted(pl.remote(theirs(), public))
    with pl.connect(model):
        private = run(model, tmp_path / "private", bf16=True)
    assert losses(private) == pytest.approx(losses(clear), rel=NOISE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sends_forward_products_twice(
    public: pl.Public, tmp_path: Path, reentrant: bool
) -> None:
    """Losses stay; of two layers of 4 groups, 4 + 4 more go up, and the lowest layer's gradient."""
    sent, found = [], []
    how = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for more in ({}, {"gradient_checkpointing": True, **how}):
        model = adapted(pl.remote(theirs(), public))
        with pl.connect(model) as session:
            before = session.usage()
            found.append(losses(run(model, tmp_path, max_steps=2, **more)))
            sent.append(session.usage().since(before).blocks / 2)
    assert sent == [8 + 7, 8 + 8 + 8]
    assert found[1] == pytest.approx(found[0], rel=NOISE)


def test_recomputing_brings_no_dropout_back(tmp_path: Path) -> None:
    """OPT's layers have some of their own, which a layer that trains would use."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=96, hidden_size=48, ffn_dim=80, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=48, dropout=0.9,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    prepared = pl.prepare(model, cache=tmp_path)
    model = adapted(pl.remote(model, prepared))
    ids, said = tokens(2, 12), []
    with pl.connect(model):
        model.train()
        for enable in (False, True):
            if enable:
                model.gradient_checkpointing_enable()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            said.append(loss.item())
    assert said[1] == pytest.approx(said[0], rel=NOISE)


@pytest.mark.parametrize(
    "more",
    [
        {"use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"layers_to_transform": [1], "target_modules": ["v_proj", "up_proj"]},
    ],
    ids=["rslora", "subset", "layers"],
)
def test_adapters(public: pl.Public, more: dict[str, Any]) -> None:
    """A plain loop, with whatever of LoRA a script chooses."""
    found = []
    for private in (False, True):
        model = adapted(pl.remote(theirs(), public) if private else theirs(), **more)
        with pl.connect(model) if private else nullcontext():
            found.append(plain_loop(model))
    assert found[1] == pytest.approx(found[0], rel=NOISE)
    assert found[1][-1] < found[1][0]


def plain_loop(model: PeftModel) -> list[float]:
    """The losses of three steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, said = tokens(4, 12), []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        said.append(loss.item())
    return said


@pytest.mark.parametrize(
    "more", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    ids=["dora", "pissa", "olora"],
)  # fmt: skip
def test_adapters_that_need_the_weights_are_refused(
    public: pl.Public, more: dict[str, Any]
) -> None:
    """When they are made: before anything is sent."""
    with pytest.raises(pl.Error, match="with the workers: DoRA needs"):
        adapted(pl.remote(theirs(), public), **more)


def test_a_remote_model_s_state_is_saved(public: pl.Public, tmp_path: Path) -> None:
    """By torch, as a loop of one's own does; weights that are not here are saved as empty."""
    state = adapted(pl.remote(theirs(), public)).state_dict()
    torch.save(state, tmp_path / "state")
    found = torch.load(tmp_path / "state", weights_only=True)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)


def test_merging_is_refused(public: pl.Public) -> None:
    """It wants all of the weights."""
    model = adapted(pl.remote(theirs(), public))
    with pytest.raises(pl.Error, match="merge the saved adapter"):
        model.merge_and_unload()


def test_trl_resumes(tmp_path: Path) -> None:
    """SFTTrainer with its own defaults, checkpointing and bf16 among them; loss on completions."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows = [{"prompt": f"The square of {i} is", "completion": f" {i * i}."} for i in range(16)]

    def sft(model: PeftModel, place: Path, resume: bool | None, **more: Any) -> Trainer:
        callbacks = more.pop("callbacks", [])
        trainer = trl.SFTTrainer(
            model=model, args=trl.SFTConfig(**arguments(place, dataset_num_proc=None, **more)),
            processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows),
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    public = pl.prepare(theirs(len(tokenizer)), cache=tmp_path / "cache")
    with seen_by(whole := adapted(theirs(len(tokenizer)))) as wanted:
        clear = sft(whole, tmp_path / "clear", None)
    found: list[list[int]] = []
    for resume, callbacks in ((None, [StopAt(3)]), (True, [])):
        model = adapted(pl.remote(theirs(len(tokenizer)), public))
        with pl.connect(model), seen_by(model) as seen:
            trainer = sft(
                model, tmp_path / "private", resume, callbacks=callbacks,
                save_strategy="steps", save_steps=3,
            )  # fmt: skip
        found += seen
    assert found == wanted
    assert trainer.state.global_step == 6
    assert losses(trainer) == pytest.approx(losses(clear), rel=NOISE)


def test_the_diff_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most five lines change; both scripts run as they stand, and learn the same."""
    page = (ROOT / "README.md").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    lines = diff.splitlines()
    added = [line for line in lines if line.startswith("+")]
    assert 0 < len(added) <= 5
    assert sum(line.startswith("-") for line in lines) <= len(added)
    name = re.findall(r'^ name = "(.*)"', diff, re.MULTILINE)[0]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    theirs(len(tokenizer)).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    texts = [f"The square of {i} is {i * i}, and its cube {i**3}." for i in range(16)]
    (tmp_path / "notes.txt").write_text("\n\n".join(texts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = []
    for mark in "-+":
        script = tmp_path / "script.py"
        script.write_text("".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", mark, "")))
        torch.manual_seed(0)
        found.append(runpy.run_path(str(script))["trainer"])
        model = AutoModelForCausalLM.from_pretrained(name)
        assert PeftModel.from_pretrained(model, "adapter").peft_config
    plain, private = (trainer.state.log_history[-1]["train_loss"] for trainer in found)
    lengths = {len(example["input_ids"]) for trainer in found for example in trainer.train_dataset}
    assert lengths == {512}, "a worker sees them"
    assert private == pytest.approx(plain, rel=NOISE)
