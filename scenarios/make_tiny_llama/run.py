"""Vocabulary, training and checks of the tiny Llama."""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import random
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from scenarios.make_tiny_llama.__main__ import BATCH, SEQ_LEN

SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
SKIPPED_DIRS |= {"encodings", "pydoc_data"}  # generated tables: no code to learn from
END, PAD = "<|endoftext|>", "<|pad|>"
VOCAB = 4096
VALID_SHARE, VALID_ROWS = 0.04, 64
PEAK_LR, WARMUP, FLOOR = 2.5e-3, 0.03, 0.05
SIZE_LIMIT = 9_900_000


def read_corpus() -> tuple[list[str], list[str]]:
    """Read the standard library; a hash of each file's name says: to train on, or held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    valid: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # _sysconfigdata lists the build machine's own paths and flags, which are not code.
        if SKIPPED_DIRS & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        held_out = int.from_bytes(digest[:4], "big") / 2**32 < VALID_SHARE
        (valid if held_out else train).append(text)
    if not train or not valid:
        raise SystemExit("No Python source found in this interpreter's standard library.")
    return train, valid


def train_tokenizer(texts: list[str]) -> FastTokenizer:
    """Learn a byte-level BPE vocabulary: every text decodes back to itself exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    special = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    options = {"model_max_length": 2 * SEQ_LEN, "clean_up_tokenization_spaces": False}
    return FastTokenizer(tokenizer_object=bpe, **special, **options)  # type: ignore[no-untyped-call]


def encode(tokenizer: FastTokenizer, texts: list[str]) -> list[list[int]]:
    """Turn each text into token ids that end with the end-of-text token."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    return [[*encoding.ids, tokenizer.eos_token_id] for encoding in encodings]


def pack(documents: list[list[int]], rng: random.Random) -> torch.Tensor:
    """Join the documents in a random order and cut them into rows of SEQ_LEN tokens."""
    order = rng.sample(documents, len(documents))
    flat = torch.tensor([token for document in order for token in document])
    rows = flat[: len(flat) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    return rows[torch.tensor(rng.sample(range(len(rows)), len(rows)))]


def build_model(tokenizer: FastTokenizer) -> LlamaForCausalLM:
    """Make the model with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        # Heads of 64 train a quarter faster on a CPU than twice as many heads of 32.
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learning_rate(progress: float) -> float:
    """Warm up in a straight line, then fall along a cosine to a small floor."""
    if progress < WARMUP:
        return PEAK_LR * (progress + 1e-4) / WARMUP
    wave = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))
    return PEAK_LR * (FLOOR + (1 - FLOOR) * wave)


def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean next-token loss of the rows, in nats per token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=rows, labels=rows, use_cache=False).loss


def train(
    model: LlamaForCausalLM, documents: list[list[int]], args: argparse.Namespace
) -> list[float]:
    """Run AdamW until the steps, or the minutes, are used up; return the loss of each step."""
    rng = random.Random(args.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    pool: list[torch.Tensor] = []
    losses: list[float] = []
    start, progress = time.monotonic(), 0.0
    model.train()
    with tqdm(total=None if args.minutes else args.steps, unit="step", desc="training") as bar:
        while progress < 1.0:
            if not pool:
                pool = list(torch.split(pack(documents, rng), BATCH))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress)
            loss = mean_loss(model, pool.pop(), args.precision == "bf16")
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            minutes = (time.monotonic() - start) / 60
            progress = minutes / args.minutes if args.minutes else len(losses) / args.steps
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", done=f"{min(progress, 1.0):.0%}")
    return losses


@torch.no_grad()
def check(folder: Path, texts: list[str]) -> float:
    """Load the saved files as a user would; return the float32 loss on fixed held-out rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, FastTokenizer)
    for text in [*texts, "  \t a\n\n\r\n é漢🙂 \x00 ,. ' n't"]:
        if tokenizer.decode(tokenizer(text, verbose=False).input_ids) != text:
            raise RuntimeError("the saved tokenizer does not give a text back unchanged")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    model.eval()  # type: ignore[no-untyped-call]
    rows = pack(encode(tokenizer, texts), random.Random(0))[:VALID_ROWS]
    parts = torch.split(rows, BATCH)
    return sum(mean_loss(model, part, False).item() * len(part) for part in parts) / len(rows)


def readme(args: argparse.Namespace, facts: dict[str, str], weights: int) -> str:
    """Say what the folder is, and how it was made."""
    length = f"--minutes {args.minutes:g}" if args.minutes else f"--steps {args.steps}"
    options = f"{length} --seed {args.seed} --precision {args.precision}"
    python = platform.python_version()
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""# tiny-llama

A small genuine Llama ({weights:,} weights in bf16, tied embeddings, grouped-query attention,
byte-level BPE of {VOCAB} tokens), pre-trained from random weights on Python source code. It is
a base to try fine-tuning on; it is far too small to be of use as an assistant.

Made by this command, with Python {python} and torch {torch.__version__}:

    python -m scenarios.make_tiny_llama {options}

| | |
| --- | --- |
| text | the standard library of CPython {python}, without tests, idlelib and generated tables |
| held out | {VALID_SHARE:.0%} of the files, chosen by a hash of their names |
{table}

Licence of the training text: Python Software Foundation License Version 2. A few modules carry
further notices of their own, as "History and License" in Python's documentation lists.
"""


def make(args: argparse.Namespace) -> None:
    """Train, write all files aside, check them, then rename the folder into place."""
    torch.manual_seed(args.seed)
    texts, held_out = read_corpus()
    print(f"learning a vocabulary of {VOCAB} tokens from {len(texts)} files")
    tokenizer = train_tokenizer(texts)
    documents = encode(tokenizer, texts)
    model = build_model(tokenizer)
    weights = model.num_parameters()
    print(f"training {weights:,} weights on a text of {sum(map(len, documents)):,} tokens")
    start = time.monotonic()
    losses = train(model, documents, args)
    minutes = (time.monotonic() - start) / 60
    train_loss = sum(losses[-100:]) / len(losses[-100:])

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as scratch:
        fresh = Path(scratch, "new")
        model.to(torch.bfloat16).save_pretrained(fresh)  # type: ignore[arg-type]
        tokenizer.save_pretrained(fresh)
        valid_loss = check(fresh, held_out)
        facts = {
            "training": f"{len(losses)} steps of {BATCH} x {SEQ_LEN} tokens in {minutes:.1f} min",
            "tokens seen": f"{len(losses) * BATCH * SEQ_LEN:,}",
            "final train loss": f"{train_loss:.3f} nats per token, mean of the last 100 steps",
            "final valid loss": f"{valid_loss:.3f} nats per token, {VALID_ROWS} held-out rows",
        }
        text = readme(args, facts, weights)
        (fresh / "README.md").write_text(text, encoding="utf-8")
        for path in fresh.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        size = sum(path.stat().st_size for path in fresh.iterdir())
        if size >= SIZE_LIMIT:
            raise RuntimeError(f"the files take {size} bytes; the limit is {SIZE_LIMIT}")
        if args.out.exists():
            args.out.rename(Path(scratch, "old"))
        fresh.rename(args.out)
    print(f"train loss {train_loss:.3f}, valid loss {valid_loss:.3f}: wrote {args.out}")
