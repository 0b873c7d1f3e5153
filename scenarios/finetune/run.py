"""One fine-tuning: looked at, said what it takes, prepared, trained, reported."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple
from itertools import dropwhile
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm import tqdm

from backends.errors import Interrupted
from backends.files import remove_directory
from backends.hardware import check_memory
from backends.he.matmul.choice import chosen_kernel
from backends.he.params import preset
from backends.he.store import PreparedModel
from backends.ledger import TaintedError
from backends.nn.adapters import add_lora, base_name, save_adapter
from backends.nn.checkpoint import newest_step
from backends.nn.gates import require_learnable
from backends.nn.generate import complete
from backends.nn.selfcheck import require_trainable
from backends.nn.tokenizer import end_of_text
from backends.nn.trainer import Trainer, TrainingInterrupted
from backends.places import named
from backends.session import Usage
from scenarios import record
from scenarios.costs import costs
from scenarios.dp import dp_figures, dp_plan
from scenarios.estimate import head_share, spoken
from scenarios.finetune.cost import Asked, foreseen, over_line
from scenarios.finetune.held import HeldOut
from scenarios.finetune.setting import CHECKPOINTS, Setup, run_settings, set_up
from scenarios.page import Content, Watch, content_of, write_page
from scenarios.page.watch import STEPS as WATCHED_STEPS
from scenarios.preparation import prepared_for
from scenarios.session import (
    Live,
    PrivateSession,
    chosen_workers,
    exactness_figures,
    open_ledger,
    private_session,
    require_room_for_run,
    stopped_untainted,
    train_with_bar,
    usage_figures,
)
from scenarios.texts import text_figures


class _Told(Live):
    """The bar's words of a step: beside those of `Live` the held-out loss, and bytes so far."""

    def __init__(self, session: PrivateSession, setup: Setup, held: HeldOut | None) -> None:
        self._held, self._setup = held, setup
        super().__init__(
            session, setup.training.batch * setup.shape.sequence, setup.shape.lanes
        )  # fmt: skip

    def step_ended(self, seconds: float) -> dict[str, str]:
        before, now = self._last[0], self._session.usage()
        found = super().step_ended(seconds)
        if self._held is not None and self._held.last is not None:
            found = {"held-out": f"{self._held.last:.3f}", **found}
        found["MB"] = f"{(now.bytes_up + now.bytes_down) / 1e6:.3g}"
        if self._session.probed is None:
            used, lanes = now.since(before), self._setup.shape.lanes
            parts = {
                "own layers": seconds - used.waited_s / lanes, "cipher": used.owner_s / lanes,
                "worker": used.worker_s / lanes,
            }  # fmt: skip
            found["waits for"] = max(parts, key=parts.__getitem__)
        return found


class Finetune:
    """One run, in order."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.out
        self.checkpoints = self.out / CHECKPOINTS
        self.workers = chosen_workers(args)
        self.ledger = open_ledger(self.out, self.checkpoints, self.workers)
        self.held: HeldOut | None = None
        self.result: Trainer | None = None  # once its adapter is there
        self.usages: list[Usage] = []
        self.figures: dict[str, Any] = {
            "lanes": args.lanes,
            "kernel": chosen_kernel().name,
            "preset": args.preset,
            "worker_elsewhere": bool(self.workers.addresses),
        }

    def run(self) -> dict[str, Any] | None:
        """All of it; the figures, or None when the user would rather not start."""
        args, here = self.args, not self.workers.addresses
        setup = self.setup = set_up(args, here)
        self.figures |= {
            "weights": setup.base.describe(),
            "hardware": setup.hardware.label,
            "lm_head": args.lm_head,
            "tokens_per_step": args.batch * args.sequence,
            "sequences": len(setup.data.train),
        }
        self._foresee(here)
        if here and args.dry_run:
            return self.figures
        require_room_for_run(setup.skeleton, args.rank, self.out, self.checkpoints)
        if here and not self._agreed():
            return None
        model = add_lora(
            setup.skeleton.model, args.rank, args.alpha, args.seed,
            base_model=base_name(args.weights), linears=setup.linears,
        )  # fmt: skip
        require_trainable(model, setup.skeleton)
        prepared, self.figures["prepare_s"] = prepared_for(
            setup.skeleton, preset(args.preset), args.cache, setup.hardware, args.owner_tag
        )
        return self._train(model, prepared, self._room(prepared, model))

    def _foresee(self, here: bool) -> None:
        """Say what it will take, before anything long."""
        args, setup = self.args, self.setup
        places = args.cache, args.owner_tag, self.checkpoints
        done = 0 if args.fresh else min(newest_step(self.checkpoints), setup.training.steps)
        if done:
            print(f"going on after step {done}")
        cost = foreseen(
            setup.shape, self._asked(done), setup.training.steps - done, setup.skeleton,
            setup.hardware, here, places,
        )  # fmt: skip
        print("\n".join(cost.lines()))
        self.figures["cost"] = cost.figures()

    def _asked(self, done: int) -> Asked:
        """Beside the steps that come after `done`."""
        args, setup = self.args, self.setup
        tokens = 2 * args.sample_tokens * len(setup.prompts)
        if setup.data.held_out is None:
            return Asked(tokens=tokens)
        between = range(done + 1, setup.training.steps)
        evaluations = 2 + sum(step % args.evaluate_every == 0 for step in between)
        return Asked(evaluations, math.ceil(args.evaluate_on / args.micro_batch), tokens)

    def _agreed(self) -> bool:
        """Asks whoever sits at a terminal."""
        if self.args.yes or not sys.stdin.isatty():
            return True
        try:
            return input("start? [Y/n] ").strip().lower() in ("", "y", "yes")
        except EOFError:
            return False

    def _room(self, prepared: PreparedModel, model: PeftModel) -> int | None:
        gpu, setup = self.setup.hardware.gpu, self.setup
        if gpu is None:
            return None
        tokens = setup.shape.tokens * setup.shape.lanes
        return check_memory(gpu, setup.base.config, prepared, tokens, model)

    def _train(
        self, model: PeftModel, prepared: PreparedModel, room: int | None
    ) -> dict[str, Any] | None:
        args, setup = self.args, self.setup
        trainer = None if args.fresh else self._trainer(model, prepared)
        most_steps = math.inf if args.trace else WATCHED_STEPS
        self.watch = Watch([group.name for group in prepared.groups], most_steps)
        with self._kept_when_stopped(model), self._untainted(), private_session(
            setup.skeleton, prepared, args.lanes, self.watch, setup.hardware, room, self.ledger,
            self.workers,
        ) as session:  # fmt: skip
            if not self._goes_on(session, 0 if trainer is None else trainer.progress.step):
                return self.figures if args.dry_run else None
            if trainer is None:  # what there was is given up no sooner than a new run begins
                remove_directory(self.checkpoints)
                trainer = self._trainer(model, prepared)
            if trainer.dp is not None:
                print(dp_plan(trainer))
            self._held_out(trainer)
            with stopped_untainted(trainer):
                self._steps(session, trainer, model)
            # Whatever happens to what is still asked for, that of the training is there.
            trainer.require_untainted()
            save_adapter(model, self.out / "adapter", base_name(args.weights))
            self.result = trainer
            if self.held is not None and self.held.points[-1][0] != trainer.progress.step:
                self.held.look(model, trainer.progress.step)
            self.figures |= exactness_figures(session)
            self._samples(model)
        self._tell(trainer)
        return self.figures

    def _trainer(self, model: PeftModel, prepared: PreparedModel) -> Trainer:
        args, setup = self.args, self.setup
        model.to(setup.hardware.device)
        return Trainer(
            model, setup.data.train, setup.training, lanes=args.lanes,
            forget_lane=setup.skeleton.remote.forget_lane, checkpoints=self.checkpoints,
            checkpoint_every=args.checkpoint_every, ledger=self.ledger, say=print,
            identity=run_settings(args, setup.linears, setup.base)
            | {"model": prepared.model_digest.hex()},
        )  # fmt: skip

    def _held_out(self, trainer: Trainer) -> None:
        held = self.setup.data.held_out
        if held is not None:
            self.held = HeldOut(
                held, self.args.micro_batch, self.args.evaluate_on, self.checkpoints,
                trainer.progress.step,
            )  # fmt: skip

    @contextmanager
    def _kept_when_stopped(self, model: PeftModel) -> Iterator[None]:
        """After Ctrl-C, too, there is an adapter where a finished run puts it."""
        try:
            yield
        except TrainingInterrupted as stopped:
            place = self.out / "adapter"
            save_adapter(model, place, base_name(self.args.weights))
            raise TrainingInterrupted(f"{stopped}; {place} is that adapter, too") from None
        except KeyboardInterrupt:
            if self.result is None:
                raise
            raise Interrupted(
                f"stopped after the last step; {self.out / 'adapter'} is the adapter, and the same "
                "command writes the report"
            ) from None

    @contextmanager
    def _untainted(self) -> Iterator[None]:
        """No adapter stays that rests on a worker which is caught after it was saved.

        Raises TaintedError then.
        """
        try:
            yield
        finally:
            if self.result is not None:
                try:
                    self.result.require_untainted()
                except TaintedError:
                    remove_directory(self.out / "adapter")
                    raise

    def _goes_on(self, session: PrivateSession, done: int) -> bool:
        """Over a line, what it takes is known now: whether to start, after `done` steps."""
        left = self.setup.training.steps - done
        self.figures |= session.say_estimate(self.setup.shape, left)
        estimate = session.estimate
        if estimate is not None:
            setup = self.setup
            extra_s = over_line(estimate, setup.shape, self._asked(done), setup.hardware)
            every_s = estimate.seconds + extra_s
            print(f"with held-out losses and samples: about {spoken(every_s)} in all")
            self.figures["estimate"]["seconds_in_all"] = every_s
        if self.args.dry_run:
            return False
        return not self.workers.addresses or self._agreed()

    def _steps(self, session: PrivateSession, trainer: Trainer, model: PeftModel) -> None:
        """Train what is left, with held-out losses on the way."""
        setup, held = self.setup, self.held
        if trainer.progress.step == 0:
            rows = setup.data.train if setup.data.held_out is None else setup.data.held_out
            config = setup.base.config.get_text_config(decoder=True)
            require_learnable(model, rows, self.args.micro_batch, config.vocab_size)
        if held is not None and held.base is None:
            before = held.look(model, 0) if trainer.progress.step == 0 else held.of_base(model)
            print(f"held-out loss of the base model: {before:.4f} nats a token")
        live = _Told(session, setup, held)
        last = session.usage()

        def after_step(step: int, loss: float) -> None:
            nonlocal last
            self.usages.append(session.usage().since(last))
            if held is not None and (
                step % self.args.evaluate_every == 0 and step < setup.training.steps
            ):
                with self.watch.apart():
                    tqdm.write(f"step {step}: held-out loss {held.look(model, step):.4f}")
            last = session.usage()
            live.resume()

        train_with_bar(trainer, "private (encrypted)", after_step, self.watch, live)

    def _samples(self, model: PeftModel) -> None:
        """What base and tuned model make of the prompts."""
        decode, stops = self.setup.tokenizer.decode, self.setup.tokenizer.end
        stop, count = (stops[-1] if stops else None), self.args.sample_tokens
        fill = end_of_text(self.setup.tokenizer)
        found: list[dict[str, str]] = []
        self.figures["samples"] = found
        for prompt in self.setup.prompts:
            begun = list(dropwhile(fill.__eq__, prompt[0].tolist()))
            texts = {"prompt": decode(begun)}
            for name, which in (("base", model.disable_adapter()), ("tuned", nullcontext())):
                with which:
                    texts[name] = decode(complete(model, prompt, count, stop))
            if texts not in found:  # of a text with too few documents one is there again
                found.append(texts)

    def _tell(self, trainer: Trainer) -> None:
        """Figures and page."""
        args, setup, f = self.args, self.setup, self.figures
        f |= {
            "steps": setup.training.steps,
            "steps_this_run": len(self.usages),
            "losses": trainer.progress.losses,
            **text_figures(setup.data, len(trainer.progress.losses), setup.training.batch),
            "gradient_norms": trainer.progress.gradient_norms,
            **dp_figures(trainer),
            "workers_caught": len(self.ledger.retired),
            "adapter_dir": str(self.out / "adapter"),
            "page": str(self.out / "report.html"),
            "peak_rss_mb": record.peak_rss_mb(),
            "peak_device_mb": setup.hardware.peak_device_mb(),
        }
        if self.usages:
            used = Usage(*(sum(parts) for parts in zip(*map(astuple, self.usages), strict=True)))
            tokens = len(self.usages) * setup.training.batch * args.sequence
            taken_s = sum(trainer.step_seconds)
            f |= usage_figures(used, taken_s, tokens, args.lanes)
            whole = costs(taken_s, used.waited_s, used.owner_s, used.worker_s, args.lanes)
            f["costs_s"] = {part: s / len(self.usages) for part, s in whole.items()}
            f["micro_batch_tokens"] = args.micro_batch * args.sequence
            if args.lm_head == "local":
                f["head_share"] = head_share(setup.shape, setup.hardware)
        if self.held is not None:
            f |= {
                "base_loss": self.held.base,
                "private_loss": self.held.last,
                "held_out": [list(point) for point in self.held.points],
            }
        write_page(self.out / "report.html", self._page())

    def write_trace(self) -> None:
        """After all else: where it cannot be written, nothing else is lost."""
        if self.args.trace:
            self.watch.write(self.args.trace, f"fine-tuning, {self.args.lanes} lane(s)")

    def _page(self) -> Content:
        args = self.args
        name = named(args.weights)
        model = name.resolve().name if name.exists() else args.weights
        title = f"Private fine-tuning of {model} on {args.data.resolve().name}"
        return content_of(title, self.figures, preset(args.preset), self.watch)
