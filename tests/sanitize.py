#!/usr/bin/env python3
"""Runs every CUDA kernel on small inputs, for compute-sanitizer to watch (`make sanitize`).

Results are not looked at beyond being finite: the tests do that. Each call covers what a kernel treats apart: lists,
windows, keys that enter, hard selection, several heads of a group, packed sequences, rows narrower than a kernel's, and
values that are not finite, which take the careful second passes.
"""

from __future__ import annotations

import argparse
import itertools

import torch

import xformers_sparsek

OPS = torch.ops.xformers_sparsek
DEVICE = torch.device("cuda")
WIDTHS = {"sm90": (40, 64, 128), "sm80": (40, 64, 128, 192, 256), "simt": (40,)}
PATTERNS = {  # keys to keep, window, causal, hard
    "soft": (40, 0, True, False),
    "window": (40, 33, True, False),
    "hard": (40, 17, True, True),
    "all see the same": (40, 0, False, False),
}


def run(
    kernel: str,
    width: int,
    pattern: tuple[int, int, bool, bool],
    *,
    packed: bool,
    poisoned: bool,
    backward: bool = True,
) -> None:
    """One forward and, if wanted, one backward pass."""
    batch, length, groups, heads = (1, 700, 2, 4) if packed else (2, 350, 2, 4)
    num_keys, window, causal, hard = pattern
    dtype = torch.float32 if kernel == "simt" else torch.bfloat16
    cu = torch.tensor([0, 1, 300, 300, length], dtype=torch.int32, device=DEVICE) if packed else None
    query, grad = (torch.randn(batch, length, heads, width, device=DEVICE, dtype=dtype) for _ in range(2))
    key, value = (torch.randn(batch, length, groups, width, device=DEVICE, dtype=dtype) for _ in range(2))
    scores = 4 * torch.randn(batch, length, groups, device=DEVICE)
    if poisoned:
        value[:, 7] = torch.inf
    threshold, expiry = OPS.select(scores, cu, cu, length, num_keys, window, causal, hard)
    inputs = (query, key, value, scores)
    rest = (threshold, expiry, cu, cu, window, causal, hard, width**-0.5)
    out, lse = OPS.forward(*inputs, *rest, None, kernel, None)
    gradients = OPS.backward(grad, None, *inputs, out, lse, *rest, kernel) if backward else ()
    torch.cuda.synchronize()
    if not poisoned:
        assert all(x.isfinite().all() for x in (out, *gradients)), (kernel, width, pattern)


def generate(dtype: torch.dtype, hard: bool, window: int) -> None:
    """A prompt and a few tokens through a cache, with the kernel for few queries where it takes the dtype."""
    cache = xformers_sparsek.SparseKCache(2, 2, 64, num_keys=40, window=window, hard=hard, dtype=dtype, device=DEVICE)
    for tokens in (100, 1, 1, 1):
        query = torch.randn(2, tokens, 6, 64, device=DEVICE, dtype=dtype)
        key, value = (torch.randn(2, tokens, 2, 64, device=DEVICE, dtype=dtype) for _ in range(2))
        out = cache.attend(query, key, value, 4 * torch.randn(2, tokens, 2, device=DEVICE))
        assert out.isfinite().all(), (dtype, hard, window)


def main() -> None:
    kernels = [k for k in WIDTHS if k != "sm90" or torch.cuda.get_device_capability() == (9, 0)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="*", choices=kernels, default=kernels, help="which of them to run")
    parser.add_argument("--widths", type=int, nargs="*", help="head dimensions, of those that there are")
    parser.add_argument("--patterns", nargs="*", choices=PATTERNS, default=list(PATTERNS), help="which of them to run")
    parser.add_argument("--forward", action="store_true", help="no backward passes")
    args = parser.parse_args()
    torch.manual_seed(0)
    for dtype, hard, window in itertools.product((torch.bfloat16, torch.float32), (False, True), (0, 9)):
        print(f"generation {dtype} hard={hard} window={window}", flush=True)
        generate(dtype, hard, window)
    for kernel in args.kernels:
        widths = [w for w in WIDTHS[kernel] if args.widths is None or w in args.widths]
        for width, name in itertools.product(widths, args.patterns):
            for packed, poisoned in ((False, False), (True, False), (False, True)):
                print(f"{kernel} {width} {name}{' packed' * packed}{' poisoned' * poisoned}", flush=True)
                run(kernel, width, PATTERNS[name], packed=packed, poisoned=poisoned, backward=not args.forward)


if __name__ == "__main__":
    main()
