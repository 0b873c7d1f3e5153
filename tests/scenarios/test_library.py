"""`import private_lora`: the script that docs/library.md shows, in process and over TLS."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import private_lora as pl
from backends.nn.local import localise
from backends.nn.skeleton import build_skeleton
from backends.nn.sources import HeldBase
from scenarios.certs import Authority
from tests.nn.conftest import LLAMA, tokens


class Texts(Dataset):
    """A few sequences, as transformers' trainer takes them."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def theirs() -> PreTrainedModel:
    """A model that a user holds."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(LLAMA))


def adapted(model: PreTrainedModel) -> PeftModel:
    """With adapters as peft makes them."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def trained(model: PeftModel, place: Path) -> dict[str, torch.Tensor]:
    """What transformers' own trainer makes of the adapters."""
    arguments = TrainingArguments(
        output_dir=str(place), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Texts(tokens(8, 12))).train()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> pl.Public:
    """Prepared once; the model that it was prepared from is as it was."""
    model = theirs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shares: list[float] = []
    found = pl.prepare(
        model, cache=tmp_path_factory.mktemp("cache"),
        progress=lambda label, share: shares.append(share),
    )  # fmt: skip
    assert shares[-1] == pytest.approx(1.0)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in model.parameters())
    assert model.train().training
    return found


@pytest.fixture(scope="module")
def in_clear(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The same training of the same model, as everybody does it."""
    return trained(adapted(theirs()), tmp_path_factory.mktemp("clear"))


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of all adapters together, relative."""
    assert found.keys() == wanted.keys()
    error = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return float((error / sum(w.square().sum() for w in wanted.values())).sqrt())


def test_transformers_own_trainer_trains_privately(
    public: pl.Public, in_clear: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Workers in this process; int8 weights and the cipher's noise are all that differs."""
    model = adapted(pl.remote(theirs(), public))
    with pl.connect(model) as session:
        found = trained(model, tmp_path)
        used = session.usage()
    assert used.bytes_up > 0
    assert used.blocks > 0
    assert distance(found, in_clear) < 0.1
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(theirs(), str(tmp_path / "adapter"))
    ids = tokens(1, 8)
    with torch.no_grad(), pl.connect(model):
        private = model(input_ids=ids).logits
    clear = loaded.eval()(input_ids=ids).logits
    assert torch.linalg.norm(private - clear) < 0.05 * torch.linalg.norm(clear)


def test_a_session_has_learnt_nothing_when_it_begins(public: pl.Public) -> None:
    """Of the products that it begins with, to compile kernels or to look at the line, no scale."""
    model = adapted(pl.remote(theirs(), public))
    with pl.connect(model) as session:
        found = session._session.exactness()
        assert found is not None
        assert found.where == "nothing yet"
        with torch.no_grad():
            model(input_ids=tokens(1, 8))
        found = session._session.exactness()
        assert found is not None
        assert 0 < found.median < 0.3


def test_what_does_not_change_is_sent_once(public: pl.Public) -> None:
    """With an adapter in the upper layer, the second epoch sends nothing of the lower one."""
    torch.manual_seed(0)
    leaves = sorted({name.rpartition(".")[2] for g in public.prepared.groups for name in g.members})
    upper = LoraConfig(r=4, target_modules=leaves, layers_to_transform=[1])
    model = get_peft_model(pl.remote(theirs(), public), upper)
    config = pl.TrainConfig(steps=4, batch=4, micro_batch=2, learning_rate=1e-2)
    sent: list[int] = []
    with pl.connect(model, keep_activations=1 << 20, lanes=2) as session:

        def count(step: int, loss: float) -> None:
            sent.append(session.usage().bytes_up)

        before = session.usage().bytes_up
        session.trainer(tokens(8, 12), config).train(count)
        assert session.kept is not None
        assert (session.kept.sequences, session.kept.passes) == (8, 4)
    first, second = sent[1] - before, sent[3] - sent[1]
    lower, upper_forward = 4, 4
    upper_backward = 3  # the input of its first products needs no gradient
    assert second / first == pytest.approx(
        (upper_forward + upper_backward) / (lower + upper_forward + upper_backward), abs=0.1
    )
    with pl.connect(model) as session:
        assert session.kept is None


@pytest.mark.parametrize("preset", ["thin", "exact"])
def test_transformers_own_generate_completes_privately(preset: str, tmp_path: Path) -> None:
    """Each token is one that the same int8 base would choose, or nearly."""
    public = pl.prepare(theirs(), preset=preset, cache=tmp_path)
    model = pl.remote(theirs(), public)
    ids = tokens(2, 6)
    with pl.connect(model) as session:
        before = session.usage().blocks
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            min_new_tokens=8, max_new_tokens=8, pad_token_id=0,
        )  # fmt: skip
        passes = (session.usage().blocks - before) / len(public.prepared.groups)
    assert passes == 8
    assert torch.equal(found[:, :6], ids)
    skeleton = build_skeleton(HeldBase(theirs()))
    localise(skeleton, public.prepared)
    with torch.no_grad():
        logits = skeleton.model(input_ids=found).logits[:, 5:-1]
    logits[..., 0] = -torch.inf  # the end, which min_new_tokens forbids
    chosen = logits.gather(-1, found[:, 6:, None])[..., 0]
    spread = logits[..., 1:].std()
    assert (logits.amax(-1) - chosen).max() < (0.02 if preset == "exact" else 0.3) * spread


def test_a_worker_process_over_tls(
    public: pl.Public, in_clear: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """`pl.serve` on the other side, which loads nothing of what owners have."""
    authority = Authority()
    authority.issue(tmp_path / "owner")
    authority.issue(tmp_path / "worker", ["localhost"])
    script = f"""
import sys, private_lora as pl
pl.serve({str(public.directory)!r}, "localhost:0", {str(tmp_path / "worker")!r},
         on_ready=lambda service: print(service.port, "torch" in sys.modules, flush=True))
"""
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        port, torch_there = worker.stdout.readline().split()
        assert torch_there == "False"
        model = adapted(pl.remote(theirs(), public))
        with pl.connect(model, [f"localhost:{port}"], tmp_path / "owner", lanes=2) as session:
            config = pl.TrainConfig(steps=2, batch=2, micro_batch=1, learning_rate=1e-2)
            losses = session.trainer(tokens(8, 12), config, tmp_path / "checkpoints").train()
        assert len(losses) == 2
        assert (tmp_path / "checkpoints" / "step-000002" / "adapter_model.safetensors").exists()
    finally:
        worker.terminate()
        worker.wait(20)


def test_serving_ends_when_it_is_told_to(public: pl.Public) -> None:
    """In a thread of one's own program, too."""
    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=pl.serve, args=(public.directory, "localhost:0"),
        kwargs={"on_ready": lambda service: ready.set(), "stop": stop},
    )  # fmt: skip
    thread.start()
    assert ready.wait(20)
    stop.set()
    thread.join(20)
    assert not thread.is_alive()


def test_what_does_not_belong_together_is_refused(public: pl.Public, tmp_path: Path) -> None:
    """Each in one line, before anything is sent."""
    other = theirs()
    other.model.norm.weight.data[0] += 1
    with pytest.raises(pl.Error, match="prepared for other weights"):
        pl.remote(other, public)
    with pytest.raises(pl.Error, match="no remote linears"), pl.connect(theirs()):
        pass
    model = pl.remote(theirs(), public)
    with pytest.raises(pl.Error, match="remote already"):
        pl.prepare(model, cache=tmp_path)
    with pytest.raises(pl.Error, match="TLS"), pl.connect(model, ["gpu.example:7443"]):
        pass
    dropping = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
    with pytest.raises(pl.Error, match="lora_dropout at 0"), pl.connect(dropping):
        pass


def test_the_weights_are_given_up(public: pl.Public) -> None:
    """Whoever made a model remote has the memory of its linears back."""
    model = theirs()
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    kept = model.get_input_embeddings().weight
    made = pl.remote(model, public)
    gc.collect()
    assert weight() is None
    assert made.get_input_embeddings().weight is kept


def test_a_checkpoint_is_made_remote_without_its_weights(public: pl.Public, tmp_path: Path) -> None:
    """And needs no second preparation."""
    model = theirs()
    model.save_pretrained(tmp_path / "model")
    held = sum(p.numel() for p in model.parameters())
    found = pl.prepare(tmp_path / "model", cache=tmp_path / "cache")
    again = pl.prepare(tmp_path / "model", cache=tmp_path / "cache")
    assert again.prepared.model_digest == found.prepared.model_digest
    made = pl.remote(tmp_path / "model", found)
    assert sum(p.numel() for p in made.parameters()) < held / 2
    with pl.connect(made), torch.no_grad():
        made(input_ids=tokens(1, 4))


def test_the_door_has_what_it_names() -> None:
    """And nothing is loaded for a look at it."""
    for name in pl.__all__:
        assert getattr(pl, name) is not None
    with pytest.raises(AttributeError):
        pl.nothing  # noqa: B018
    code = "import sys, private_lora; print('torch' in sys.modules)"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "False"


def test_the_page_names_what_there_is() -> None:
    """docs/library.md calls nothing else."""
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
    names = set(re.findall(r"\bpl\.(\w+)", page))
    assert len(names) > 5
    assert names <= set(pl.__all__)
