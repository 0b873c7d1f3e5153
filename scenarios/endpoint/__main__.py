"""An endpoint on this machine that speaks Tinker's API: an unchanged recipe trains privately.

    python -m scenarios.endpoint                         # the small Llama of this repository
    python -m scenarios.endpoint --model meta-llama/Llama-3.2-1B --sequence 512
    python -m scenarios.endpoint --model DIR --name meta-llama/Llama-3.2-1B
    python -m scenarios.endpoint --model DIR_OR_HUB_ID --worker gpu.example:7443 --tls certs/owner

It prints three lines for the shell that the recipe runs in (`pip install tinker` there):

    export TINKER_BASE_URL=http://127.0.0.1:8420
    export TINKER_API_KEY=tml-...
    export NO_PROXY=127.0.0.1,localhost,::1 no_proxy=127.0.0.1,localhost,::1

and then `tinker.ServiceClient()` trains here. What the recipe sends stays in this process; every
frozen linear is computed by workers on ciphertexts, as in the other commands. Workers see how many
data each forward_backward has (rounded up to --batch) and how long samples may be; never how long a
text is: each is padded to --sequence. docs/endpoint.md says which calls are supported.

Ctrl-C ends it. What save_state and save_weights_for_sampler saved is below --out, and loads with
plain `peft` too; adapters that were not saved are lost.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from backends.defaults import LEAST_REMOTE
from backends.door import Public, connect, prepare, remote
from backends.net.owner import RemoteLinearError
from backends.nn.base import open_base
from backends.nn.sane import positions
from backends.nn.tokenizer import Tokenizer
from backends.options import RANK, SEQUENCE, TOKENS, Number, Parser, Whole, place
from backends.places import named, output_directory
from scenarios.cli import add_kernel_option, clean_exit, use_kernel
from scenarios.endpoint.learner import Learner
from scenarios.endpoint.requests import Limits
from scenarios.endpoint.sampler import Sampler
from scenarios.endpoint.server import EndpointError, Server, api_key, listen_address, serving
from scenarios.endpoint.service import About, Service
from scenarios.endpoint.states import States
from scenarios.generate import stops_of
from scenarios.options import add_preparation_options, add_worker_options, weights_text
from scenarios.quickstart import BASE
from scenarios.session import (
    chosen_workers,
    modes_with_workers,
    one_run,
    open_ledger,
)

MODES = modes_with_workers(
    (
        "--listen", "--model", "--weights", "--name", "--clients", "--sequence", "--batch",
        "--api-key-file", "--least-remote", "--preset", "--owner-tag", "--cache", "--out",
        "--worker", "--kernel",
    )
)  # fmt: skip

_NO_PROXY = ("NO_PROXY", "no_proxy")  # the second one wins where both are set
_NEAR = "127.0.0.1,localhost,::1"


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.endpoint", MODES)
    add = parser.add_argument
    add("--listen", type=_listen, default="127.0.0.1:8420", metavar="HOST:PORT",
        help="where recipes find it, on this machine only; port 0 is any free one "
        "(127.0.0.1:8420)")  # fmt: skip
    add("--model", "--weights", dest="weights", type=weights_text, default=str(BASE),
        metavar="DIR|FILE|ID",
        help="checkpoint: a directory, a GGUF file, or an id of the hub (the small Llama of this "
        "repository)")  # fmt: skip
    add("--name", metavar="TEXT",
        help="what recipes call it, as base_model (the id, or the directory's name)")  # fmt: skip
    add("--clients", type=Whole(1, 64), default=4,
        help="training clients at once, each with an adapter and its optimiser (4)")  # fmt: skip
    add(
        "--sequence",
        type=SEQUENCE,
        default=256,
        help="tokens that every datum and prompt is padded to; longer ones are refused (256)",
    )
    add("--batch", type=Whole(1, 256), default=1,
        help="data in a pass; a request is filled up to a multiple of it (1)")  # fmt: skip
    add("--api-key-file", type=place, metavar="FILE",
        help="where the key of recipes is, of mode 600; made when it is not there. Without, a new "
        "key is printed at every start")  # fmt: skip
    add("--least-remote", type=Number(0, 1), default=LEAST_REMOTE, metavar="SHARE",
        help="refuse a model of whose frozen weights workers can compute less than this "
        f"({LEAST_REMOTE:g})")  # fmt: skip
    add_preparation_options(parser)
    add("--out", type=output_directory, default="runs/endpoint",
        help="what recipes save (runs/endpoint)")  # fmt: skip
    add_worker_options(parser)
    add_kernel_option(parser)
    args = parser.parse(arguments)
    here = named(args.weights).resolve()
    usual = here.name if here.is_dir() else here.stem if here.is_file() else args.weights
    args.name = args.name or usual
    # The client loads it from a directory or the hub, and cannot from a GGUF file.
    args.tokenizer = str(here) if here.is_dir() else args.name if here.is_file() else args.weights
    return args


def _listen(text: str) -> tuple[str, int]:
    try:
        return listen_address(text)
    except EndpointError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    args = parse()
    with clean_exit(RemoteLinearError):
        use_kernel(args.kernel)
        chosen_workers(args)  # what is wrong with them is told before anything is prepared
        with one_run(args.out), endpoint(*prepared(args), args) as (server, service):
            print(f"{args.name} on {server.url}, computed on ciphertexts; for the recipe's shell:")
            print(f"  export TINKER_BASE_URL={server.url}")
            told = args.api_key_file
            key = f"$(cat {shlex.quote(str(told))})" if told else server.key.decode()
            print(f"  export TINKER_API_KEY={key}")
            print(f"  export {' '.join(f'{name}={_NEAR}' for name in _NO_PROXY)}", flush=True)
            service.queue.work()


if __name__ == "__main__":
    main()
