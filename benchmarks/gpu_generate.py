#!/usr/bin/env python3
"""Times ``generate`` of a whole language model on a GPU, sparse through a cache of fixed size, and dense.

A Llama of 1.2 billion random parameters in bfloat16 (16 layers, hidden size 2048, 32 query heads on 8 key/value heads,
K=64) continues prompts of 32768 random tokens. Sparse is the same model after ``sparsify`` (k=1024, window 256, all
layers) with a ``SparseKGenerationCache``; dense is the stock model with PyTorch's SDPA and the growing cache that
transformers uses. Both launch kernel by kernel from Python. Where compiled, a token is one CUDA graph: sparse with a
cache that is ``compileable``, dense with a ``StaticCache`` that has room for prompt and tokens. Seconds for the prompt
are those of ``generate`` with one new token; tokens per second are those of the tokens after the first.

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
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from xformers_sparsek.integrations import transformers as sparse

QUICK = {"layers": 2, "batches": [1], "repeats": 1}
KINDS = ("sparse", "dense", "sparse compiled", "dense compiled")


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


def make_cache(args: argparse.Namespace, model: PreTrainedModel, kind: str) -> Cache:
    """A cache for one run, or where compiled for all runs of a cell, since another would be compiled again."""
    if kind == "dense":
        return DynamicCache(config=model.config)
    if kind == "dense compiled":
        return StaticCache(config=model.config, max_cache_len=args.prompt + args.tokens)
    return sparse.SparseKGenerationCache(model.config, compileable=kind == "sparse compiled")


def seconds(args: argparse.Namespace, model: PreTrainedModel, cache: Cache, prompts: torch.Tensor, count: int) -> dict:
    """Time and memory of generating ``count`` tokens."""
    options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    gpu = args.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
    began = time.perf_counter()
    out = model.generate(prompts, past_key_values=cache, **options)
    if gpu:
        torch.cuda.synchronize(args.device)
    took = time.perf_counter() - began
    assert out.shape[1] == prompts.shape[1] + count
    peak = torch.cuda.max_memory_allocated(args.device) if gpu else 0
    overflow = max(int(x.max()) for x in getattr(cache, "overflow", {0: torch.zeros(1)}).values())
    return {"seconds": took, "peak_bytes": peak, "overflow": overflow}


def measure_cell(args: argparse.Namespace, model: PreTrainedModel, kind: str, batch: int) -> dict:
    """Prompt and tokens at one batch size."""
    common.release(args.device)
    result = {"label": f"{kind} B={batch} {size_name(args.prompt)}", "kind": kind, "batch": batch}
    prompts = torch.randint(32000, (batch, args.prompt), device=args.device, generator=args.generator)
    runs = {"prompt": [], "all": []}
    before = torch.cuda.memory_allocated(args.device) if args.device.type == "cuda" else 0
    cache = make_cache(args, model, kind)
    for turn in range(args.repeats + 1):
        for name, count in (("prompt", 1), ("all", args.tokens)):
            run, error = attempt(seconds, args, model, cache, prompts, count)
            if run is None:
                return result | {"error": error}
            if turn > 0:  # the first one loads code, or compiles it
                runs[name].append(run)
            if cache.is_compileable:
                cache.reset()
            else:
                cache = make_cache(args, model, kind)
    prompt, whole = (statistics.median(run["seconds"] for run in runs[name]) for name in ("prompt", "all"))
    rate = batch * (args.tokens - 1) / (whole - prompt)
    peak = max(run["peak_bytes"] for run in runs["all"]) - before
    last = {"overflow": runs["all"][-1]["overflow"], "peak_bytes": peak}
    return result | {"prompt_seconds": prompt, "tokens_per_second": rate, "runs": runs} | last


def report(results: list[dict]) -> str:
    rows = [["batch", "attention", "prompt s", "tokens/s", "peak GB", "dropped"]]
    for r in results:
        peak = r.get("peak_bytes")
        figures = [number(r.get("prompt_seconds")), number(r.get("tokens_per_second")), number(peak and peak / 1e9)]
        rows.append([str(r["batch"]), r["kind"], *figures, str(r.get("overflow", "-"))])
    return common.table(rows)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
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
    for kind in args.kinds:
        model = make_model(args)
        if kind.startswith("sparse"):
            sparse.sparsify(model, num_keys=args.k, window=args.window)
        for batch in args.batches:
            results.append(measure_cell(args, model, kind, batch))
            common.write(args.json, {"facts": facts, "cells": results})
        del model
        torch._dynamo.reset()
        common.release(args.device)
    print(report(sorted(results, key=lambda r: r["batch"])), end="\n\n")
    print("\n\n".join(common.report_errors(results)))


if __name__ == "__main__":
    main()
