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
from collections.abc import Sequence

from backends.defaults import LEAST_REMOTE
from backends.options import SEQUENCE, Number, Parser, Whole, place
from backends.places import named, output_directory
from scenarios.cli import add_kernel_option, clean_exit, use_kernel
from scenarios.endpoint.address import EndpointError, listen_address
from scenarios.options import (
    TINY_LLAMA,
    add_preparation_options,
    add_worker_options,
    modes_with_workers,
    weights_text,
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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.endpoint", MODES)
    add = parser.add_argument
    add("--listen", type=_listen, default="127.0.0.1:8420", metavar="HOST:PORT",
        help="where recipes find it, on this machine only; port 0 is any free one "
        "(127.0.0.1:8420)")  # fmt: skip
    add("--model", "--weights", dest="weights", type=weights_text, default=str(TINY_LLAMA),
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
    from backends.net.owner import RemoteLinearError  # these take seconds to load
    from scenarios.endpoint.run import endpoint, prepared
    from scenarios.session import chosen_workers, one_run

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
