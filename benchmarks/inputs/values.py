"""What people type, and what of it can never be right, whatever the command makes of it.

The second is written down here, apart from the code that is tried: an option that takes what it
must not is found by this list and by nothing that it shares with the option.
"""

from __future__ import annotations

NUMBERS = ("1", "2", "3", "4", "8", "16", "64", "256", "512", "1000", "4096", "100000", "1e-3")
NO_NUMBERS = (
    "nan", "NaN", "inf", "-inf", "infinity", "-1", "-0.5", "1e400", "-1e400", "", " ", "abc",
    "1,5",
    "0x10", "1e", "1e+", "--", "-", "1 2", "1;2", "½", "²", "٣", "１２", "None", "null", "true",
    "1/2",
    "9" * 400, "9" * 5000, "1" + "0" * 18 + "x", "18446744073709551616" * 2, "+-1", "1e999999999",
    "\udcff", "$SEED", "1\n2",
)  # fmt: skip
"""No option that takes a number can make sense of any of these."""
ZERO_IS_FINE = (
    "--seed", "--first", "--count", "--chaos-seeds", "--drain-s", "--seconds", "--patience",
    "--sample-tokens", "--price-gpu-hour", "--price-gb", "--price-mbps-month",
)  # fmt: skip
WORDS = (
    "exact", "remote", "default", "", " ", "x" * 300, "ünïcode", "\udcff\udcfe", "a\nb", "-",
    "None",
    "../..", "cubic", "{pool}", "%s%n", "{0}", "$HOME", "~", "a" * 100_000,
)  # fmt: skip

RATES = ("100Mb/s", "1Gb/s", "25Gb/s", "0.5Mb/s", "1kb/s", "100 Mb/s")
TIMES = ("20ms", "0ms", "1us", "1s", "0.3s")
SHARES = ("0", "0.1%", "0.02", "1e-9", "0.9")
NO_QUANTITIES = (
    "nan", "inf", "nanGb/s", "infGb/s", "1e400Gb/s", "1e400ms", "-5Mb/s", "-1ms", "100MB/s",
    "100Gib/s",
    "10 parsecs", "", "ms", "Gb/s", "nan%", "150%", "-1%", "1e300Tb/s", "1e300s", "1e-300kb/s",
    "½Gb/s",
    "1Gb/s,nan", "1..", "..", "1..2..3", "." * 3000, "9" * 5000, "1Gb/s..2Gb/s", "a..b x5", "true",
)  # fmt: skip
"""No knob of the simulator has any of these as its one value."""
COUNTS = ("1", "2", "4", "3")
NO_COUNTS = ("0", "-1", "1.5", "nan", "1e3", "", "٣", "9" * 30, "1000000000", "inf", "1_0", "two")
SWEEPS = (
    "lanes=1,2", "lanes=1..3", "bandwidth=100Mb/s,1Gb/s", "rtt=1ms..100ms x3", "loss=0,0.9",
    "gpu=l4,h200", "owners=1,2", "tokens=64,128", "placement=spread,one", "head=local,remote",
    "jitter=0ms,5ms", "model=gpt2", "connection=stream,parallel", "sites=1", "steps=1",
    "site-bandwidth=1Gb/s", "sequence=64",
)  # fmt: skip
NO_SWEEPS = (
    "", "lanes", "lanes=", "=1", "lane=1", "lanes=0", "lanes=nan", "lanes=1..1000000000",
    "lanes=1..9 x99999999999", "bandwidth=1e400Gb/s", "bandwidth=nan", "bandwidth=-1Mb/s",
    "loss=nan",
    "loss=2", "rtt=1e400s", "rtt=inf", "jitter=-1ms", "gpu=b100", "gpu=", "gpu=nowhere.json",
    "model=llama-9", "placement=halves", "sites=3", "workers=99999999", "owners=99999999",
    "steps=99999999", "tokens=٣", "x" * 5000, "lanes=" + "1," * 20_000, "rtt=0ms..1s x3",
    "bandwidth=" + "." * 5000, "head=both", "connection=\udcff",
)  # fmt: skip
SHAPES = ("64x64", "128x32")
NO_SHAPES = (
    "64",
    "x",
    "64x",
    "0x64",
    "-1x2",
    "64x64x64",
    "nanx2",
    "٣x٣",
    "9" * 30 + "x1",
    "131072x131072",
)
ADDRESSES = ("localhost:7443", "127.0.0.1:1", "[::1]:7443")
NO_ADDRESSES = (
    "", ":", "nowhere", "host:", ":7443x", "localhost:0x1", "localhost:65536", "localhost:-1",
    "::1:7443",
    "a..b:7443", "x" * 70 + ":7443", "exa mple:7443", "localhost:٣", "host:" + "9" * 400,
    "\udcff:1",
    "host\n:7443", "https://host:7443",
)  # fmt: skip
HOSTS = ("gpu.example", "203.0.113.7", "::1", "a" * 63)
NO_HOSTS = ("", "a..b", "-x", "a b", "x" * 64, "host:1", "ü", "\udcff", "a\n", "*" * 300)

FOREIGN: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...]] = {
    "scenarios.llama1b": (
        ((), ("--real-cpu", "--real-gpu"), (
            "--data", "--weights", "--compare-clear", "--fresh", "--kernel", "--worker", "--tls",
            "--rank", "--learning-rate", "--host-frames", "--cache", "--owner-tag", "--preset",
            "--trace", "--checkpoint-every",
        )),
        (("--real-cpu",), (), (
            "--gpu", "--network", "--bandwidth", "--rtt", "--loss", "--jitter", "--workers",
            "--owners", "--owner-device", "--model", "--host-frames",
        )),
        (("--real-gpu",), (), (
            "--gpu", "--network", "--bandwidth", "--rtt", "--loss", "--jitter", "--workers",
            "--owners", "--owner-device", "--model", "--kernel",
        )),
        (("--real-cpu", "--compare-clear"), (), ("--fresh", "--checkpoint-every")),
        ((), ("--worker",), ("--tls",)),
    ),
    "scenarios.quickstart": (((), ("--worker",), ("--tls",)),),
    "scenarios.generate": (((), ("--worker",), ("--tls",)),),
    "scenarios.endpoint": (((), ("--worker",), ("--tls",)),),
    "scenarios.finetune": (
        ((), ("--worker",), ("--tls",)),
        (("--train-on-all",), (), ("--held-out", "--evaluate-every", "--evaluate-on")),
    ),
    "scenarios.prepare": ((("--weights",), (), ("--seed",)),),
    "scenarios.certs": ((("--check",), (), ("--out", "--days", "--owner", "--authority")),),
    "scenarios.worker": ((("--backend=cuda",), (), ("--kernel",)),),
    "scenarios.crashes.owner": ((("--prepare",), (), ("--worker", "--tls", "--steps", "--out")),),
    "scenarios.chaos --processes": ((("--quickstart",), (), ("--kills",)),),
    "scenarios.chaos": (
        (("--planted",), (), ("--seed", "--first", "--trace", "--count", "--chaos-seeds")),
        (("--mutants",), (), ("--only", "--trace", "--first", "--seeds")),
        ((), ("--mutants", "--planted"), ("--count", "--chaos-seeds", "--only")),
        ((), ("--seed",), ("--trace", "--trace-hash")),
    ),
    "benchmarks.fidelity": (
        (("--network",), (), ("--minutes",)),
        ((), ("--network",), ("--rounds", "--seconds", "--patience", "--congestion", "--profile")),
    ),
    "benchmarks.transport": ((("--llama1b",), (), ("--seconds", "--rounds", "--grpc")),),
}  # fmt: skip
"""Of a command: (when all of these are given, and none of these, any of these is out of place)."""
