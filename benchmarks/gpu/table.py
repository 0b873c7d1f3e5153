"""What was measured, set against what was asked for."""

from __future__ import annotations

from benchmarks.gpu.task import Figures

Row = tuple[str, str, str, str]


def rows(f: Figures) -> list[Row]:
    """(measure, bar, aim, got) of every part that ran."""
    return [*_correctness(f), *_worker(f), *_owner(f), *_whole(f)]


def _correctness(f: Figures) -> list[Row]:
    table = []
    if "suite" in f:
        table.append(("device tests", "passes", "", f["suite"]["summary"]))
    if "identical" in f:
        found = f["identical"]
        same = found["compared"] - len(found["different"])
        table.append(
            ("worker results, GPU vs CPU", "bit-identical", "", f"{same} of {found['compared']}")
        )
    return table


def _worker(f: Figures) -> list[Row]:
    table = []
    if "ceiling" in f:
        name = f"int8 ceiling: {f['ceiling']['instruction']} alone"
        table.append((name, "report", "", f"{f['ceiling']['int8_ops_per_s'] / 1e12:,.0f} TOP/s"))
    for layer in f.get("layers", []):
        name = f"{layer['in']} -> {layer['out']}, {layer['tokens']} tokens"
        part = layer.get("of_int8_ceiling")
        ratio = f"{layer['he_over_bf16']:.2f}"
        table.append((f"HE linear / clear bf16, {name}", "<= 2.2", "<= 1.6", ratio))
        share = "no ceiling" if part is None else f"{part:.0%}"
        table.append((f"of the int8 ceiling, {name}", ">= 55%", ">= 80%", share))
    if "throughput" in f:
        rate = f"{f['throughput']['tokens_per_s']:,.0f}"
        bar, aim = ">= 30,000 tokens/s", ">= 60,000"
        table.append(("worker, all linears of a step", bar, aim, rate))
    return table


def _owner(f: Figures) -> list[Row]:
    table = []
    if "owner" in f:
        last = f["owner"][-1]
        ring, checked = (f"{last[f'{name}_us_per_token']:.1f} us" for name in ("ring", "checked"))
        table.append(("owner's ring work per token", "<= 40 us", "<= 15 us", ring))
        table.append(("the same with the check of answers", "report", "", checked))
    if "preparing" in f:
        seconds = f"{f['preparing']['seconds']:.1f} s"
        table.append(("hints + quantisation", "<= 20 s", "<= 5 s", seconds))
    return table


def _whole(f: Figures) -> list[Row]:
    table = []
    if "step" in f:
        ratio = f"{f['step']['private_over_clear']:.2f}"
        table.append(("private step / clear bf16 step", "<= 6", "<= 3", ratio))
    if "peer" in f:
        ours = [x for x in f.get("layers", []) if (x["in"], x["out"]) == (2048, 2048)]
        theirs = f["peer"].get("seconds_per_token")
        got = f["peer"].get("skipped", "")
        if theirs and ours:
            got = f"{theirs / (ours[0]['fused_ms'] / 1e3 / ours[0]['tokens']):,.0f} times"
        name = "published peer's time per token / ours, 2048 -> 2048"
        table.append((name, "report", ">= 10,000", got))
    return table


def print_table(f: Figures) -> None:
    """All rows, then what was left out, warned of and failed."""
    print(f"\n{f['gpu']}")
    for measure, bar, aim, got in rows(f):
        print(f"{measure:<52} {bar:>20} {aim:>12} {got:>16}")
    for name, error in f["left_out"].items():
        print(f"\ntiling {name} was left out:\n{error}")
    for name, said in f["warnings"].items():
        print(f"\n{name} warned:", *said, sep="\n")
    for name, error in f["failed"].items():
        partial = ", its figures above are partial" if name in f else ""
        print(f"\n{name} failed{partial}:\n{error}")


def all_well(f: Figures) -> bool:
    """Whether nothing failed, and nothing computed was wrong."""
    right = f.get("suite", {}).get("passed", True) and not f.get("identical", {}).get("different")
    return right and not f["failed"]
