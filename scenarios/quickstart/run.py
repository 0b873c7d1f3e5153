"""The private and the clear fine-tuning of the quickstart, and their report."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from backends.defaults import SCHEMES
from backends.files import remove_directory
from backends.hardware import CPU
from backends.he.matmul.choice import chosen_kernel
from backends.he.params import preset
from backends.nn.adapters import add_lora, base_name, save_adapter
from backends.nn.base import open_base
from backends.nn.corpus import pack
from backends.nn.documents import pieces
from backends.nn.generate import complete
from backends.nn.local import localise
from backends.nn.sane import require_rank
from backends.nn.skeleton import build_skeleton
from backends.nn.texts import find_texts
from backends.nn.tokenizer import HubTokenizer
from backends.nn.trainer import TrainConfig, Trainer, evaluate
from backends.session import require_scheme
from backends.units import human_bytes
from scenarios import report
from scenarios.estimate import Shape
from scenarios.options import TINY_LLAMA
from scenarios.page import Content, Watch, content_of, write_page
from scenarios.page.watch import STEPS as WATCHED_STEPS
from scenarios.preparation import prepared_for
from scenarios.session import (
    Live,
    chosen_workers,
    exactness_figures,
    exactness_line,
    gradient_norm_figures,
    open_ledger,
    private_session,
    require_room_for_run,
    stopped_untainted,
    train_with_bar,
    usage_figures,
)

SEQUENCE = 256
PRIVATE_PACKAGE = "networkx.algorithms"
PROMPT = "    Examples\n    --------\n    >>> G = nx."
COMPLETION_TOKENS = 40


@dataclass
class Private:
    """The owner's text as int64[n, 256]: to train on, and held out (other files)."""

    train: torch.Tensor
    held_out: torch.Tensor
    files: int


def private_text(tokenizer: Any, held_out: int) -> Private:
    """The source files of PRIVATE_PACKAGE, split by file with a hash of its name."""
    spec = importlib.util.find_spec(PRIVATE_PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    parts: dict[bool, list[Path]] = {True: [], False: []}
    files = sorted(f for f in root.rglob("*.py") if "tests" not in f.parts and f.stat().st_size)
    for file in files:
        name = file.relative_to(root).as_posix()
        bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
        parts[bucket < 15].append(file)

    marking = HubTokenizer(tokenizer)

    def packed(files: list[Path], seed: int) -> torch.Tensor:
        sequences = pack(pieces(find_texts(files), marking.chat), marking, SEQUENCE)
        generator = torch.Generator().manual_seed(seed)
        return sequences[torch.randperm(len(sequences), generator=generator)]

    return Private(packed(parts[False], 0), packed(parts[True], 1)[:held_out], len(files))


def completion(model: torch.nn.Module, tokenizer: Any) -> str:
    """Greedy completion of PROMPT."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return str(tokenizer.decode(complete(model, ids, COMPLETION_TOKENS, tokenizer.eos_token_id)))


class Quickstart:
    """One run: what both sides need, then the private and the clear fine-tuning."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.out
        self.workers = chosen_workers(args)
        require_scheme(args.scheme, CPU, self.workers)
        self.ledger = open_ledger(self.out, self.out / "checkpoints-private", self.workers)
        self.base = open_base(TINY_LLAMA)
        self.tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
        self.text = private_text(self.tokenizer, args.held_out)
        self.training = TrainConfig(
            steps=args.steps, batch=4, micro_batch=4 // args.lanes,
            learning_rate=args.learning_rate, warmup_steps=max(1, args.steps // 10),
            seed=args.seed,
        )  # fmt: skip
        self.figures: dict[str, Any] = {
            "steps": args.steps,
            "lanes": args.lanes,
            "scheme": args.scheme,
            "kernel": chosen_kernel().name,
            "worker_elsewhere": bool(self.workers.addresses),
        }

    def _lora(self, model: torch.nn.Module) -> PeftModel:
        rank = self.args.rank
        return add_lora(
            model, rank, 2 * rank, self.args.seed, base_model=base_name(str(TINY_LLAMA))
        )

    def _trainer(self, model: PeftModel, name: str, **more: Any) -> Trainer:
        identity = {"rank": self.args.rank, "base": self.base.identity(), "role": name}
        if name == "private":
            identity["scheme"] = self.args.scheme
        return Trainer(
            model, self.text.train, self.training, identity=identity,
            checkpoints=self.out / f"checkpoints-{name}", **more,
        )  # fmt: skip

    def _complete(self, model: torch.nn.Module, when: str) -> None:
        """A sample of text; none where a single token takes a worker as long as a whole block."""
        if self.args.scheme == SCHEMES[0]:
            self.figures[f"completion_{when}"] = completion(model, self.tokenizer)

    def _evaluate(self, model: torch.nn.Module) -> float:
        return evaluate(model, self.text.held_out, 4, self.args.held_out)

    def private(self) -> list[float]:
        """Fine-tune through the worker on ciphertexts; saves the adapter."""
        skeleton = build_skeleton(self.base)
        require_rank(skeleton.groups, self.args.rank)
        checkpoints = self.out / "checkpoints-private"
        require_room_for_run(skeleton, self.args.rank, self.out, checkpoints)
        parameters = preset(self.args.preset)
        self.prepared, self.figures["prepare_s"] = prepared_for(
            skeleton, parameters, self.args.cache,
            owner_tag=self.args.owner_tag,
        )  # fmt: skip
        model = self._lora(skeleton.model)
        trainer = self._trainer(
            model, "private", lanes=self.args.lanes, forget_lane=skeleton.remote.forget_lane,
            ledger=self.ledger,
        )  # fmt: skip
        most_steps = math.inf if self.args.trace else WATCHED_STEPS
        self.watch = Watch([g.name for g in self.prepared.groups], most_steps)
        session_of = private_session(
            skeleton,
            self.prepared,
            self.args.lanes,
            self.watch,
            ledger=self.ledger,
            workers=self.workers,
            scheme=self.args.scheme,
        )
        with stopped_untainted(trainer), session_of as session:
            before, done_before = session.usage(), trainer.progress.step
            shape = Shape(
                self.base.config, self.training.micro_batch * SEQUENCE, SEQUENCE, self.args.lanes,
                self.args.rank, self.args.preset,
            )  # fmt: skip
            self.figures |= session.say_estimate(shape, self.training.steps - done_before)
            live = Live(session, self.training.batch * SEQUENCE, self.args.lanes)
            losses = train_with_bar(trainer, "private (encrypted)", trace=self.watch, live=live)
            self.figures["gradient_norms"] = trainer.progress.gradient_norms
            self.figures |= exactness_figures(session)
            used, steps = session.usage().since(before), len(losses) - done_before
            self._count(trainer, used, steps)
            self.figures["private_loss"] = self._evaluate(model)
            self._complete(model, "after")
        trainer.require_untainted()
        self.figures["workers_caught"] = len(self.ledger.retired)
        adapter = self.out / "adapter"
        save_adapter(model, adapter, base_name(str(TINY_LLAMA)))
        self.figures["adapter_dir"] = str(adapter)
        return losses

    def write_trace(self) -> None:
        """After all else: where it cannot be written, nothing else is lost."""
        if self.args.trace:
            self.watch.write(self.args.trace, f"quickstart, real, {self.args.lanes} lane(s)")

    def _count(self, trainer: Trainer, used: Any, steps: int) -> None:
        tokens = steps * self.training.batch * SEQUENCE
        seconds = sum(trainer.step_seconds)
        self.figures |= usage_figures(used, seconds, tokens, self.args.lanes) | {
            "tokens": self.training.steps * self.training.batch * SEQUENCE,
            "steps_this_run": steps,
        }

    def clear(self) -> list[float]:
        """The same fine-tuning in plain torch, on the same int8 base weights."""
        skeleton = build_skeleton(self.base)
        localise(skeleton, self.prepared)
        self.figures["base_loss"] = self._evaluate(skeleton.model)
        self._complete(skeleton.model, "before")
        model = self._lora(skeleton.model)
        trainer = self._trainer(model, "clear")
        losses = train_with_bar(trainer, "clear (to compare)")
        self.figures |= gradient_norm_figures(
            self.figures["gradient_norms"], trainer.progress.gradient_norms
        )
        self.figures["clear_s"] = sum(trainer.step_seconds)
        self.figures["clear_loss"] = self._evaluate(model)
        return losses

    def run(self) -> dict[str, Any]:
        """Everything; returns the figures."""
        if self.args.fresh:
            self._drop_checkpoints()
        start = time.perf_counter()
        print(
            f"owner: {self.text.files} files of {PRIVATE_PACKAGE!r}, "
            f"{self.text.train.numel():,} tokens to train on, "
            f"{self.text.held_out.numel():,} held out"
        )
        private = self.private()
        clear = self.clear()
        self.figures["losses"], self.figures["clear_losses"] = private, clear
        self.figures["total_s"] = time.perf_counter() - start
        self.figures["plot"] = str(self.out / "losses.png")
        own = self.args.scheme == SCHEMES[0]
        if own:  # the page speaks of its parameters
            self.figures["page"] = str(self.out / "report.html")
        text = summary(self.figures)
        print(text)  # before what a full disk may refuse
        report.write_text(self.out / "report.md", text)
        if own:
            write_page(self.out / "report.html", self._page())
        report.plot_losses(Path(self.figures["plot"]), private, clear, self.figures)
        # The run is complete: the next one is a new run, not a resumed one.
        self._drop_checkpoints()
        return self.figures

    def _page(self) -> Content:
        f = self.figures
        after, before = f["completion_after"], f["completion_before"]
        samples = [{"prompt": PROMPT, "base": before, "tuned": after}]
        return content_of(
            f"Private fine-tuning of {TINY_LLAMA.name} on {PRIVATE_PACKAGE}",
            f | {"samples": samples}, preset(self.args.preset), self.watch,
        )  # fmt: skip

    def _drop_checkpoints(self) -> None:
        for name in ("private", "clear"):
            remove_directory(self.out / f"checkpoints-{name}")


def summary(f: dict[str, Any]) -> str:
    """The report a person reads."""
    gap = f["private_loss"] / f["clear_loss"] - 1
    fall = 1 - f["private_loss"] / f["base_loss"]
    if f["worker_elsewhere"]:
        elsewhere = f"| waiting for the line and the worker | {f['wire_s']:.1f} |"
    else:
        elsewhere = (
            "| wire (hand-over between threads; the bytes stay in memory) "
            f"| {f['wire_s']:.1f} |\n| worker: products on ciphertexts | {f['worker_s']:.1f} |"
        )
    sample = page = ""
    if "page" in f:
        page = f"\nAll of it as one page: {f['page']} (open it in a browser; it holds private text)"
    if "completion_after" in f:
        sample = f"""A completion of {PROMPT!r}:

before: {f["completion_before"]!r}
after:  {f["completion_after"]!r}
"""
    return f"""
# Private fine-tuning report

| held-out loss (nats per token) | |
| --- | --- |
| base model | {f["base_loss"]:.4f} |
| LoRA fine-tuned in clear | {f["clear_loss"]:.4f} |
| **LoRA fine-tuned privately** | **{f["private_loss"]:.4f}** ({fall:.1%} below base, \
{gap:+.2%} against clear) |

The gradient's norm was {f["gradient_norm_ratio"]:.3f} of that in clear, in the mean over all steps.

| time of the {f["steps_this_run"]} private steps of this run | s |
| --- | --- |
| in all (in clear: {f["clear_s"]:.1f}) | {f["private_s"]:.1f} |
| owner: model (embeddings, attention, adapters, optimiser) | {f["owner_model_s"]:.1f} |
| owner: encrypt and decrypt | {f["owner_cipher_s"]:.1f} |
{elsewhere}

Traffic per trained token: {human_bytes(f["bytes_per_token_up"])} up, \
{human_bytes(f["bytes_per_token_down"])} down. Encrypted blocks, each under its own secret: \
{f["blocks_encrypted"]:,}.

Against the same int8 weights {exactness_line(f["products"])}.

{sample}
Adapter: {f["adapter_dir"]} (load it with `peft.PeftModel.from_pretrained`)
Loss curves: {f["plot"]}{page}
"""
