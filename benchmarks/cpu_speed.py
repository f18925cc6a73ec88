#!/usr/bin/env python3
"""Times SparseK attention on the CPU against PyTorch's own dense causal attention, in the same run.

Inputs are N(0, 1), scores N(0, 4^2), causal, batch 1. Sparse is the whole call through xFormers, from scores to output,
and with the gradients of query, key, value and scores; dense is ``scaled_dot_product_attention(is_causal=True)`` on
contiguous ``[B, H, M, K]`` tensors, and with the gradients of query, key and value.

Time: medians over repeats. Every repeat runs every measurement at every length once, one after the other, so that a
slow spell of the machine falls on all of them. Pair efficiency is the time of a dense pair of query and key over that
of a selected pair.

Memory: what the process holds at its peak during one call (VmHWM, reset through /proc/self/clear_refs right before),
less what it held before (VmRSS), less what the call returns. Each figure comes from a process of its own that has run
the same call on a short sequence, so that libraries and threads are there already, and has given freed memory back to
the system. It is printed as a part of the size of query, key, value and scores.

Writes everything measured as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# xFormers warns on import where its own compiled operators do not load; none of them is used here.
logging.getLogger("xformers").setLevel(logging.ERROR)

import xformers.ops as xops  # noqa: E402

import xformers_sparsek  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SHORT = 1024  # long enough to start every thread and to load every library


class Case:
    """One problem: its inputs and the calls to measure."""

    def __init__(self, length: int, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(length)
        shape = (1, length, args.heads, args.width)
        self.length, self.k, self.window = length, args.k, args.window
        dtype = getattr(torch, args.dtype)
        self.query, self.key, self.value, self.grad_out = (
            torch.randn(shape, generator=generator).to(dtype) for _ in range(4)
        )
        self.scores = torch.randn(1, length, args.heads, generator=generator) * args.spread

    def inputs(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.scores

    def sparse_forward(self) -> Tensor:
        bias = xformers_sparsek.SparseKBias(self.scores, k=self.k, window=self.window)
        with torch.no_grad():
            return xops.memory_efficient_attention(self.query, self.key, self.value, attn_bias=bias)

    def sparse_training(self) -> tuple[Tensor, ...]:
        query, key, value, scores = (x.detach().requires_grad_() for x in self.inputs())
        bias = xformers_sparsek.SparseKBias(scores, k=self.k, window=self.window)
        out = xops.memory_efficient_attention(query, key, value, attn_bias=bias)
        return out.detach(), *torch.autograd.grad(out, (query, key, value, scores), self.grad_out)

    def select(self) -> tuple[Tensor, Tensor]:
        """The first stage alone: thresholds, and where each key is dropped."""
        return torch.ops.xformers_sparsek.select(self.scores, None, None, self.length, self.k, self.window, True, False)

    def prepare_dense(self) -> None:
        """Copies the inputs to the layout that dense attention likes best; not timed."""
        self.dense_inputs = [x.transpose(1, 2).contiguous() for x in (self.query, self.key, self.value)]
        self.dense_grad_out = self.grad_out.transpose(1, 2).contiguous()

    def dense_forward(self) -> Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(*self.dense_inputs, is_causal=True)

    def dense_training(self) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in self.dense_inputs]
        out = F.scaled_dot_product_attention(*inputs, is_causal=True)
        return out.detach(), *torch.autograd.grad(out, inputs, self.dense_grad_out)

    def pairs(self) -> dict[str, int]:
        """Pairs of query and key: all that are causal, and those that are selected, the window's included."""
        heads = self.scores.shape[-1]
        _, expiry = self.select()
        # Key j is seen from query j on, up to its expiry.
        seen = expiry.long().clamp(max=self.length) - torch.arange(self.length)
        return {"dense": heads * self.length * (self.length + 1) // 2, "sparse": int(seen.clamp(min=0).sum())}


# ------------------------------------------------------------------------------------------------------------- measure


def measure_times(plan: dict[int, bool], args: argparse.Namespace) -> list[dict]:
    """Times, pairs and what follows from them, at each length; ``plan`` says where dense is measured too."""
    calls: dict[tuple[int, str], Callable] = {}
    cases = {length: Case(length, args) for length in plan}
    for length, dense in plan.items():
        names = ["select", "sparse_forward", "sparse_training"] + ["dense_forward", "dense_training"] * dense
        warm_up = Case(min(length, SHORT), args)
        for case in (warm_up, cases[length]) if dense else ():
            case.prepare_dense()
        for name in names:
            getattr(warm_up, name)()
            calls[length, name] = getattr(cases[length], name)

    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    for repeat in range(args.repeats):
        # The sparse calls first: those of different lengths are compared with each other, and dense ones take long.
        for (length, name), call in sorted(calls.items(), key=lambda item: item[0][1].startswith("dense")):
            show(f"repeat {repeat + 1}/{args.repeats}: {name} of {length} tokens")
            began = time.perf_counter()
            call()
            seconds[length, name].append(time.perf_counter() - began)
    show("")

    results = []
    for length, case in cases.items():
        own = {name: values for (other, name), values in seconds.items() if other == length}
        medians = {name: statistics.median(values) for name, values in own.items()}
        result = {"length": length, "pairs": case.pairs(), "median_seconds": medians, "seconds": own}
        if plan[length]:
            fewer = result["pairs"]["dense"] / result["pairs"]["sparse"]
            for name in ("forward", "training"):
                speedup = medians[f"dense_{name}"] / medians[f"sparse_{name}"]
                result[name] = {"speedup": speedup, "pair_efficiency": speedup / fewer}
        results.append(result)
    return results


def show(line: str) -> None:
    """Replaces what the terminal's last line says about progress; says nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{line:<60}", end="" if line else "\r", file=sys.stderr, flush=True)


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, what the process holds, or VmHWM, the most it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_growth(name: str, length: int, args: argparse.Namespace) -> dict[str, int]:
    """Bytes that one call holds at its peak beyond its inputs and outputs; to be called in a fresh process."""
    for case in (Case(min(length, SHORT), args), Case(length, args)):
        if name.startswith("dense"):
            case.prepare_dense()
        if case.length != length:
            getattr(case, name)()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the call would reuse freed memory that is still resident
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    outputs = getattr(case, name)()
    peak = resident("VmHWM")
    returned = size_of(outputs if isinstance(outputs, tuple) else (outputs,))
    return {"inputs": size_of(case.inputs()), "outputs": returned, "beyond": max(0, peak - before - returned)}


def size_of(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def measure_memory(name: str, length: int) -> dict:
    """:func:`peak_growth` in a process of its own with this one's options, or why it cannot be measured."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure-memory", name, str(length)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return {"length": length, "call": name, "error": run.stderr.strip().splitlines()[-1]}
    return {"length": length, "call": name, **json.loads(run.stdout)}


def environment(threads: int) -> dict:
    """What the figures depend on besides the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": models[0] if models else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # of the last minute: well above 0 if others are busy
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "xformers_sparsek": xformers_sparsek.__version__,
    }


# -------------------------------------------------------------------------------------------------------------- report


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first being the head, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def report_times(results: list[dict]) -> str:
    head = ["tokens", "pairs/query", "select ms", "fwd ms", "dense fwd ms", "speedup", "eta"]
    head += ["fwd+bwd ms", "dense ms", "speedup", "eta"]
    rows = [head]
    for result in results:
        medians = result["median_seconds"]
        heads = result["pairs"]["dense"] / (result["length"] * (result["length"] + 1) / 2)
        row = [str(result["length"]), f"{result['pairs']['sparse'] / (result['length'] * heads):.0f}"]
        row.append(milliseconds(medians["select"]))
        for name in ("forward", "training"):
            row.append(milliseconds(medians[f"sparse_{name}"]))
            if name in result:
                row.append(milliseconds(medians[f"dense_{name}"]))
                row += [f"{result[name]['speedup']:.2f}", f"{result[name]['pair_efficiency']:.2f}"]
            else:
                row += ["-", "-", "-"]
        rows.append(row)
    return table(rows)


def judge(results: list[dict], memory: list[dict]) -> list[dict]:
    """The figures that have a target, each with its target, which is meant for the default options."""
    verdicts = []

    def add(what: str, value: float, bound: float, at_least: bool) -> None:
        met = value >= bound if at_least else value <= bound
        verdicts.append({"what": what, "value": value, "bound": bound, "at_least": at_least, "met": met})

    for result in results:
        bound = 8 if result["length"] >= 32768 else 3
        for name, words in (("forward", "forward"), ("training", "forward + backward")):
            if name in result and result["length"] >= 8192:
                add(f"{words} at {result['length']}: speedup over dense", result[name]["speedup"], bound, True)
    per_token = {r["length"]: r for r in results if r["length"] >= 16384}
    if len(per_token) > 1:
        short, long = min(per_token), max(per_token)
        for name, words in (("sparse_forward", "forward"), ("sparse_training", "forward + backward")):
            first, last = (per_token[n]["median_seconds"][name] / n for n in (short, long))
            add(f"{words} from {short} to {long}: growth of time per token", last / first, 1.3, False)
    for item in memory:
        if item["call"] == "sparse_forward" and item["length"] >= 16384 and "error" not in item:
            what = f"forward at {item['length']}: memory beyond inputs and outputs / inputs"
            add(what, item["beyond"] / item["inputs"], 0.25, False)
    return verdicts


def report_verdicts(verdicts: list[dict]) -> str:
    rows = [["figure", "measured", "target", "met"]]
    for v in verdicts:
        target = f"{'>=' if v['at_least'] else '<='} {v['bound']:g}"
        rows.append([v["what"], f"{v['value']:.3f}", target, "yes" if v["met"] else "NO"])
    return table(rows)


def report_memory(memory: list[dict]) -> str:
    rows = [["call", "tokens", "inputs MiB", "beyond MiB", "of inputs", "bytes/token/head"]]
    for item in memory:
        row = [item["call"], str(item["length"])]
        if "error" in item:
            row += ["-", "-", "-", item["error"]]
        else:
            row += [f"{item[name] / 2**20:.1f}" for name in ("inputs", "beyond")]
            row.append(f"{item['beyond'] / item['inputs']:.3f}")
            row.append(f"{item['beyond'] / item['length'] / item['heads']:.0f}")
        rows.append(row)
    return table(rows)


def plot(results: list[dict], settings: dict, path: Path) -> None:
    """Draws time against length, sparse and dense."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axes, name, title in zip(panels, ("forward", "training"), ("forward", "forward + backward")):
        for kind, color, label in (
            ("dense", "tab:gray", "PyTorch scaled_dot_product_attention"),
            ("sparse", "tab:orange", f"SparseK, k = {settings['k']}"),
        ):
            points = [(r["length"], r["median_seconds"].get(f"{kind}_{name}")) for r in results]
            points = [point for point in points if point[1] is not None]
            axes.plot(*zip(*points), "o-", color=color, label=label)
        for result in results:
            if name in result:
                low, high = (result["median_seconds"][f"{kind}_{name}"] for kind in ("sparse", "dense"))
                middle = (low * high) ** 0.5
                axes.vlines(result["length"], low, high, color="lightgray", linewidth=1, zorder=0)
                axes.text(result["length"], middle, f" {result[name]['speedup']:.1f}x", va="center", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = [r["length"] for r in results]
        axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.set(title=title, xlabel="tokens")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[0].legend(frameon=False, loc="upper left")
    what = (
        f"B=1, H={settings['heads']}, K={settings['width']}, {settings['dtype']}, causal, {settings['threads']} threads"
    )
    figure.suptitle(f"{what}, {settings['cpu']}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768], help="tokens, sparse against dense")
    parser.add_argument("--growth", type=int, nargs="*", default=[16384, 65536], help="tokens, sparse alone")
    parser.add_argument("--dense-growth", action="store_true", help="run dense at the lengths of --growth too")
    parser.add_argument("--memory", type=int, nargs="*", default=[16384, 65536], help="tokens, memory of sparse")
    parser.add_argument("--heads", type=int, default=8, help="heads, each with scores of its own")
    parser.add_argument("--width", type=int, default=64, help="head dimension")
    parser.add_argument("--k", type=int, default=512, help="keys that each query keeps")
    parser.add_argument("--window", type=int, default=0, help="latest keys that each query sees besides")
    parser.add_argument("--spread", type=float, default=4.0, help="standard deviation of the scores")
    parser.add_argument(
        "--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float32", help="inputs"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement")
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu_speed.json", help="where the figures go")
    parser.add_argument("--plot", type=Path, nargs="?", const=RESULTS / "cpu_speed.png", help="draw a picture")
    parser.add_argument("--measure-memory", nargs=2, help=argparse.SUPPRESS)  # how it calls itself
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure_memory:
        name, length = args.measure_memory
        print(json.dumps(peak_growth(name, int(length), args)))
        return

    settings = environment(args.threads) | {
        name: getattr(args, name) for name in ("heads", "width", "k", "window", "spread", "dtype", "repeats")
    }
    print("\n".join(f"{name}: {value}" for name, value in settings.items()), end="\n\n")
    memory = [
        {"heads": args.heads} | measure_memory(name, length)
        for length in args.memory
        for name in ("sparse_forward", "sparse_training")
    ]
    plan = dict.fromkeys(args.growth, args.dense_growth) | dict.fromkeys(args.lengths, True)
    results = measure_times(dict(sorted(plan.items())), args)
    verdicts = judge(results, memory)
    reports = [report_times(results)] + [report_memory(memory)] * bool(memory) + [report_verdicts(verdicts)]
    print("\n\n".join(reports))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"settings": settings, "targets": verdicts, "times": results, "memory_bytes": memory}
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        plot(results, settings, args.plot)


if __name__ == "__main__":
    main()
