"""A real run of `python -m scenarios.llama1b`, and of its twin in clear."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from peft import PeftModel

from backends.files import remove_directory
from backends.hardware import Hardware, check_memory, chosen
from backends.he.matmul.choice import chosen_kernel
from backends.he.params import preset
from backends.he.store import PreparedModel
from backends.ledger import WorkerLedger
from backends.nn.adapters import add_lora, base_name, save_adapter
from backends.nn.checkpoint import require_same_run
from backends.nn.corpus import Corpus
from backends.nn.local import localise
from backends.nn.sane import require_positions, require_rank
from backends.nn.selfcheck import keeps_apart, require_trainable
from backends.nn.skeleton import Skeleton
from backends.nn.sources import Base
from backends.nn.texts import DataError
from backends.nn.trainer import TrainConfig, Trainer
from backends.session import Usage
from backends.units import human_bytes
from scenarios import record
from scenarios.clear_peer import DTYPES, ClearPeer, ClearStep, clear_times_ms
from scenarios.costs import costs, largest_line
from scenarios.dp import (
    dp_figures,
    dp_line,
    dp_of,
    dp_plan,
    require_dp,
)
from scenarios.estimate import Shape, head_share
from scenarios.preparation import (
    chosen_base,
    chosen_skeleton,
    prepared_for,
    settle_head,
)
from scenarios.real_trace import RealTrace
from scenarios.session import (
    Live,
    PrivateSession,
    chosen_workers,
    exactness_figures,
    exactness_line,
    gradient_norm_figures,
    open_ledger,
    private_session,
    require_room_for_run,
    stopped_untainted,
    train_with_bar,
)
from scenarios.texts import Data, load_texts, text_figures, text_line, to_do


@dataclass
class Setup:
    """The run's place, model, data and training, before any role is taken."""

    hardware: Hardware
    base: Base
    skeleton: Skeleton
    data: Data
    training: TrainConfig
    base_name: str


def set_up(args: argparse.Namespace) -> Setup:
    """Config, weights' source, owner's skeleton, data and training configuration."""
    if args.tokens % args.sequence:
        raise DataError(f"--tokens {args.tokens} must be a multiple of --sequence {args.sequence}")
    privacy = dp_of(args)
    hardware = chosen(args.real_gpu, args.host_frames)
    if args.clear_peer:
        hardware = replace(hardware, dtype=DTYPES[args.clear_peer])
    base = chosen_base(args)
    settle_head(args, shape_of(args, base), base, hardware, not args.worker)
    skeleton = chosen_skeleton(args, base, hardware.dtype)
    require_rank(skeleton.groups, args.rank)
    warning = require_positions(skeleton.model, args.sequence)
    if warning is not None:
        print(warning)
    apart = keeps_apart(skeleton.model, skeleton.remote, skeleton.groups)
    micro_batch = args.tokens // args.sequence
    training = TrainConfig(
        steps=args.steps,
        batch=micro_batch * args.lanes,
        micro_batch=micro_batch,
        learning_rate=args.learning_rate,
        seed=args.seed,
        privacy=privacy,
    )

    def fits(corpus: Corpus) -> None:
        require_dp(training, len(corpus))
        if not (args.fresh or args.compare_clear):
            known = training.settings(len(corpus)) | run_settings(args, base)
            require_same_run(args.out / "checkpoints", known, corpus)

    data = load_texts(args, base, apart, 0.0, fits)
    print(to_do(training.steps, training.batch, args.sequence, len(data.train)))
    name = f"random-{args.seed}" if args.weights is None else base_name(args.weights)
    return Setup(hardware, base, skeleton, data, training, name)


def run_settings(args: argparse.Namespace, base: Base) -> dict[str, Any]:
    """What two runs must agree on, beside their training, to be one."""
    return {"rank": args.rank, "base": base.identity()}


def shape_of(args: argparse.Namespace, base: Base) -> Shape:
    """What decides a step's cost."""
    return Shape(
        base.config, args.tokens, args.sequence, args.lanes, args.rank, args.preset,
        args.lm_head == "remote",
    )  # fmt: skip


def make_trainer(
    args: argparse.Namespace, setup: Setup, prepared: PreparedModel, model: PeftModel,
    private: bool, ledger: WorkerLedger | None = None,
) -> Trainer:  # fmt: skip
    """The trainer of a model with adapters, once it is where it computes.

    A private one keeps checkpoints, one in clear none.
    """
    model.to(setup.hardware.device)
    return Trainer(
        model,
        setup.data.train,
        setup.training,
        lanes=args.lanes if private else 1,
        forget_lane=setup.skeleton.remote.forget_lane,
        # A comparison starts from the first step, and touches no checkpoint of a real run.
        checkpoints=args.out / "checkpoints" if private and not args.compare_clear else None,
        checkpoint_every=args.checkpoint_every,
        # the model's digest is of what goes to workers alone
        identity=run_settings(args, setup.base) | {"model": prepared.model_digest.hex()},
        ledger=ledger,
    )


def adapted(args: argparse.Namespace, setup: Setup) -> PeftModel:
    """The owner's model with fresh adapters."""
    return add_lora(
        setup.skeleton.model, args.rank, 2 * args.rank, args.seed, base_model=setup.base_name,
        linears=setup.skeleton.adapted,
    )  # fmt: skip


def clear_peer(args: argparse.Namespace) -> None:
    """The other end of `ClearPeer`: trains in clear, one step per line of standard input."""
    setup = set_up(args)
    prepared, _ = prepared_for(
        setup.skeleton, preset(args.preset), args.cache, setup.hardware, args.owner_tag,
    )  # fmt: skip
    localise(setup.skeleton, prepared)
    trainer = make_trainer(args, setup, prepared, adapted(args, setup), private=False)

    used_s: float

    def wait() -> None:
        if not sys.stdin.readline():
            sys.exit(0)

    def on_step(step: int, loss: float) -> None:
        nonlocal used_s
        before_s, used_s = used_s, time.process_time()
        told = ClearStep(
            trainer.step_seconds[-1], loss, used_s - before_s, trainer.progress.gradient_norms[-1]
        )
        print(json.dumps(told._asdict()), flush=True)
        if step < setup.training.steps:
            wait()

    print(json.dumps({"ready": True}), flush=True)
    wait()
    used_s = time.process_time()
    trainer.train(on_step)


class Run:
    """A real run, on this machine's CPU or GPU."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.usages: list[Usage] = []
        self.exactness: dict[str, Any] = {}
        self.cpu_s: list[float] = []
        self.clear: list[ClearStep] = []
        self.clear_facts: dict[str, Any] = {}
        self.estimate_facts: dict[str, Any] = {}
        self.trace: RealTrace | None = None

    def run(self, argv: list[str]) -> dict[str, Any]:
        """Prepare, train, report; returns the figures."""
        args = self.args
        workers = chosen_workers(args)
        checkpoints = args.out / "checkpoints"
        ledger = open_ledger(args.out, checkpoints, workers)
        setup = set_up(args)
        require_room_for_run(setup.skeleton, args.rank, args.out, checkpoints)
        model = adapted(args, setup)
        require_trainable(model, setup.skeleton)
        prepared, prepare_s = prepared_for(
            setup.skeleton, preset(args.preset), args.cache, setup.hardware, args.owner_tag,
        )  # fmt: skip
        room = self._room(setup, prepared, model)
        if args.fresh:  # not before all that could be refused has been looked at
            remove_directory(checkpoints)
        trainer = make_trainer(args, setup, prepared, model, private=True, ledger=ledger)
        if trainer.dp is not None:
            print(dp_plan(trainer))
        peer = self._peer(argv, setup, prepared) if args.compare_clear else None
        trace = self.trace = RealTrace([g.name for g in prepared.groups]) if args.trace else None
        with (
            stopped_untainted(trainer),
            private_session(
                setup.skeleton, prepared, args.lanes, trace, setup.hardware, room, ledger, workers
            ) as session,
        ):
            self._estimate(setup, trainer, session)
            self._train(trainer, session, peer, trace)
        trainer.require_untainted()
        adapter = args.out / ("adapter-comparison" if args.compare_clear else "adapter")
        save_adapter(model, adapter, setup.base_name)
        if peer is not None:
            peer.close()
        return self._figures(setup, trainer, prepare_s) | {"adapter_dir": str(adapter)}

    def write_trace(self, figures: dict[str, Any]) -> None:
        """After all else: where it cannot be written, nothing else is lost."""
        if self.trace is not None:
            title = f"real run: {figures['weights']}, {figures['lanes']} lane(s)"
            self.trace.write(self.args.trace, title)

    def _peer(self, argv: list[str], setup: Setup, prepared: PreparedModel) -> ClearPeer:
        """The same training in clear: on a GPU in bf16, on a CPU in what is faster there."""
        dtype = "bf16"
        if setup.hardware.gpu is None:
            times_ms = clear_times_ms(prepared.groups, self.args.tokens)
            dtype = min(times_ms, key=times_ms.__getitem__)
            found = ", ".join(f"{name} {ms:.0f} ms" for name, ms in times_ms.items())
            hopeless = [name for name in DTYPES if name not in times_ms]
            remark = f"; {hopeless[0]} is hopeless here" if hopeless else ""
            print(f"the step in clear is in {dtype}: the widest linear takes {found}{remark}")
            self.clear_facts["clear_linear_ms"] = times_ms
        self.clear_facts["clear_dtype"] = dtype
        return ClearPeer([*argv, "--lm-head", self.args.lm_head], dtype)

    def _room(self, setup: Setup, prepared: PreparedModel, model: PeftModel) -> int | None:
        """Device memory for hints; checks on the way that the run fits."""
        gpu, args = setup.hardware.gpu, self.args
        if gpu is None:
            return None
        tokens = args.tokens * args.lanes
        return check_memory(gpu, setup.base.config, prepared, tokens, model, args.compare_clear)

    def _estimate(self, setup: Setup, trainer: Trainer, session: PrivateSession) -> None:
        left = setup.training.steps - trainer.progress.step
        self.estimate_facts = session.say_estimate(shape_of(self.args, setup.base), left)

    def _train(
        self,
        trainer: Trainer,
        session: PrivateSession,
        peer: ClearPeer | None,
        trace: RealTrace | None,
    ) -> None:
        last, used_s = session.usage(), time.process_time()

        def on_step(step: int, loss: float) -> None:
            nonlocal last, used_s
            now, now_s = session.usage(), time.process_time()
            self.usages.append(now.since(last))
            self.cpu_s.append(now_s - used_s)
            last, used_s = now, now_s
            if peer is not None:
                self.clear.append(peer.step())

        tokens = trainer.config.batch * self.args.sequence
        live = Live(session, tokens, self.args.lanes)
        train_with_bar(trainer, "private (encrypted)", on_step, trace, live)
        self.exactness = exactness_figures(session)

    def _costs(self, step_s: float) -> dict[str, float]:
        """Seconds of a step, by what they went to; medians."""
        waited_s, cipher_s, worker_s = (
            median(getattr(u, name) for u in self.usages)
            for name in ("waited_s", "owner_s", "worker_s")
        )
        return costs(step_s, waited_s, cipher_s, worker_s, self.args.lanes)

    def _head_share(self, setup: Setup) -> float | None:
        if self.args.lm_head == "remote":
            return None
        return head_share(shape_of(self.args, setup.base), setup.hardware)

    def _figures(self, setup: Setup, trainer: Trainer, prepare_s: float) -> dict[str, Any]:
        args = self.args
        tokens = setup.training.batch * args.sequence
        figures: dict[str, Any] = {
            "kernel": chosen_kernel().name,
            "weights": setup.base.describe(),
            "hardware": setup.hardware.label,
            "host_frames": setup.hardware.host_frames,
            "lm_head": args.lm_head,
            "preset": args.preset,
            "worker_elsewhere": bool(args.worker),
            "tokens_per_step": tokens,
            "lanes": args.lanes,
            "prepare_s": prepare_s,
            "losses": trainer.progress.losses,
            **text_figures(setup.data, len(trainer.progress.losses), setup.training.batch),
            **dp_figures(trainer),
            **gradient_norm_figures(
                trainer.progress.gradient_norms, [step.gradient_norm for step in self.clear]
            ),
            "peak_rss_mb": record.peak_rss_mb(),
            "peak_device_mb": setup.hardware.peak_device_mb(),
        } | self.estimate_facts
        if self.usages:
            step_s = median(trainer.step_seconds)
            figures |= {
                "private_step_s": step_s,
                "private_steps_s": trainer.step_seconds,
                "tokens_per_s": tokens / step_s,
                "cpu_s": median(self.cpu_s),
                "owner_s": median(u.owner_s for u in self.usages),
                "worker_s": median(u.worker_s for u in self.usages),
                "copied_s": median(u.copied_s for u in self.usages),
                "remote_wait_s": median(u.waited_s for u in self.usages),
                "costs_s": self._costs(step_s),
                "head_share": self._head_share(setup),
                "bytes_per_token_up": median(u.bytes_up for u in self.usages) / tokens,
                "bytes_per_token_down": median(u.bytes_down for u in self.usages) / tokens,
                "blocks_per_step": median(u.blocks for u in self.usages),
                **self.exactness,
            }
        if self.clear:
            figures["clear_step_s"] = median(step.seconds for step in self.clear)
            figures["clear_steps_s"] = [step.seconds for step in self.clear]
            figures["clear_losses"] = [step.loss for step in self.clear]
            figures["clear_cpu_s"] = median(step.cpu_s for step in self.clear)
            figures |= self.clear_facts
            pairs = zip(trainer.step_seconds, figures["clear_steps_s"], strict=False)
            figures["private_over_clear"] = median(ours / theirs for ours, theirs in pairs)
        return figures


def _largest(f: dict[str, Any]) -> str:
    known = {
        **f, "micro_batch_tokens": f["tokens_per_step"] // f["lanes"],
        "elsewhere": f["worker_elsewhere"],
    }  # fmt: skip
    return largest_line(f["costs_s"], known)


def print_report(f: dict[str, Any]) -> None:
    """What a person wants to know of the run."""
    print(f"\n{f['weights']}; {f['tokens_per_step']} tokens a step, {f['lanes']} lane(s)")
    print(f"owner and worker       {f['hardware']}")
    print(text_line(f))
    if f["losses"]:
        print(f"loss                   {f['losses'][0]:.4f} -> {f['losses'][-1]:.4f} nats a token")
    print(f"preparation            {f['prepare_s']:8.1f} s")
    if "private_step_s" in f:
        model_s = f["private_step_s"] - f["remote_wait_s"] / f["lanes"]
        print(f"private step           {f['private_step_s']:8.2f} s  {f['tokens_per_s']:.0f} tok/s")
        print(f"  owner: model         {max(0.0, model_s):8.2f} s  attention, head, adapters")
        print(f"  owner: cipher        {f['owner_s']:8.2f} s  encrypt and decrypt")
        print(f"  worker               {f['worker_s']:8.2f} s  products on ciphertexts")
        if f["copied_s"]:
            print(f"  copies               {f['copied_s']:8.2f} s  between host and GPU")
        print(_largest(f))
        total = f["bytes_per_token_up"] + f["bytes_per_token_down"]
        print(
            f"traffic per token      {human_bytes(f['bytes_per_token_up'])} up + "
            f"{human_bytes(f['bytes_per_token_down'])} down = {human_bytes(total)}"
        )
        if "products" in f:
            print(exactness_line(f["products"]))
    if "clear_step_s" in f:
        print(
            f"the same step in clear {f['clear_step_s']:8.2f} s  "
            f"({f['clear_dtype']}, same place, same int8 base)"
        )
        print(f"private / clear        {f['private_over_clear']:8.2f}")
        pairs = zip(f["losses"], f["clear_losses"], strict=False)
        print("losses private/clear   " + ", ".join(f"{a:.4f}/{b:.4f}" for a, b in pairs))
        print(f"gradients' norms       {f['gradient_norm_ratio']:8.3f}  private / clear, mean")
    print(f"peak memory            {f['peak_rss_mb'] / 1000:8.1f} GB  owner and worker together")
    if "dp_epsilon" in f:
        print(dp_line(f))
    if f["peak_device_mb"]:
        print(f"peak GPU memory        {f['peak_device_mb'] / 1000:8.1f} GB")
    print(f"adapter in             {f['adapter_dir']}")
