#!/usr/bin/env python3
"""Operator selection on a GPU: over a grid of inputs, which kernel is picked, and how it compares with the fastest.

Every kernel is named by hand ("sm90", "sm80", "simt") and times are those of the operators ``forward`` and ``backward``
alone. The one that ``kernel=None`` picks is the one whose results have the same bits: kernels sum in different orders.
A choice is good if the picked kernel takes at most 5 % longer than the fastest.

Writes everything measured as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import gpu_common as common
import torch
from gpu_common import Case, attempt, number, size_name
from torch import Tensor

KERNELS = ("sm90", "sm80", "simt")
ALLOWANCE = 1.05
QUICK = {"dtypes": ["bfloat16"], "widths": [64, 128], "lengths": [512, 8192], "heads": ["32:32", "32:8"], "k": [256]}
SLOW_FLOPS = 1e11  # of one call: beyond it the exact kernel, made for float32, is not run on other dtypes


def measure_cell(args: argparse.Namespace, dtype: str, width: int, length: int, heads: str, k: int) -> list[dict]:
    """Forward and backward of one cell of the grid."""
    common.release(args.device)
    count, groups = map(int, heads.split(":"))
    label = f"{dtype} K={width} M={size_name(length)} H={count} G={groups} k={k}"
    sizes = {"length": length, "width": width, "heads": count, "groups": groups, "k": k}
    case, error = attempt(Case, args.device, dtype=getattr(torch, dtype), batch=args.batch, causal=True, **sizes)
    pairs, error = attempt(case.pairs) if case else (None, error)
    if pairs is None:
        return [{"label": label, "error": error}]
    calls = {kernel: common.sparse_calls(case, kernel) for kernel in (*args.kernels, None)}
    results = []
    for stage, name, flops in (("forward", "attend", 4), ("backward", "backward", 10)):
        named, skipped = {}, {}
        for kernel in args.kernels:
            if kernel == "simt" and dtype != "float32" and flops * width * pairs["sparse"] > SLOW_FLOPS:
                skipped[kernel] = {"error": "not run: too slow at this size to be of interest"}
            else:
                named[kernel] = calls[kernel][name]
        times = common.measure(named, args.device, len(case.copies), label=label, total_ms=args.total_ms) | skipped
        result = {"label": f"{label} {stage}", "stage": stage, "dtype": dtype} | sizes | {"times": times}
        measured = {kernel: timing["ms"] for kernel, timing in times.items() if "ms" in timing}
        mine, error = attempt(calls[None][name], 0)
        if mine is None:
            result["error"] = error
        elif measured:
            same = [kernel for kernel in measured if same_bits(mine, calls[kernel][name](0))]
            fastest = min(measured, key=measured.__getitem__)
            result |= {"picked": same, "fastest": fastest}
            if same:
                result["over_fastest"] = min(measured[kernel] for kernel in same) / measured[fastest]
        results.append(result)
    return results


def same_bits(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right))


def report(results: list[dict], kernels: list[str]) -> str:
    rows = [["case", *(f"{kernel} ms" for kernel in kernels), "picked", "fastest", "picked / fastest"]]
    for result in results:
        times = [result.get("times", {}).get(kernel, {}).get("ms") for kernel in kernels]
        picked = "|".join(result.get("picked", [])) or "unknown"
        rows.append([result["label"], *map(number, times), picked, result.get("fastest", "-")])
        rows[-1].append(number(result.get("over_fastest"), 4))
    return common.table(rows)


def report_choice(results: list[dict]) -> tuple[str, dict]:
    ratios = {r["label"]: r["over_fastest"] for r in results if "over_fastest" in r}
    worse = {label: value for label, value in ratios.items() if value > ALLOWANCE}
    summary = {"cells": len(results), "judged": len(ratios), "beyond_allowance": worse}
    lines = [f"choice within {100 * (ALLOWANCE - 1):.0f} % of the fastest: {len(ratios) - len(worse)} of {len(ratios)}"]
    lines[0] += f" judged, of {len(results)} cells"
    if ratios:
        lines.append(f"largest {max(ratios.values()):.3f}, mean {statistics.fmean(ratios.values()):.4f}")
    lines += [f"not met: {label}: {value:.3f}" for label, value in worse.items()]
    return "\n".join(lines), summary


def options(parser: argparse.ArgumentParser) -> None:
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="of the inputs")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128], help="head dimensions")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768], help="tokens")
    parser.add_argument(
        "--heads", nargs="+", default=["8:8", "32:32", "32:8"], help="query heads and key/value heads, H:G"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[256, 1024], help="keys that each query keeps")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), help="by name")
    parser.add_argument("--total-ms", type=float, default=10.0, help="device time per figure, at least")


def main() -> None:
    args = common.arguments(__doc__, "gpu_select", QUICK, options)
    facts = common.environment(args)
    common.print_facts(facts)
    results = []
    for dtype, width in itertools.product(args.dtypes, args.widths):
        cells = itertools.product(args.lengths, args.heads, args.k)
        found = [result for cell in cells for result in measure_cell(args, dtype, width, *cell)]
        print(report(found, args.kernels), end="\n\n", flush=True)
        results += found
    text, summary = report_choice(results)
    print("\n\n".join([*common.report_errors(results), text]))
    common.write(args.json, {"facts": facts, "summary": summary, "cells": results})


if __name__ == "__main__":
    main()
