#!/usr/bin/env python3
"""Times generation on a GPU: attention for one more token, sparse through a cache of fixed size, and dense.

32 query heads on 8 key/value heads, K=128, bfloat16, k=1024, window 256, scores N(0, 4^2), after histories of 4K to 1M
tokens, at batch sizes 1, 8 and 64. Sparse is all of ``SparseKCache.attend``: the token is appended, thresholds are
found, keys evicted, and the query attends. Dense is the faster of cuDNN and FlashAttention-2 (both by PyTorch's SDPA)
over all keys, without the time that appending to them takes. Calls are captured in CUDA graphs and replayed, so that
nobody waits for launches; the same 32 tokens are appended again and again.

Writes everything measured as JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import gpu_common as common
import torch
from gpu_common import Captured, attempt, number, size_name, verdict
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from xformers_sparsek import SparseKCache

QUICK = {"batches": [8], "histories": [32768, 131072]}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
PIECE = 4096  # tokens of a prompt that are appended at once
TOKENS = 32  # of a graph, each with scores of its own


def filled(args: argparse.Namespace, batch: int, history: int) -> SparseKCache:
    """A cache after ``history`` tokens, the same for every batch entry."""
    options = {"num_keys": args.k, "window": args.window, "dtype": torch.bfloat16, "device": args.device}
    cache = SparseKCache(batch, args.groups, args.width, **options)
    generator = torch.Generator(args.device).manual_seed(history)
    mask = torch.zeros(batch, PIECE, dtype=torch.bool, device=args.device)
    mask[0] = True

    def normal(heads: int) -> torch.Tensor:
        x = torch.randn(1, PIECE, heads, args.width, generator=generator, device=args.device, dtype=torch.bfloat16)
        return x.expand(batch, -1, -1, -1)

    for start in range(0, history, PIECE):
        scores = args.spread * torch.randn(1, PIECE, args.groups, generator=generator, device=args.device)
        count = min(PIECE, history - start)
        pieces = (normal(args.groups), normal(args.groups), normal(args.groups), scores.expand(batch, -1, -1), mask)
        query, key, value, scores, real = (x[:, :count] for x in pieces)
        cache.attend(query, key, value, scores, mask=real)
    cache.reorder(torch.zeros(batch, dtype=torch.int64, device=args.device))
    return cache


def measure_cell(args: argparse.Namespace, batch: int, history: int) -> dict:
    """Sparse and dense at one batch size after one history."""
    common.release(args.device)
    label = f"B={batch} {size_name(history)}"
    result = {"label": label, "batch": batch, "history": history, "times": {}}
    cache, error = attempt(filled, args, batch, history)
    if cache is None:
        return result | {"error": error}
    result |= {"cache_bytes": cache.nbytes, "dense_bytes": 4 * batch * args.groups * history * args.width}

    def tokens(heads: int) -> list[torch.Tensor]:
        shape = (batch, 1, heads, args.width)
        return [torch.randn(shape, device=args.device, dtype=torch.bfloat16) for _ in range(TOKENS)]

    query, key, value = tokens(args.heads), tokens(args.groups), tokens(args.groups)
    scores = [args.spread * torch.randn(batch, 1, args.groups, device=args.device) for _ in range(TOKENS)]
    copies = SimpleNamespace(copies=range(TOKENS), device=args.device)
    graphs, errors = {}, {}

    def add(name: str, call, repeats: SimpleNamespace) -> None:
        graph, error = attempt(Captured, call, repeats)
        if graph is None:
            errors[name] = {"error": error}
        else:
            graphs[name] = graph

    add("sparse", lambda i: cache.attend(query[i], key[i], value[i], scores[i]), copies)
    dense, error = attempt(dense_cache, args, batch, history)
    for peer in args.peers:
        if dense is None:
            errors[peer] = {"error": error}
        else:
            once = SimpleNamespace(copies=range(2), device=args.device)
            add(peer, lambda i, peer=peer: attend_densely(peer, query[i].transpose(1, 2), *dense), once)
    times = {}
    for name, graph in graphs.items():  # one by one: dense attention over a long history heats the GPU for the others
        times |= common.measure({name: graph}, args.device, 1, label=label, limit_ms=args.limit_ms)
    result["times"] = times | errors
    result["us"] = {n: 1e3 * t["ms"] / (TOKENS if n == "sparse" else 2) for n, t in times.items() if "ms" in t}
    result["overflow"] = int(cache.overflow.max())
    return result


def dense_cache(args: argparse.Namespace, batch: int, history: int) -> list[torch.Tensor]:
    shape = (batch, args.groups, history, args.width)
    if args.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(args.device)
        if 4 * batch * args.groups * history * args.width > 0.8 * free:
            raise torch.OutOfMemoryError("keys and values of this history do not fit")
    return [torch.randn(shape, device=args.device, dtype=torch.bfloat16) for _ in range(2)]


def attend_densely(peer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if query.device.type == "cpu":
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with sdpa_kernel(BACKENDS[peer]):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def fastest(result: dict) -> float | None:
    return min((us for name, us in result.get("us", {}).items() if name != "sparse"), default=None)


def report(results: list[dict], peers: list[str]) -> str:
    head = ["batch", "history", "sparse us", *(f"{peer} us" for peer in peers), "speedup", "cache MB", "dense MB"]
    rows = [[*head, "dropped"]]
    for r in results:
        us, dense = r.get("us", {}), fastest(r)
        speedup = dense / us["sparse"] if dense and "sparse" in us else None
        row = [str(r["batch"]), size_name(r["history"]), *(number(us.get(n)) for n in ("sparse", *peers))]
        sizes = [number(r[n] / 1e6) if n in r else "-" for n in ("cache_bytes", "dense_bytes")]
        rows.append([*row, number(speedup), *sizes, str(r.get("overflow", "-"))])
    return common.table(rows)


def judge(results: list[dict]) -> list[dict]:
    """The figures that have targets, which are meant for the default options."""
    cells = {(r["batch"], r["history"]): r for r in results if "us" in r}
    verdicts = []
    for batch in sorted({batch for batch, _ in cells}):
        short, long = (cells.get((batch, history), {}) for history in (32768, 1 << 20))
        time = long["us"].get("sparse") / short["us"]["sparse"] if short and long else None
        size = long["cache_bytes"] / short["cache_bytes"] if short and long else None
        verdicts.append(verdict(f"time per token at 1M over that at 32K, B={batch}", time, 1.05, 1.05, False))
        verdicts.append(verdict(f"cache bytes at 1M over those at 32K, B={batch}", size, 1.05, 1.05, False))
    cell = cells.get((8, 131072), {})
    dense = fastest(cell)
    value = dense / cell["us"]["sparse"] if dense and "sparse" in cell["us"] else None
    return [*verdicts, verdict("speedup over the fastest dense at 128K, B=8", value, 10, 25)]


def options(parser: argparse.ArgumentParser) -> None:
    tokens = [4096, 32768, 131072, 1 << 20]
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64], help="batch sizes")
    parser.add_argument("--histories", type=int, nargs="*", default=tokens, help="tokens before")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--groups", type=int, default=8, help="key/value heads")
    parser.add_argument("--width", type=int, default=128, help="head dimension")
    parser.add_argument("--k", type=int, default=1024, help="keys that a query keeps")
    parser.add_argument("--window", type=int, default=256, help="latest keys that it keeps besides")
    parser.add_argument("--spread", type=float, default=4.0, help="standard deviation of the scores")
    parser.add_argument("--peers", nargs="*", choices=BACKENDS, default=list(BACKENDS), help="dense peers")
    parser.add_argument("--limit-ms", type=float, default=300.0, help="device time per figure, about")
    parser.add_argument("--plot", type=Path, nargs="?", const=common.RESULTS / "gpu_decode.png", help="draw a picture")


def plot(results: list[dict], facts: dict, path: Path) -> None:
    """Draws time per token against the history."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    batches = sorted({r["batch"] for r in results})
    figure, panels = plt.subplots(
        1, len(batches), figsize=(4 * len(batches), 4), sharey=True, layout="constrained", squeeze=False
    )
    for axes, batch in zip(panels[0], batches):
        own = [r for r in results if r["batch"] == batch]
        for name in dict.fromkeys(name for r in own for name in r.get("us", {})):
            points = [(r["history"], r["us"][name]) for r in own if name in r.get("us", {})]
            axes.plot(*zip(*points), "o-", label=common.TITLES.get(name, "SparseK"))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([r["history"] for r in own], [size_name(r["history"]) for r in own])
        axes.minorticks_off()
        axes.set(title=f"B={batch}", xlabel="tokens before")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("microseconds a token and layer")
    panels[0][0].legend(frameon=False)
    figure.suptitle(f"32 query heads on 8, K=128, bfloat16, {facts['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    args = common.arguments(__doc__, "gpu_decode", QUICK, options)
    facts = common.environment(args)
    common.print_facts(facts)
    results = []
    for batch in args.batches:
        for history in args.histories:
            results.append(measure_cell(args, batch, history))
            common.write(args.json, {"facts": facts, "targets": judge(results), "cells": results})
    print(report(results, args.peers), end="\n\n")
    print("\n\n".join([*common.report_errors(results), common.report_verdicts(judge(results))]))
    if args.plot:
        plot(results, facts, args.plot)


if __name__ == "__main__":
    main()
