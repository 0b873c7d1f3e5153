"""Files and folders as people bring them: whole ones, and damaged, foreign and misplaced ones.

Everything is made below one folder, the pool, by seeded code and without the network. What a
command may change is copied from `pool/mine` for each case that wants it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from scenarios.options import TINY_LLAMA
from sim.device import PROFILES

TEXT = "The owner keeps the text; the worker sees ciphertexts, and learns their shapes.\n"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    "hidden_act": "silu", "rms_norm_eps": 1e-6,
}  # fmt: skip
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 8989128\n"


def weights() -> dict[str, np.ndarray[Any, Any]]:
    """Of a model of CONFIG, random."""
    rng = np.random.default_rng(0)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (4096, 32), "model.norm.weight": (32,),
        f"{layer}input_layernorm.weight": (32,), f"{layer}post_attention_layernorm.weight": (32,),
        f"{layer}self_attn.q_proj.weight": (32, 32), f"{layer}self_attn.k_proj.weight": (16, 32),
        f"{layer}self_attn.v_proj.weight": (16, 32), f"{layer}self_attn.o_proj.weight": (32, 32),
        f"{layer}mlp.gate_proj.weight": (48, 32), f"{layer}mlp.up_proj.weight": (48, 32),
        f"{layer}mlp.down_proj.weight": (32, 48),
    }  # fmt: skip
    return {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def make(pool: Path) -> None:
    """All of it. The folder must not be there yet."""
    pool.mkdir(parents=True)
    _checkpoints(pool / "weights")
    _texts(pool / "data")
    _profiles(pool / "profiles")
    _studies(pool / "studies")
    _places(pool / "places")
    (pool / "mine").mkdir()


# --- checkpoints ----------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> None:
    good = folder / "good"
    good.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, good / name)
    (good / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), good / "model.safetensors", {"format": "pt"})
    for name, damage in DAMAGE.items():
        shutil.copytree(good, folder / name)
        damage(folder / name)
    (folder / "empty").mkdir()
    shutil.copy(good / "model.safetensors", folder / "a-file.safetensors")
    (folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + bytes(64))


def _tensor(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors"
    held = load_file(path)
    change(held)
    save_file(held, path, {"format": "pt"})


def _config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def _index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "model.safetensors").unlink()


def _foreign(folder: Path, model_type: str, **more: Any) -> None:
    config = {"model_type": model_type, "vocab_size": 4096, **more}
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "lfs-pointer": lambda f: (f / "model.safetensors").write_bytes(LFS),
    "cut": lambda f: os.truncate(f / "model.safetensors", 3000),
    "cut-in-header": lambda f: os.truncate(f / "model.safetensors", 5),
    "huge-header": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
    "empty-weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "no-weights": lambda f: (f / "model.safetensors").unlink(),
    "no-config": lambda f: (f / "config.json").unlink(),
    "config-cut": lambda f: (f / "config.json").write_text('{"model_type": "lla'),
    "config-list": lambda f: (f / "config.json").write_text("[]"),
    "config-other-type": lambda f: _foreign(f, "no-such-model"),
    "config-words": lambda f: _config(f, hidden_size="wide"),
    "config-negative": lambda f: _config(f, num_hidden_layers=-1),
    "config-wider": lambda f: _config(f, hidden_size=64),
    "config-nan": lambda f: _config(f, rms_norm_eps=float("nan")),
    "t5": lambda f: _foreign(f, "t5", d_model=32, num_layers=1),
    "mamba": lambda f: _foreign(f, "mamba", hidden_size=32, num_hidden_layers=1),
    "bert": lambda f: _foreign(f, "bert", hidden_size=32, num_hidden_layers=1),
    "llava": lambda f: _foreign(f, "llava"),
    "clip": lambda f: _foreign(f, "clip"),
    "norm-nan": lambda f: _tensor(f, lambda t: t["model.norm.weight"].__setitem__(3, np.nan)),
    "embedding-inf": lambda f: _tensor(
        f, lambda t: t["model.embed_tokens.weight"].__setitem__((5, 5), np.inf)
    ),
    "linear-nan": lambda f: _tensor(
        f, lambda t: t["model.layers.0.mlp.up_proj.weight"].__setitem__((0, 0), np.nan)
    ),
    "tensor-missing": lambda f: _tensor(f, lambda t: t.pop("model.norm.weight")),
    "tensor-misshapen": lambda f: _tensor(
        f, lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)})
    ),
    "index-broken": lambda f: _index(f, '{"weight_map": '),
    "index-list": lambda f: _index(f, '{"weight_map": [1, 2]}'),
    "index-empty": lambda f: _index(f, "{}"),
    "index-outside": lambda f: _index(f, '{"weight_map": {"a": "../../../etc/passwd"}}'),
    "shard-missing": lambda f: _index(
        f, json.dumps({"weight_map": dict.fromkeys(weights(), "model-00001-of-00002.safetensors")})
    ),
    "no-tokenizer": lambda f: [path.unlink() for path in f.glob("tokenizer*")],
    "tokenizer-cut": lambda f: os.truncate(f / "tokenizer.json", 1000),
    "tokenizer-list": lambda f: (f / "tokenizer.json").write_text("[]"),
    "config-directory": lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()],
}
"""What is done to a whole checkpoint, by the name of its folder."""
UNDECIDED = ("config-nan", "llava", "config-negative", "linear-nan")
"""Damages that somebody may know what to do with, or that are found while preparing."""


# --- texts ----------------------------------------------------------------------------------------


def _texts(folder: Path) -> None:
    folder.mkdir()
    text = TEXT * 400
    for name, content in {
        "good.txt": text.encode(),
        "empty.txt": b"",
        "spaces.txt": b" \n" * 500,
        "short.txt": b"short",
        "utf16.txt": text.encode("utf-16"),
        "utf16-bare.txt": text.encode("utf-16-le"),
        "utf32.txt": text.encode("utf-32"),
        "latin1.txt": (text + "Übergröße ß\n").encode("latin-1"),
        "bom.txt": b"\xef\xbb\xbf" + text.encode(),
        "nulls.txt": (text + "\x00" * 500).encode(),
        "random.bin": np.random.default_rng(1).bytes(50_000),
        "surrogates.txt": text.encode() + b"\xed\xa0\x80",
        "one-line.txt": b"word " * 20_000,
        "chat.jsonl": (
            json.dumps({"messages": [{"role": "user", "content": TEXT}]}) + "\n"
        ).encode()
        * 200,
        "README": text.encode(),
    }.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "fifo.txt")
    (folder / "nothing").mkdir()
    (folder / "many").mkdir()
    for number in range(30):
        (folder / "many" / f"{number}.md").write_text(TEXT * 20)
    (folder / "many" / "pipe.txt").symlink_to(folder / "fifo.txt")
    (folder / "loop").mkdir()
    (folder / "loop" / "again").symlink_to(folder / "loop")
    (folder / "loop" / "gone.txt").symlink_to("nowhere")
    (folder / "loop" / "there.txt").write_text(text)


# --- what the simulator reads ---------------------------------------------------------------------


def _profiles(folder: Path) -> None:
    folder.mkdir()
    facts = json.loads((PROFILES / "cpu-2core.json").read_text())

    def changed(*keys: str, value: Any) -> str:
        copy = json.loads(json.dumps(facts))
        at = copy
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        return json.dumps(copy)

    texts = {
        "good": json.dumps(facts),
        "nan-rate": changed("rates", "int8", value=float("nan")),
        "infinite-rate": changed("rates", "int8", value=float("inf")),
        "zero-rate": changed("rates", "float", value=0),
        "negative-rate": changed("rates", "float", value=-1.0),
        "tiny-rate": changed("rates", "int8", value=1e-300),
        "text-rate": changed("rates", "value", value="fast"),
        "true-rate": changed("rates", "value", value=True),
        "rates-list": changed("rates", value=[1, 2]),
        "nan-overhead": changed("overhead_s", "local", value=float("nan")),
        "long-overhead": changed("overhead_s", "local", value=1e300),
        "nan-bandwidth": changed("bytes_per_s", value=float("nan")),
        "no-cores": changed("cores", value=None),
        "width-text": changed("width", "local", value="1"),
        "width-wide": changed("width", "local", value=1000),
        "origin-text": changed("origin", value="here"),
        "assumed-text": changed("origin", "assumed", value="everything"),
        "name-number": changed("name", value=7),
        "unknown-key": changed("speed", value=1.0),
        "list": "[]",
        "null": "null",
        "cut": json.dumps(facts)[:100],
        "empty": "",
        "deep": "[" * 100_000,
        "number": "1e400",
    }
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "latin1.json").write_bytes(json.dumps(facts)[:-1].encode() + b', "\xe4": 1}')
    os.mkfifo(folder / "fifo.json")
    (folder / "folder.json").mkdir()


_TWO_LANES = "[sweep]\nlanes = [1, 2]\n[answer]\n"
STUDIES = {
    "good": '[sweep]\nlanes = [1, 2]\n[fixed]\ntokens = "64"\nsteps = 1\n',
    "prices": "[sweep]\nlanes = [1]\n[prices]\ngpu-hour = 2.0\n",
    "nan-price": "[sweep]\nlanes = [1]\n[prices]\ngpu-hour = nan\n",
    "infinite-price": "[sweep]\nlanes = [1]\n[prices]\ngb-out = inf\n",
    "negative-price": "[sweep]\nlanes = [1]\n[prices]\ngb-out = -0.5\n",
    "true-price": "[sweep]\nlanes = [1]\n[prices]\ngb-out = true\n",
    "text-price": '[sweep]\nlanes = [1]\n[prices]\ngb-out = "cheap"\n',
    "nan-knob": "[sweep]\nlanes = [nan]\n",
    "infinite-knob": "[sweep]\nrtt = [inf]\n",
    "overflowing-knob": '[fixed]\nbandwidth = "1e400Gb/s"\n[sweep]\nlanes = [1]\n',
    "date-knob": "[sweep]\nlanes = [2020-01-01]\n",
    "table-knob": "[sweep]\nlanes = {a = 1}\n",
    "no-values": "[sweep]\nlanes = []\n",
    "unknown-knob": "[sweep]\nlane = [1]\n",
    "sweep-number": "sweep = 3\n",
    "answer-number": "answer = 3\n[sweep]\nlanes = [1]\n",
    "kind-list": _TWO_LANES + "kind = [1]\n",
    "kind-unknown": _TWO_LANES + 'kind = "guess"\n',
    "factor-nan": _TWO_LANES + 'kind = "until"\nknob = "lanes"\nfactor = nan\n',
    "factor-text": _TWO_LANES + 'kind = "until"\nknob = "lanes"\nfactor = "2"\n',
    "until-without": _TWO_LANES + 'kind = "until"\n',
    "knob-still": _TWO_LANES + 'kind = "until"\nknob = "rtt"\n',
    "value-unknown": _TWO_LANES + 'value = "luck"\n',
    "at-number": _TWO_LANES + "at = 5\n",
    "cheaper-alone": _TWO_LANES + 'kind = "cheaper"\none = "lanes"\nother = "lanes"\n',
    "cheaper-words": '[sweep]\nlanes = [1, 2]\nhead = ["local", "remote"]\n[answer]\n'
    'kind = "cheaper"\none = "lanes"\nother = "head"\n',
    "plot-strange": '[sweep]\nlanes = [1, 2]\n[plot]\nx = "rtt"\n',
    "plot-show": "[sweep]\nlanes = [1, 2]\n[plot]\nshow = 5\n",
    "plot-against": '[sweep]\nlanes = [1, 2]\nrtt = ["1ms", "2ms"]\n[plot]\nagainst = "lanes"\n',
    "too-many": "[sweep]\nlanes = '1..1000'\nowners = '1..1000'\n",
    "section-unknown": "[sweeps]\nlanes = [1]\n",
    "cut": "[sweep\n",
    "deep": "a = " + "[" * 5000,
    "empty": "",
}
"""What-if studies, by the name of their file."""
GOOD_STUDIES = ("good", "prices", "empty")


def _studies(folder: Path) -> None:
    folder.mkdir()
    for name, text in STUDIES.items():
        (folder / f"{name}.toml").write_text(text)
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00[sweep]")
    os.mkfifo(folder / "fifo.toml")
    (folder / "folder.toml").mkdir()


# --- places ---------------------------------------------------------------------------------------


def _places(folder: Path) -> None:
    folder.mkdir()
    (folder / "a-file").write_text("held")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
