#!/usr/bin/env python3
"""Times the short configuration on a GPU: many short sequences, in microseconds per head, forward.

B=16, 512 tokens, K=64, float16, scores N(0, 4^2), not causal and causal, k = 128 and k = 512 (everything is kept, and
the time beyond a dense kernel's is what selection and gates cost). Microseconds per head are the time of a call over
the number of heads. Calls are captured in CUDA graphs and replayed, so that nobody waits for launches. The floor is the
time that query, key, value, scores and output take at the copy rate measured in the same run, each moved once.

Writes everything measured as JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gpu_common as common
import torch
from gpu_common import Captured, Case, attempt, number, verdict

QUICK = {"heads": [8, 32, 96]}
TOLERANCE = 0.005  # of an output in float16, relative to the largest
KINDS = {"not causal": False, "causal": True}


def measure_heads(args: argparse.Namespace, kind: str, heads: int, copy_rate: float) -> dict:
    """Microseconds per head of every call at one number of heads."""
    common.release(args.device)
    result = {"label": f"{kind} H={heads}", "kind": kind, "heads": heads, "times": {}, "microseconds_per_head": {}}
    sizes = {"batch": args.batch, "length": args.length, "heads": heads, "width": args.width, "k": args.k[0]}
    case, error = attempt(Case, args.device, causal=KINDS[kind], dtype=torch.float16, **sizes)
    if case is None:
        return result | {"error": error}
    result["largest_error"] = {}
    graphs, errors = {}, {}
    for name in (*(f"sparse k={k}" for k in args.k), *args.peers):
        if name in args.peers:
            made, error = attempt(common.dense_calls, name, case)
        else:
            other = case.with_k(int(name.split("=")[1]))
            made = common.sparse_calls(other)
            result["largest_error"][name], _ = attempt(other.largest_error)
        graph, error = attempt(Captured, made["forward"], case) if made else (None, error)
        if graph is None:
            errors[name] = {"error": error}
        else:
            graphs[name] = graph
    result["times"] = common.measure(graphs, args.device, 1, label=result["label"]) | errors
    per_head = result["microseconds_per_head"]
    for name, timing in result["times"].items():
        if "ms" in timing:  # of a graph that runs every copy
            per_head[name] = 1e3 * timing["ms"] / len(case.copies) / heads
    query = case.copies[0][0]
    per_head["floor"] = 1e6 * common.size_of((*case.copies[0], query)) / copy_rate / heads  # query: as large as output
    return result


def report(results: list[dict], kind: str) -> str:
    """A row per call and a column per number of heads; then the ratios to the floor and to the fastest peer."""
    results = [r for r in results if r["kind"] == kind]
    names = list(dict.fromkeys(name for r in results for name in r["microseconds_per_head"]))
    rows = [[f"{kind}, us per head", *(f"H={r['heads']}" for r in results)]]
    rows += [[name, *(number(r["microseconds_per_head"].get(name)) for r in results)] for name in names]
    for name in names:
        if name.startswith("sparse"):
            rows.append([f"{name} / floor", *(number(ratio(r, name, ["floor"])) for r in results)])
            rows.append([f"{name} / fastest peer", *(number(ratio(r, name, common.DENSE)) for r in results)])
            errors = [r["largest_error"].get(name) for r in results]
            cells = ["WRONG" if e is not None and not e < TOLERANCE else number(e, 2) for e in errors]
            rows.append([f"{name} error", *cells])
    return common.table(rows)


def ratio(result: dict, name: str, others: tuple[str, ...] | list[str]) -> float | None:
    times = result["microseconds_per_head"]
    smallest = min((times[other] for other in others if other in times), default=None)
    return times[name] / smallest if name in times and smallest else None


def judge(results: list[dict]) -> list[dict]:
    """The figures that have targets, which are meant for the default options."""
    times = {(r["kind"], r["heads"]): r["microseconds_per_head"] for r in results}
    figures = times.get(("not causal", 96), {})
    return [
        verdict(f"H=96, not causal, k={k}, us per head", figures.get(f"sparse k={k}"), least, aim, False)
        for k, least, aim in ((128, 1.6, 1.2), (512, 3.8, 2.8))
    ]


def plot(results: list[dict], facts: dict, path: Path) -> None:
    """Draws microseconds per head against the number of heads."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for axes, kind in zip(panels, KINDS):
        own = [r for r in results if r["kind"] == kind]
        for name in dict.fromkeys(name for r in own for name in r["microseconds_per_head"]):
            points = [(r["heads"], r["microseconds_per_head"].get(name)) for r in own]
            points = [point for point in points if point[1] is not None]
            style = "k--" if name == "floor" else "o-"
            axes.plot(*zip(*points), style, label=common.TITLES.get(name, name.replace("sparse", "SparseK,")))
        axes.set_xscale("log", base=2)
        axes.set_xticks([r["heads"] for r in own], [str(r["heads"]) for r in own])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set(title=kind, xlabel="heads")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("microseconds per head")
    panels[0].legend(frameon=False)
    figure.suptitle(f"B=16, 512 tokens, K=64, float16, {facts['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", type=int, nargs="*", default=[8, 16, 32, 64, 96, 128], help="heads")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="what queries see")
    parser.add_argument("--k", type=int, nargs="+", default=[128, 512], help="keys that each query keeps")
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--width", type=int, default=64, help="head dimension")
    parser.add_argument("--peers", nargs="*", choices=common.DENSE, default=common.DENSE, help="dense peers")
    parser.add_argument("--plot", type=Path, nargs="?", const=common.RESULTS / "gpu_short.png", help="draw a picture")


def main() -> None:
    args = common.arguments(__doc__, "gpu_short", QUICK, options)
    facts = common.environment(args) | common.rates(args.device)
    common.print_facts(facts)
    results = []
    for kind in args.kinds:
        results += [measure_heads(args, kind, heads, facts["copy_bytes_per_second"]) for heads in args.heads]
        print(report(results, kind), end="\n\n", flush=True)
    verdicts = judge(results)
    print("\n\n".join([*common.report_errors(results), common.report_verdicts(verdicts)]))
    sizes = {name: getattr(args, name) for name in ("batch", "length", "width")}
    common.write(args.json, {"facts": facts | sizes, "targets": verdicts, "times": results})
    if args.plot:
        plot(results, facts, args.plot)


if __name__ == "__main__":
    main()
