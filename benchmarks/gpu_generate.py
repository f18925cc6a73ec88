#!/usr/bin/env python3
"""Times ``generate`` of a whole language model on a GPU, sparse through a cache of fixed size, and dense.

A Llama of 1.2 billion random parameters in bfloat16 (16 layers, hidden size 2048, 32 query heads on 8 key/value heads,
K=64) continues prompts of 32768 random tokens. Sparse is the same model after ``sparsify`` (k=1024, window 256, all
layers) with a ``SparseKGenerationCache``; dense is the stock model with PyTorch's SDPA and the growing cache that
transformers uses. Seconds for the prompt are those of ``generate`` with one new token; tokens per second are those of
the tokens after the first. Both launch kernel by kernel from Python, as transformers does.

Writes everything measured as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time

import gpu_common as common
import torch
import transformers
from gpu_common import attempt, number, size_name
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from xformers_sparsek.integrations import transformers as sparse

QUICK = {"layers": 2, "batches": [1], "repeats": 1}
KINDS = ("sparse", "dense")


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """A model with random weights, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.groups,
        max_position_embeddings=2 * args.prompt,
        attn_implementation="sdpa",
    )
    with torch.device(args.device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def seconds(args: argparse.Namespace, model: PreTrainedModel, kind: str, prompts: torch.Tensor, count: int) -> dict:
    """Time and memory of generating ``count`` tokens."""
    cache = sparse.SparseKGenerationCache(model.config) if kind == "sparse" else None
    options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    gpu = args.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        before = torch.cuda.memory_allocated(args.device)
    began = time.perf_counter()
    out = model.generate(prompts, past_key_values=cache, **options)
    if gpu:
        torch.cuda.synchronize(args.device)
    took = time.perf_counter() - began
    assert out.shape[1] == prompts.shape[1] + count
    peak = torch.cuda.max_memory_allocated(args.device) - before if gpu else None
    overflow = max(int(x.max()) for x in cache.overflow.values()) if cache else 0
    return {"seconds": took, "peak_bytes": peak, "overflow": overflow}


def measure_cell(args: argparse.Namespace, model: PreTrainedModel, kind: str, batch: int) -> dict:
    """Prompt and tokens at one batch size."""
    common.release(args.device)
    result = {"label": f"{kind} B={batch} {size_name(args.prompt)}", "kind": kind, "batch": batch}
    prompts = torch.randint(32000, (batch, args.prompt), device=args.device, generator=args.generator)
    runs = {"prompt": [], "all": []}
    for turn in range(args.repeats + 1):
        for name, count in (("prompt", 1), ("all", args.tokens)):
            run, error = attempt(seconds, args, model, kind, prompts, count)
            if run is None:
                return result | {"error": error}
            if turn > 0:  # the first one loads code
                runs[name].append(run)
    prompt, whole = (statistics.median(run["seconds"] for run in runs[name]) for name in ("prompt", "all"))
    rate = batch * (args.tokens - 1) / (whole - prompt)
    peaks = [run["peak_bytes"] for run in runs["all"] if run["peak_bytes"] is not None]
    last = {"overflow": runs["all"][-1]["overflow"], "peak_bytes": max(peaks, default=None)}
    return result | {"prompt_seconds": prompt, "tokens_per_second": rate, "runs": runs} | last


def report(results: list[dict]) -> str:
    rows = [["batch", "attention", "prompt s", "tokens/s", "peak GB", "dropped"]]
    for r in results:
        peak = r.get("peak_bytes")
        figures = [number(r.get("prompt_seconds")), number(r.get("tokens_per_second")), number(peak and peak / 1e9)]
        rows.append([str(r["batch"]), r["kind"], *figures, str(r.get("overflow", "-"))])
    return common.table(rows)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=65, help="tokens that are generated, at least 2")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--groups", type=int, default=8, help="key/value heads")
    parser.add_argument("--k", type=int, default=1024, help="keys that a query keeps")
    parser.add_argument("--window", type=int, default=256, help="latest keys that it keeps besides")
    parser.add_argument("--repeats", type=int, default=3, help="runs, after one that does not count")


def main() -> None:
    args = common.arguments(__doc__, "gpu_generate", QUICK, options)
    args.generator = torch.Generator(args.device).manual_seed(0)
    facts = common.environment(args) | {"transformers": transformers.__version__}
    common.print_facts(facts)
    results = []
    for kind in KINDS:
        model = make_model(args)
        if kind == "sparse":
            sparse.sparsify(model, num_keys=args.k, window=args.window)
        for batch in args.batches:
            results.append(measure_cell(args, model, kind, batch))
            common.write(args.json, {"facts": facts, "cells": results})
        del model
        common.release(args.device)
    print(report(sorted(results, key=lambda r: r["batch"])), end="\n\n")
    print("\n\n".join(common.report_errors(results)))


if __name__ == "__main__":
    main()
