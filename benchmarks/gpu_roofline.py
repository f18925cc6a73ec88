#!/usr/bin/env python3
"""Runs one forward and one backward of SparseK attention under Nsight Compute and prints where each kernel stands.

Needs ``ncu`` and the right to read hardware counters. Clocks are left as they are. For every kernel: time, bytes moved
from and to memory and through L2, what part of the device's peak throughput it reached, registers and occupancy. For
the longest kernel of each pass also operations per byte (4 * K per selected pair forward, 10 * K backward), and its
rate as a part of the roof at that intensity, from copy and bfloat16 matrix product rates measured in the same run.

Writes these as JSON, every metric as CSV beside it and, with --keep, the reports for the Nsight Compute window.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gpu_common as common
import torch
from gpu_common import Case, number

QUICK = {"length": 8192}
FLOPS = {"forward": 4, "backward": 10}  # per pair and unit of head dimension
SECTIONS = ("LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats")
COLLECTED = ("gpu__time_duration.sum", "dram__bytes.sum", "lts__t_bytes.sum")  # besides those of the sections
# Where devices differ in a metric's name, the first that was collected counts.
METRICS = {
    "ms": ("gpu__time_duration.sum",),
    "memory_bytes": ("dram__bytes.sum",),
    "l2_bytes": ("lts__t_bytes.sum",),
    "compute_percent": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "memory_percent": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",),
    "tensor_percent": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    ),
    "registers": ("launch__registers_per_thread",),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "blocks": ("launch__grid_size",),
    "threads": ("launch__block_size",),
}
# To the unit of the name: times to milliseconds, multiples of bytes to bytes.
UNITS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3, "nsecond": 1e-6, "usecond": 1e-3, "msecond": 1.0, "second": 1e3}
UNITS |= {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}


def make_case(args: argparse.Namespace) -> Case:
    sizes = {"length": args.length, "heads": args.heads, "groups": args.groups, "width": args.width, "k": args.k}
    return Case(args.device, **sizes)


def run_once(args: argparse.Namespace) -> None:
    """What runs under the profiler: one pass, the second of its kind."""
    call = common.sparse_calls(make_case(args))[args.inside]
    call(0)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call(0)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile(args: argparse.Namespace, name: str, report: Path) -> str:
    """Every metric of every kernel of a pass, as Nsight Compute's CSV."""
    own = [sys.executable, __file__, "--inside", name, "--length", str(args.length), "--heads", str(args.heads)]
    own += ["--width", str(args.width), "--k", str(args.k), *(["--groups", str(args.groups)] if args.groups else [])]
    command = [
        "ncu",
        "--set",
        "roofline",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--force-overwrite",
    ]
    command += [*(f"--section={section}" for section in SECTIONS), "--metrics", ",".join(COLLECTED)]
    run = subprocess.run([*command, "--export", str(report), *own], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ncu failed: {(run.stdout + run.stderr).strip()[-2000:]}")
    page = ["ncu", "--import", str(report), "--csv", "--page", "raw"]
    return subprocess.run(page, capture_output=True, text=True, check=True).stdout


def parse(text: str, name: str) -> list[dict]:
    """A kernel per row, in the order of their launches; the first row of the CSV holds units."""
    units, *kernels = csv.DictReader(io.StringIO(text[text.index('"ID"') :]))
    results = []
    for kernel in kernels:
        result = {"pass": name, "kernel": kernel["Kernel Name"]}
        for figure, metrics in METRICS.items():
            cells = [
                (kernel[metric].replace(",", ""), units[metric])
                for metric in metrics
                if kernel.get(metric, "n/a") not in ("", "n/a")
            ]
            result[figure] = float(cells[0][0]) * UNITS.get(cells[0][1], 1.0) if cells else None
        results.append(result)
    return results


def roof(kernels: list[dict], name: str, flops: float, rates: dict[str, float]) -> dict | None:
    """Where the longest kernel of a pass stands below the roof."""
    own = [kernel for kernel in kernels if kernel["pass"] == name and kernel["ms"]]
    if not own:
        return None
    longest = max(own, key=lambda kernel: kernel["ms"])
    result = {"pass": name, "kernel": longest["kernel"], "flops_per_second": flops / longest["ms"] * 1e3}
    if longest["memory_bytes"]:
        intensity = flops / longest["memory_bytes"]
        limit = min(rates["matmul_flops_per_second"], intensity * rates["copy_bytes_per_second"])
        result |= {"flops_per_byte": intensity, "roof": limit, "of_roof": result["flops_per_second"] / limit}
    return result


def print_report(kernels: list[dict], roofs: list[dict]) -> None:
    rows = [["pass", *METRICS, "kernel"]]
    rows += [[k["pass"], *(number(k[name], 4) for name in METRICS), k["kernel"][:70]] for k in kernels]
    print(common.table(rows), end="\n\n")
    rows = [["pass", "TFLOP/s", "FLOP/byte", "roof TFLOP/s", "of roof", "longest kernel"]]
    for item in roofs:
        rate, limit = item["flops_per_second"], item.get("roof")
        row = [item["pass"], number(rate / 1e12), number(item.get("flops_per_byte")), number(limit and limit / 1e12)]
        rows.append([*row, number(item.get("of_roof")), item["kernel"][:70]])
    print(common.table(rows))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=32768, help="tokens")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--groups", type=int, help="key/value heads; as many as query heads if not given")
    parser.add_argument("--width", type=int, default=128, help="head dimension")
    parser.add_argument("--k", type=int, default=1024, help="keys that each query keeps")
    parser.add_argument("--keep", type=Path, help="folder for Nsight Compute's own reports")
    parser.add_argument("--inside", choices=FLOPS, help=argparse.SUPPRESS)  # how it calls itself


def main() -> None:
    args = common.arguments(__doc__, "gpu_roofline", QUICK, options)
    if args.inside:
        run_once(args)
        return
    if shutil.which("ncu") is None:
        sys.exit("gpu_roofline.py: ncu is not on the PATH")
    facts = common.environment(args) | common.rates(args.device)
    common.print_facts(facts)
    pairs = make_case(args).pairs()["sparse"]
    common.release(args.device)
    kernels, texts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in FLOPS:
            report = (args.keep or Path(folder)) / f"{name}.ncu-rep"
            texts.append(profile(args, name, report))
            kernels += parse(texts[-1], name)
    found = [roof(kernels, name, factor * args.width * pairs, facts) for name, factor in FLOPS.items()]
    roofs = [item for item in found if item]
    print_report(kernels, roofs)
    sizes = {name: getattr(args, name) for name in ("length", "heads", "groups", "width", "k")}
    common.write(args.json, {"facts": facts | sizes | {"pairs": pairs}, "roofs": roofs, "kernels": kernels})
    args.json.with_suffix(".csv").write_text("".join(texts))


if __name__ == "__main__":
    main()
