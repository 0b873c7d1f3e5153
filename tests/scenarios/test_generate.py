"""`python -m scenarios.generate`, and what its benchmark counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backends.net.tls import CertificateError
from backends.nn.adapters import AdapterError, add_lora, save_adapter
from backends.nn.base import open_base
from backends.nn.skeleton import build_skeleton
from benchmarks.generation import token_bytes
from scenarios.certs import Authority
from scenarios.generate.__main__ import parse
from scenarios.generate.run import Generation, PromptError, encoded, print_report, prompts_of
from scenarios.options import TINY_LLAMA
from tests.scenarios.worker_process import running

PROMPT = "def shortest_path(G, source"


def completed(words: list[str], stops: frozenset[int] = frozenset()) -> dict[str, Any]:
    """The figures of a run in this process, whose answers end at these tokens."""
    generation = Generation(parse(words))
    generation.stops = stops
    return generation.run()


@pytest.mark.slow
def test_it_completes_with_an_adapter_here_and_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a download; and what goes out is the same wherever the answer ends."""
    model = add_lora(build_skeleton(open_base(TINY_LLAMA)).model, 4, 8, seed=1)
    save_adapter(model, tmp_path / "adapter", str(TINY_LLAMA))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import os"}\n\n"import re"\n')
    (tmp_path / "out").mkdir()
    words = [
        "--adapter", str(tmp_path / "adapter"), "--prompt", PROMPT, "--tokens", "4",
        "--prompts", str(tmp_path / "prompts.jsonl"),
        "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--preset", "exact",
    ]  # fmt: skip
    whole = completed(words)
    ended = completed(words, frozenset(range(4096)))
    assert [a["prompt"] for a in whole["answers"]] == [PROMPT, "import os", "import re"]
    assert all(a["tokens"] == 4 and a["completion"] for a in whole["answers"])
    assert all(a["tokens"] == 0 and a["ended"] for a in ended["answers"])
    assert whole["blocks_encrypted"] == ended["blocks_encrypted"] == 3 * 4 * 20
    counts = "bytes_up", "bytes_down"
    assert [whole[key] for key in counts] == [ended[key] for key in counts]
    authority = Authority()
    authority.issue(tmp_path / "owner")
    authority.issue(tmp_path / "worker", ["localhost"])
    (model_directory,) = (tmp_path / "cache").glob("llama-exact-*")
    with running(model_directory, tls=tmp_path / "worker") as worker:
        over_tls = completed(
            [*words, "--worker", worker.address, "--tls", str(tmp_path / "owner")]
        )  # fmt: skip
    assert over_tls["worker_elsewhere"]
    assert over_tls["bytes_up"] == whole["bytes_up"]
    capsys.readouterr()
    print_report(whole)
    assert "ms a token" in capsys.readouterr().out


def test_a_mistake_is_told_before_anything_is_prepared(tmp_path: Path) -> None:
    """An adapter that is none, a worker that is nowhere."""
    places = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    with pytest.raises(AdapterError, match="name the directory of an adapter"):
        Generation(parse([*places, "--prompt", "x", "--adapter", str(tmp_path)]))
    with pytest.raises(CertificateError):
        Generation(parse([*places, "--prompt", "x", "--worker", "gpu.example:7443"]))
    assert not list((tmp_path / "cache").glob("llama-*"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", b"\n \n", "nothing to complete"),
        ("bytes.txt", b"\xff", "not UTF-8"),
        ("a.jsonl", b'"x"\n{"text": "y"}\n', "line 2: neither a JSON string nor a record"),
        ("b.jsonl", b"[1", "line 1: neither"),
        ("c.jsonl", b'"\\ud800"', "prompt 1 is not UTF-8"),
        ("nowhere.txt", None, "No such file"),
    ],
)
def test_prompts_that_cannot_be_are_refused(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    """By their file and line, never by what they say."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=said):
        prompts_of(parse(["--prompts", str(tmp_path / name), "--cache", str(tmp_path)]))


def test_a_prompt_must_fit_the_model() -> None:
    """With what is to follow; empty ones are told, too."""
    base = open_base(TINY_LLAMA)
    tokenizer, model = base.tokenizer(), torch.nn.Module()
    model.config = base.config  # type: ignore[assignment]
    model.get_input_embeddings = lambda: None  # type: ignore[assignment]
    (marked,) = encoded(["a<|endoftext|>b"], tokenizer, model, 12)
    assert tokenizer.end[-1] in marked  # whoever types a prompt may write its marks
    (ids,) = encoded([PROMPT], tokenizer, model, 500)
    assert ids.shape[1] <= 12
    with pytest.raises(PromptError, match=r"prompt 2 has 5\d\d tokens, and with --tokens 12"):
        encoded([PROMPT, "x = 1\n" * 128], tokenizer, model, 12)
    if not tokenizer.start:
        with pytest.raises(PromptError, match="prompt 1 is empty"):
            encoded([""], tokenizer, model, 12)


def test_a_token_of_the_1b_is_counted() -> None:
    """16 layers of four groups; values as the shapes have them, 3 + 2 bytes under `exact`."""
    up, down = 16 * (3 * 2048 + 8192), 16 * (3072 + 2048 + 2 * 8192 + 2048)
    found = token_bytes("exact")
    assert (found["linears"], found["up"], found["down"]) == (64, 3 * up, 2 * down)
    assert found["total"] == found["up"] + found["down"] + found["frames"] < 1.6e6
    assert token_bytes("thin")["total"] < found["total"]
