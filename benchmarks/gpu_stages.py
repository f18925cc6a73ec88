#!/usr/bin/env python3
"""Stage times of SparseK attention on a GPU and what they make of it.

Stages are the operators: select (thresholds), forward, backward. Rates count 4 * K operations per selected pair in
forward and 10 * K in backward, and stand beside the rate of a bfloat16 matrix product in the same run. PyTorch's
profiler splits the stages into kernels; the share of thresholds and lists in forward is everything but the kernel that
takes longest.

Writes everything measured as JSON.
"""

from __future__ import annotations

import argparse
import collections

import gpu_common as common
import torch
from gpu_common import Call, Case, attempt, number, size_name, verdict

QUICK = {"lengths": [8192, 32768]}
FLOPS = {"attend": 4, "backward": 10}  # per pair and unit of head dimension
NAMES = {"select": "select", "attend": "forward", "backward": "backward"}


def measure_length(args: argparse.Namespace, length: int) -> dict:
    """Times of the stages and of their kernels at one length."""
    common.release(args.device)
    result = {"label": f"{size_name(length)} tokens", "length": length}
    case, error = attempt(
        Case, args.device, length=length, heads=args.heads, groups=args.groups, width=args.width, k=args.k
    )
    if case is None:
        return result | {"error": error}
    result |= case.describe()
    calls = common.sparse_calls(case)
    result["times"] = common.measure(calls, args.device, len(case.copies), label=result["label"])
    result["pairs"], _ = attempt(case.pairs)
    result["flops_per_second"] = {
        stage: factor * args.width * result["pairs"]["sparse"] / result["times"][stage]["ms"] * 1e3
        for stage, factor in FLOPS.items()
        if "ms" in result["times"][stage]
    }
    result["kernels"] = {}
    if args.device.type == "cuda":
        for stage in ("forward", "backward"):
            if "ms" in result["times"][stage]:
                found, error = attempt(kernel_times, calls[stage])
                result["kernels"][stage] = found or {}
    kernels = result["kernels"].get("forward", {}).values()
    if kernels:
        result["share_of_selection"] = 1 - max(kernels) / sum(kernels)
    return result


def kernel_times(call: Call, repeats: int = 5) -> dict[str, float]:
    """Milliseconds per call of every kernel that it launches, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call(0)
        torch.cuda.synchronize()
    times: dict[str, float] = collections.defaultdict(float)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time / 1000 / repeats
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def report(results: list[dict], matmul_rate: float) -> str:
    head = ["tokens", "select ms", "forward ms", "backward ms", "whole forward ms", "selection share"]
    rows = [[*head, "fwd TFLOP/s", "of matmul", "bwd TFLOP/s", "of matmul"]]
    for result in results:
        times = result.get("times", {})
        row = [size_name(result["length"])]
        row += [number(times.get(stage, {}).get("ms")) for stage in ("select", "attend", "backward", "forward")]
        row.append(number(result.get("share_of_selection")))
        for stage in FLOPS:
            rate = result.get("flops_per_second", {}).get(stage)
            row += [number(rate and rate / 1e12), number(rate and rate / matmul_rate)]
        rows.append(row)
    return common.table(rows)


def report_kernels(results: list[dict]) -> str:
    rows = [["tokens", "stage", "ms per call", "share", "kernel"]]
    for result in results:
        for stage, kernels in result.get("kernels", {}).items():
            total = sum(kernels.values())
            for name, ms in kernels.items():
                row = [size_name(result["length"]), stage, number(ms), f"{100 * ms / total:.1f} %", name[:90]]
                rows.append(row)
    return common.table(rows)


def judge(results: list[dict]) -> list[dict]:
    return [
        verdict(f"thresholds and lists / forward, {r['label']}", r.get("share_of_selection"), 0.20, 0.08, False)
        for r in results
        if r["length"] >= 16384
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 16384, 32768, 131072], help="tokens")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--groups", type=int, help="key/value heads; as many as query heads if not given")
    parser.add_argument("--width", type=int, default=128, help="head dimension")
    parser.add_argument("--k", type=int, default=1024, help="keys that each query keeps")


def main() -> None:
    args = common.arguments(__doc__, "gpu_stages", QUICK, options)
    facts = common.environment(args) | common.rates(args.device)
    common.print_facts(facts)
    results = [measure_length(args, length) for length in args.lengths]
    verdicts = judge(results)
    reports = [report(results, facts["matmul_flops_per_second"]), report_kernels(results)]
    print("\n\n".join([*reports, *common.report_errors(results), common.report_verdicts(verdicts)]))
    common.write(args.json, {"facts": facts, "targets": verdicts, "stages": results})


if __name__ == "__main__":
    main()
