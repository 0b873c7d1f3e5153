"""The endpoint: the model that is served, and what serves it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from backends.door import Public, connect, prepare, remote
from backends.nn.base import open_base
from backends.nn.sane import positions
from backends.nn.tokenizer import Tokenizer
from backends.options import RANK, TOKENS
from scenarios.endpoint.address import EndpointError
from scenarios.endpoint.learner import Learner
from scenarios.endpoint.requests import Limits
from scenarios.endpoint.sampler import Sampler
from scenarios.endpoint.server import Server, api_key, serving
from scenarios.endpoint.service import About, Service
from scenarios.endpoint.states import States
from scenarios.generate.run import stops_of
from scenarios.session import (
    chosen_workers,
    open_ledger,
)


@contextmanager
def endpoint(
    model: PreTrainedModel, public: Public, tokenizer: Tokenizer, args: argparse.Namespace
) -> Iterator[tuple[Server, Service]]:
    """Within the `with` it answers; `Service.queue.work` computes, in the thread that calls it.

    model  as `remote` gave it
    """
    limits = _limits(model, public, args)
    about = About(args.name, args.tokenizer, str(model.config.model_type), args.clients, limits)
    key = api_key(args.api_key_file)
    open_ledger(args.out, args.out / "checkpoints", chosen_workers(args))
    ledger = args.out / "retired-workers.json"
    with connect(model, args.worker, args.tls, ledger=ledger) as session:
        learner = Learner(model, args.sequence, args.batch)
        sampler = Sampler(learner, sorted(stops_of(model, tokenizer)), tokenizer.decode)
        states = States(args.out / "states", public.identity, limits.rank, session)
        service = Service(about, learner, sampler, states, session.require_untainted)
        server = Server(args.listen, service, key)
        with serving(server):
            yield server, service


def _limits(model: PreTrainedModel, public: Public, args: argparse.Namespace) -> Limits:
    """Raises EndpointError for sequences that are too long for the model, or for a worker."""
    known = positions(model)
    context = min(TOKENS.most, known[0]) if known else TOKENS.most
    if args.sequence > context:
        raise EndpointError(f"this model takes {context} tokens; give --sequence {context} or less")
    if args.sequence * args.batch > TOKENS.most:
        raise EndpointError(
            f"--sequence times --batch is {args.sequence * args.batch}, and a worker takes "
            f"{TOKENS.most} tokens at once; give less of either"
        )
    words: Any = model.get_input_embeddings()
    rank = max(min(g.in_features, out) for g in public.prepared.groups for out in g.out_features)
    return Limits(words.num_embeddings, args.sequence, context, min(rank, RANK.most))


def prepared(args: argparse.Namespace) -> tuple[PreTrainedModel, Public, Tokenizer]:
    """The model that is served, prepared, and its tokenizer; says what it does."""
    base = open_base(args.weights)
    print(f"weights: {base.describe()}")
    tokenizer = base.tokenizer()
    with tqdm(total=1.0, desc="prepare", dynamic_ncols=True, leave=False) as bar:

        def progress(label: str, share: float) -> None:
            bar.set_postfix_str(label[-48:], refresh=False)
            bar.update(share - bar.n)

        public = prepare(
            args.weights, args.preset, args.cache, owner_tag=args.owner_tag,
            least_remote=args.least_remote, progress=progress,
        )  # fmt: skip
    print(f"prepared model: {public.directory}")
    return remote(args.weights, public), public, tokenizer
