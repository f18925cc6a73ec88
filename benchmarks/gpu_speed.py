#!/usr/bin/env python3
"""Times SparseK attention on a GPU against dense causal attention and FlexAttention, in the same run.

Inputs are bfloat16, N(0, 1), scores N(0, 4^2), causal, batch 1. Sparse forward is the whole call, from scores to
output; backward gives the gradients of query, key, value and scores, the peers' those of query, key and value. Dense is
the fastest of cuDNN, FlashAttention-2 (both through PyTorch) and FlashAttention-4 that runs there, forward and backward
each.

Pair efficiency (eta) is the time of a dense pair of query and key over that of a selected pair. Parts:

  main     speed at every length, head dimension 128, FlexAttention with the same pattern at a few
  narrow   the same at head dimension 64
  grouped  a quarter as many key/value heads
  rising   scores that rise along the sequence, so that every new key enters
  growth   time per token, short against long, sparse alone
  memory   what a call takes beyond its inputs and outputs, at its peak

Writes everything measured as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gpu_common as common
import torch
from gpu_common import Case, attempt, number, size_name, size_of, verdict

PARTS = ("main", "narrow", "grouped", "rising", "growth", "memory")
TOLERANCE = 0.02  # of an output in bfloat16, relative to the largest
QUICK = {
    "parts": ["main", "growth", "memory"],
    "lengths": [2048, 8192, 32768],
    "flex": [],
    "growth": [16384, 65536],
    "memory": [32768],
    "limit_ms": 300.0,
}


# ------------------------------------------------------------------------------------------------------------- measure


def compare(args: argparse.Namespace, label: str, length: int, *, flex: bool = False, **options) -> dict:
    """Sparse and dense at one length: times, pairs and what follows from them."""
    common.release(args.device)
    problem = {"heads": args.heads, "width": args.width, "k": args.k} | options
    case, error = attempt(Case, args.device, length=length, **problem)
    result = {"label": f"{label} {size_name(length)}", "part": label, "length": length}
    if case is None:
        return result | {"error": error}
    result |= case.describe()
    calls = {f"sparse {name}": call for name, call in common.sparse_calls(case).items()}
    errors = {}
    for peer in (*args.peers, *["flex"] * flex):
        made, error = attempt(common.flex_calls, case) if peer == "flex" else attempt(common.dense_calls, peer, case)
        for name in ("forward", "backward"):
            if made is None:
                errors[f"{peer} {name}"] = {"error": error}
            else:
                calls[f"{peer} {name}"] = made[name]
    times = common.measure(calls, args.device, len(case.copies), label=result["label"], limit_ms=args.limit_ms) | errors
    result["times"] = times
    result["pairs"], _ = attempt(case.pairs)
    result["largest_error"], _ = attempt(case.largest_error)
    for name in ("forward", "backward"):
        result[name] = advantage(result, name)
    return result


def advantage(result: dict, name: str) -> dict:
    """Speedup over the fastest dense peer and pair efficiency, where both sides were measured."""
    dense = {peer: milliseconds(result, f"{peer} {name}") for peer in common.DENSE}
    dense = {peer: ms for peer, ms in dense.items() if ms is not None}
    sparse = milliseconds(result, f"sparse {name}")
    if not dense or sparse is None:
        return {}
    fastest = min(dense, key=dense.__getitem__)
    speedup = dense[fastest] / sparse
    fewer = result["pairs"]["dense"] / result["pairs"]["sparse"]
    return {"fastest": fastest, "dense_ms": dense[fastest], "speedup": speedup, "pair_efficiency": speedup / fewer}


def milliseconds(result: dict, name: str) -> float | None:
    return result.get("times", {}).get(name, {}).get("ms")


def both(result: dict, side: str) -> float | None:
    """Forward and backward together."""
    if side == "dense":
        parts = [result.get(name, {}).get("dense_ms") for name in ("forward", "backward")]
    else:
        parts = [milliseconds(result, f"{side} {name}") for name in ("forward", "backward")]
    return None if None in parts else sum(parts)


def grow(args: argparse.Namespace) -> list[dict]:
    """Time per token of sparse at each length, all with as many heads as the longest has room for."""
    heads = heads_that_fit(args, max(args.growth))
    results = []
    for length in args.growth:
        common.release(args.device)
        result = {"label": f"growth {size_name(length)}", "length": length, "heads": heads}
        case, error = attempt(Case, args.device, length=length, heads=heads, width=args.width, k=args.k)
        if case is None:
            results.append(result | {"error": error})
            continue
        calls = {f"sparse {name}": call for name, call in common.sparse_calls(case).items()}
        result["times"] = common.measure(
            calls, args.device, len(case.copies), label=result["label"], limit_ms=args.limit_ms
        )
        results.append(result)
    return results


def heads_that_fit(args: argparse.Namespace, length: int) -> int:
    """All heads, or 4 where ten tensors of the size of query would not fit."""
    if args.device.type == "cuda":
        total = torch.cuda.get_device_properties(args.device).total_memory
        if 10 * 2 * length * args.heads * args.width > total:
            return 4
    return args.heads


def measure_memory(args: argparse.Namespace, length: int) -> list[dict]:
    """Peak bytes beyond inputs and outputs, of forward alone and of forward and backward; what backward needs kept."""
    heads = heads_that_fit(args, length)
    results = []
    for name, call in (("forward", forward_alone), ("training", training)):
        common.release(args.device)
        result = {"label": f"memory {size_name(length)} {name}", "call": name, "length": length, "heads": heads}
        case, error = attempt(Case, args.device, length=length, heads=heads, width=args.width, k=args.k)
        if case is not None:
            figures, error = attempt(call, case)
        results.append(result | ({"error": error} if error else figures))
        case = None
    return results


def forward_alone(case: Case) -> dict[str, int]:
    call = common.sparse_calls(case)["forward"]
    call(0)  # what the first call alone makes is no memory of the call
    before = start_peak(case)
    out = call(0)
    return figures_of(case, before, (out,))


def training(case: Case) -> dict[str, int]:
    def run() -> tuple[int, tuple[torch.Tensor, ...]]:
        leaves = [x.detach().requires_grad_() for x in case.copies[0]]
        out = common.sparsek_attention(*leaves, case.k, causal=case.causal)
        held = torch.cuda.memory_allocated(case.device) - size_of((out,))
        return held, (out.detach(), *torch.autograd.grad(out, leaves, case.grad_out))

    run()
    before = start_peak(case)
    held, outputs = run()
    return figures_of(case, before, outputs) | {"kept": held - before}


def start_peak(case: Case) -> int:
    torch.cuda.synchronize(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    return torch.cuda.memory_allocated(case.device)


def figures_of(case: Case, before: int, outputs: tuple[torch.Tensor, ...]) -> dict[str, int]:
    torch.cuda.synchronize(case.device)
    peak = torch.cuda.max_memory_allocated(case.device)
    inputs = case.copies[0]
    return {"beyond": peak - before - size_of(outputs), "inputs": size_of(inputs), "key_value": size_of(inputs[1:3])}


# -------------------------------------------------------------------------------------------------------------- report


def report_speed(results: list[dict], name: str, peers: list[str]) -> str:
    head = ["case", "pairs/query", "select ms", f"sparse {name} ms"] + [f"{peer} ms" for peer in peers]
    rows = [[*head, "speedup", "eta", "rel. error"]]
    for result in results:
        per_query = None
        if result.get("pairs"):
            per_query = result["pairs"]["sparse"] / (result["length"] * result["heads"])
        row = [result["label"], number(per_query, 4), number(milliseconds(result, "sparse select"))]
        row += [number(milliseconds(result, f"{side} {name}")) for side in ("sparse", *peers)]
        row += [number(result.get(name, {}).get(figure)) for figure in ("speedup", "pair_efficiency")]
        wrong = result.get("largest_error")
        row.append("WRONG" if wrong is not None and not wrong < TOLERANCE else number(wrong, 2))
        rows.append(row)
    return common.table(rows)


def report_both(results: list[dict]) -> str:
    rows = [["case", "sparse fwd+bwd ms", "fastest dense ms", "speedup", "faster than dense"]]
    for result in results:
        sparse, dense = both(result, "sparse"), both(result, "dense")
        known = sparse is not None and dense is not None
        speedup = dense / sparse if known else None
        faster = ("yes" if speedup > 1 else "no") if known else "-"
        rows.append([result["label"], number(sparse), number(dense), number(speedup), faster])
    return common.table(rows)


def report_growth(results: list[dict]) -> str:
    rows = [["tokens", "heads", "select ms", "forward ms", "ns/token/head", "backward ms", "ns/token/head"]]
    for result in results:
        row = [size_name(result["length"]), str(result["heads"]), number(milliseconds(result, "sparse select"))]
        for name in ("forward", "backward"):
            ms = milliseconds(result, f"sparse {name}")
            row += [number(ms), number(ms and ms * 1e6 / result["length"] / result["heads"])]
        rows.append(row)
    return common.table(rows)


def report_memory(results: list[dict]) -> str:
    rows = [["call", "tokens", "heads", "beyond MiB", "bytes/token/head", "of key and value", "kept bytes/token/head"]]
    for result in results:
        row = [result["call"], size_name(result["length"]), str(result["heads"])]
        if "error" in result:
            row += ["-", "-", "-", "-"]
        else:
            tokens = result["length"] * result["heads"]
            row += [number(result["beyond"] / 2**20, 5), number(result["beyond"] / tokens)]
            row.append(number(result["beyond"] / result["key_value"]))
            row.append(number(result["kept"] / tokens if "kept" in result else None))
        rows.append(row)
    return common.table(rows)


def judge(results: list[dict], growth: list[dict], memory: list[dict]) -> list[dict]:
    """The figures that have targets, which are meant for the default options."""

    def figure(part: str, length: int, name: str, what: str) -> float | None:
        found = [r for r in results if r["part"] == part and r["length"] == length]
        return found[0].get(name, {}).get(what) if found else None

    eta = "pair_efficiency"
    verdicts = [
        verdict("eta forward, 32K", figure("main", 32768, "forward", eta), 0.50, 0.80),
        verdict("eta backward, 32K", figure("main", 32768, "backward", eta), 0.45, 0.75),
    ]
    for length, least, aim in ((8192, 1.6, 3), (32768, 6.4, 10), (131072, 22, 40)):
        value = figure("main", length, "forward", "speedup")
        verdicts.append(verdict(f"forward speedup over the fastest dense, {size_name(length)}", value, least, aim))
    verdicts.append(crossover(results))
    verdicts.append(verdict("K=64: eta forward, 32K", figure("narrow", 32768, "forward", eta), 0.45, 0.75))
    verdicts.append(verdict("K=64: eta backward, 32K", figure("narrow", 32768, "backward", eta), 0.40, 0.70))
    verdicts.append(verdict("grouped heads: eta forward, 32K", figure("grouped", 32768, "forward", eta), 0.60, 0.90))
    per_token = {r["length"]: milliseconds(r, "sparse forward") for r in growth}
    short, long = per_token.get(65536), per_token.get(1 << 20)
    value = long / 16 / short if short and long else None
    verdicts.append(verdict("time per token at 1M over that at 64K, forward", value, 1.3, 1.1, False))
    verdicts.append(verdict("scores rising: eta forward, 32K", figure("rising", 32768, "forward", eta), 0.40, 0.70))
    for result in memory:
        if "error" not in result and result["call"] == "forward":
            value = result["beyond"] / result["key_value"]
            what = f"forward memory beyond inputs and outputs / key and value, {size_name(result['length'])}"
            verdicts.append(verdict(what, value, 0.5, 0.5, False))
        elif "error" not in result:
            value = result["kept"] / result["length"] / result["heads"]
            what = f"kept for backward, bytes per token and key/value head, {size_name(result['length'])}"
            verdicts.append(verdict(what, value, 64, 64, False))
    return verdicts


def crossover(results: list[dict]) -> dict:
    """The shortest length measured at which forward plus backward is faster than dense."""
    times = {r["length"]: (both(r, "sparse"), both(r, "dense")) for r in results if r["part"] == "main"}
    known = {length: pair for length, pair in times.items() if None not in pair}
    shortest = min((length for length, (sparse, dense) in known.items() if sparse < dense), default=None)
    result = verdict("crossover of forward plus backward, tokens", shortest, 8192, 2048, False)
    if known and shortest is None:
        result["met"] = "no"
    return result


def plot(results: list[dict], facts: dict, peers: list[str], path: Path) -> None:
    """Draws time against length, sparse and dense."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    colors = {"cudnn": "tab:green", "flash2": "tab:blue", "flash4": "tab:gray", "flex": "tab:purple"}
    results = [r for r in results if r["part"] == "main" and "error" not in r]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for axes, title in zip(panels, ("forward", "forward + backward")):
        for side in (*peers, "sparse"):
            values = [
                (r["length"], milliseconds(r, f"{side} forward") if title == "forward" else both(r, side))
                for r in results
            ]
            values = [point for point in values if point[1] is not None]
            if values:
                label = f"SparseK, k = {results[0]['k']}" if side == "sparse" else common.TITLES[side]
                axes.plot(*zip(*values), "o-", color=colors.get(side, "tab:orange"), label=label)
        lengths = [r["length"] for r in results]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [size_name(n) for n in lengths])
        axes.minorticks_off()
        axes.set(title=title, xlabel="tokens")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(frameon=False, loc="upper left")
    sizes = "H={heads}, K={width}, {dtype}".format(**results[0]) if results else "nothing measured"
    figure.suptitle(f"B=1, {sizes}, causal, {facts['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def options(parser: argparse.ArgumentParser) -> None:
    tokens = [2048, 4096, 8192, 16384, 32768, 65536, 131072]
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--lengths", type=int, nargs="*", default=tokens, help="tokens of main and narrow")
    parser.add_argument("--special", type=int, nargs="*", default=[8192, 32768], help="tokens of grouped and rising")
    parser.add_argument("--flex", type=int, nargs="*", default=[8192, 32768], help="tokens at which FlexAttention runs")
    parser.add_argument("--growth", type=int, nargs="*", default=[65536, 1 << 20], help="tokens of growth")
    parser.add_argument("--memory", type=int, nargs="*", default=[32768, 1 << 20], help="tokens of memory")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--groups", type=int, default=8, help="key/value heads of grouped")
    parser.add_argument("--width", type=int, default=128, help="head dimension, but for narrow")
    parser.add_argument("--k", type=int, default=1024, help="keys that each query keeps")
    parser.add_argument("--peers", nargs="*", choices=common.DENSE, default=common.DENSE, help="dense peers")
    parser.add_argument("--limit-ms", type=float, default=1500.0, help="device time per figure, about")
    parser.add_argument("--plot", type=Path, nargs="?", const=common.RESULTS / "gpu_speed.png", help="draw a picture")
    parser.add_argument(
        "--saved",
        type=Path,
        nargs="+",
        help="measure nothing: draw these runs of one machine, JSON; of several of a length the first",
    )


def main() -> None:
    args = common.arguments(__doc__, "gpu_speed", QUICK, options)
    if args.saved:
        reports = [json.loads(path.read_text()) for path in args.saved]
        found = {r["label"]: r for report in reversed(reports) for r in report["speed"]}  # the first one's, if several
        plot(
            sorted(found.values(), key=lambda r: r["length"]),
            reports[0]["facts"],
            [*args.peers, "flex"],
            args.plot or common.RESULTS / "gpu_speed.png",
        )
        return
    facts = common.environment(args) | common.rates(args.device)
    common.print_facts(facts)
    peers = [*args.peers, "flex"]
    results, growth, memory = [], [], []

    def save() -> list[dict]:
        verdicts = judge(results, growth, memory)
        common.write(
            args.json, {"facts": facts, "targets": verdicts, "speed": results, "growth": growth, "memory": memory}
        )
        return verdicts

    def add(label: str, lengths: list[int], **changes) -> None:
        found = []
        for n in lengths:
            found.append(compare(args, label, n, flex=label == "main" and n in args.flex, **changes))
            results.append(found[-1])
            save()  # a run that is cut short leaves what it has
        print(f"{label} {changes or ''}")
        tables = [report_speed(found, "forward", peers), report_speed(found, "backward", peers), report_both(found)]
        print("\n\n".join(tables), end="\n\n", flush=True)

    if "main" in args.parts:
        add("main", args.lengths)
    if "narrow" in args.parts:
        add("narrow", args.lengths, width=64)
    if "grouped" in args.parts:
        add("grouped", args.special, groups=args.groups)
    if "rising" in args.parts:
        add("rising", args.special, rising=True)
    if "growth" in args.parts and args.growth:
        growth = grow(args)
        print(report_growth(growth), end="\n\n", flush=True)
    if "memory" in args.parts and args.device.type == "cuda":
        memory = [figures for length in args.memory for figures in measure_memory(args, length)]
        print(report_memory(memory), end="\n\n", flush=True)

    verdicts = save()
    print("\n\n".join([*common.report_errors([*results, *growth, *memory]), common.report_verdicts(verdicts)]))
    if args.plot:
        plot(results, facts, peers, args.plot)


if __name__ == "__main__":
    main()
