"""What the GPU benchmarks share: inputs, calls of ours and of the peers, timing, rates of the machine, reports.

Times are medians over bursts of launches between two CUDA events. A burst waits behind a sleeping kernel until the
host has queued all of it, so that it measures the device and not Python; its launches take turns on copies of the
inputs that together exceed the L2 cache several times. Calls that are compared run in turns too, burst by burst, so
that a slow spell of the machine falls on all of them. With ``--device cpu`` the same code runs on the host's clock:
that tests the scripts, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib.metadata
import json
import logging
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
from torch.nn.attention import SDPBackend, sdpa_kernel

# xFormers warns on import where its own compiled operators do not load; none of them is used here.
logging.getLogger("xformers").setLevel(logging.ERROR)

import xformers_sparsek  # noqa: E402
from xformers_sparsek import sparsek, sparsek_attention  # noqa: E402

RESULTS = Path(__file__).parent / "results"
NEVER = 2**31 - 1  # the expiry of a key that is never dropped
DENSE = ("cudnn", "flash2", "flash4")
TITLES = {
    "cudnn": "cuDNN (SDPA)",
    "flash2": "FlashAttention-2 (SDPA)",
    "flash4": "FlashAttention-4",
    "flex": "FlexAttention, same pattern",
}
BURST_MS = 2.0  # bursts are at least as long as this, to dwarf what two events cost
MOST_LAUNCHES = 50  # of a burst: more would fill the launch queue while its head sleeps
FEWEST_ROUNDS = 3

Call = Callable[[int], object]  # the argument says which copy of the inputs


# -------------------------------------------------------------------------------------------------------------- inputs


class Case:
    """One problem: copies of its inputs that take turns."""

    def __init__(
        self,
        device: torch.device,
        *,
        length: int,
        heads: int,
        width: int,
        k: int,
        groups: int | None = None,
        batch: int = 1,
        causal: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        spread: float = 4.0,
        rising: bool = False,
    ) -> None:
        self.device, self.batch, self.length, self.heads, self.width = device, batch, length, heads, width
        self.groups, self.k, self.causal, self.dtype = groups or heads, k, causal, dtype
        generator = torch.Generator(device).manual_seed(length)

        def normal(count: int) -> Tensor:
            shape = (batch, length, count, width)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        def scores() -> Tensor:
            shape = (batch, length, self.groups)
            if not rising:
                return torch.randn(shape, generator=generator, device=device) * spread
            steps = torch.arange(length, device=device, dtype=torch.float32)[:, None]
            return steps + torch.rand(shape, generator=generator, device=device)

        bytes_of_one = 4 * batch * length * heads * width * dtype.itemsize
        copies = -(-3 * l2_bytes(device) // bytes_of_one)
        self.copies = [
            (normal(heads), normal(self.groups), normal(self.groups), scores()) for _ in range(min(max(copies, 1), 8))
        ]
        # One gradient of the output serves all copies: it is a small part of what a backward pass reads.
        self.grad_out = normal(heads)

    def describe(self) -> dict:
        names = ("batch", "length", "heads", "groups", "width", "k", "causal")
        return {name: getattr(self, name) for name in names} | {"dtype": str(self.dtype).removeprefix("torch.")}

    def with_k(self, k: int) -> Case:
        """The same problem on the same inputs, with another number of keys to keep."""
        other = copy.copy(self)
        other.k = k
        return other

    def select(self, i: int) -> tuple[Tensor, Tensor]:
        """Thresholds of the queries and expiries of the keys."""
        scores = self.copies[i][3]
        return torch.ops.xformers_sparsek.select(scores, None, None, self.length, self.k, 0, self.causal, False)

    def pairs(self) -> dict[str, int]:
        """Pairs of query and key, over all heads: those of dense attention and those with a gate above 0."""
        _, expiry = self.select(0)
        if self.causal:  # key j is seen by queries j .. expiry - 1
            begin = torch.arange(self.length, device=self.device)
            seen = int((expiry.long().clamp(max=self.length) - begin).clamp(min=0).sum())
            per_head = self.length * (self.length + 1) // 2
        else:
            seen = int((expiry == NEVER).sum()) * self.length
            per_head = self.length**2
        return {"dense": self.batch * self.heads * per_head, "sparse": seen * (self.heads // self.groups)}

    def largest_error(self) -> float:
        """Largest difference of our output from float64, at some queries of the first and the last head, relative to
        the largest output there."""
        query, key, value, scores = self.copies[0]
        out = sparse_calls(self)["forward"](0)
        differences, sizes = [], []
        for head in {0, self.heads - 1}:
            group = head * self.groups // self.heads
            for i in {min(i, self.length - 1) for i in (0, self.k // 2, 2 * self.k, self.length // 2, self.length)}:
                seen = i + 1 if self.causal else self.length
                gates = sparsek(scores[:, :seen, group].double(), self.k)
                logits = torch.einsum("bk,bjk->bj", query[:, i, head].double(), key[:, :seen, group].double())
                weights = torch.softmax(logits * self.width**-0.5 + gates.log(), -1)
                expected = torch.einsum("bj,bjk->bk", weights, value[:, :seen, group].double())
                differences.append((out[:, i, head].double() - expected).abs().max())
                sizes.append(expected.abs().max())
        return float(torch.stack(differences).max() / torch.stack(sizes).max())


def l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 16
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)


def size_of(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# --------------------------------------------------------------------------------------------------------------- calls


def sparse_calls(case: Case, kernel: str | None = None) -> dict[str, Call]:
    """Our calls: ``forward`` is the whole of it, from scores to output; ``attend`` and ``backward`` are the operators
    alone, on thresholds and outputs from before."""
    operators = torch.ops.xformers_sparsek
    options = (None, None, 0, case.causal, False, case.width**-0.5)
    chosen: dict[int, tuple[Tensor, Tensor]] = {}
    outputs: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return sparsek_attention(*case.copies[i], case.k, causal=case.causal)

    def forward_with(i: int, name: str | None) -> tuple[Tensor, Tensor]:
        if i not in chosen:
            chosen[i] = case.select(i)
        with torch.no_grad():
            return operators.forward(*case.copies[i], *chosen[i], *options, None, name)

    def attend(i: int) -> tuple[Tensor, Tensor]:
        return forward_with(i, kernel)

    def backward(i: int) -> tuple[Tensor, ...]:
        if i not in outputs:  # of whichever kernel: those of backward are compared on the same inputs
            outputs[i] = forward_with(i, None)
        return operators.backward(case.grad_out, None, *case.copies[i], *outputs[i], *chosen[i], *options, kernel)

    return {"forward": forward, "select": case.select, "attend": attend, "backward": backward}


def dense_calls(peer: str, case: Case) -> dict[str, Call]:
    """Forward and backward of a dense peer, in the layout that it likes best."""
    if peer == "flash4":
        from flash_attn.cute import flash_attn_func

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = flash_attn_func(query, key, value, causal=case.causal)
            return out[0] if isinstance(out, tuple) else out

        def arrange(x: Tensor) -> Tensor:
            return x

    else:
        backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}[peer]
        grouped = case.groups != case.heads

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=case.causal, enable_gqa=grouped)

        def arrange(x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous()

    return differentiated(case, attention, arrange)


def flex_calls(case: Case) -> dict[str, Call]:
    """FlexAttention with our pattern as it is: gates in ``score_mod``, keys seen in ``mask_mod``.

    Selection and the block mask are made before, and scores get no gradient: the peer is measured at its best.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    threshold, expiry = case.select(0)
    scores = case.copies[0][3].transpose(1, 2).contiguous()
    ratio = case.heads // case.groups

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < expiry[b, h // ratio, j])

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        gate = (scores[b, h // ratio, j] - threshold[b, h // ratio, i]).clamp(0.0, 1.0)
        return score + gate.log()

    torch.compiler.reset()  # a graph per length: one with dynamic lengths would be slower
    mask = create_block_mask(
        mask_mod,
        case.batch,
        case.heads,
        case.length,
        case.length,
        str(case.device),
        _compile=case.device.type == "cuda",
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, score_mod=score_mod, block_mask=mask, enable_gqa=ratio > 1)

    calls = differentiated(case, attention, lambda x: x.transpose(1, 2).contiguous())
    return {name: lambda _, call=call: call(0) for name, call in calls.items()}


def differentiated(
    case: Case, attention: Callable[..., Tensor], arrange: Callable[[Tensor], Tensor]
) -> dict[str, Call]:
    """Forward and backward of a differentiable function of query, key and value."""
    inputs = [[arrange(x) for x in tensors[:3]] for tensors in case.copies]
    grad_out = arrange(case.grad_out)
    graphs: dict[int, tuple[list[Tensor], Tensor]] = {}

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return attention(*inputs[i])

    def backward(i: int) -> tuple[Tensor, ...]:
        if i not in graphs:
            leaves = [x.detach().requires_grad_() for x in inputs[i]]
            graphs[i] = leaves, attention(*leaves)
        leaves, out = graphs[i]
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return {"forward": forward, "backward": backward}


class Captured:
    """A CUDA graph of one call on every copy of the inputs in turn; on other devices, these calls."""

    def __init__(self, call: Call, case: Case) -> None:
        self.copies = range(len(case.copies))
        self.call, self.graph = call, None
        for i in self.copies:
            call(i)
        if case.device.type == "cuda":
            torch.cuda.synchronize(case.device)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.held = [call(i) for i in self.copies]

    def __call__(self, _: int) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for i in self.copies:
                self.call(i)


# ---------------------------------------------------------------------------------------------------------------- time


def reason(error: Exception) -> str:
    """An exception in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {lines[0] if lines else ''}"[:160]


def attempt(make: Callable, *arguments: object, **options: object) -> tuple[object, str | None]:
    """The result of a call, and why there is none."""
    try:
        return make(*arguments, **options), None
    except Exception as error:
        # The traceback holds the frames and these the memory.
        return None, reason(error.with_traceback(None))


def release(device: torch.device) -> None:
    """Gives back what is no longer used, autograd's reference cycles included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Stopwatch:
    """Times bursts of one call."""

    def __init__(self, call: Call, copies: int, device: torch.device) -> None:
        self.call, self.copies, self.device, self.turn = call, copies, device, 0
        for _ in range(max(copies, 2)):
            self.next()
        self.synchronize()
        began = time.perf_counter()
        self.next()
        self.host_seconds = time.perf_counter() - began
        self.synchronize()
        self.estimate = self.burst(1)

    def next(self) -> None:
        self.call(self.turn)
        self.turn = (self.turn + 1) % self.copies

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def burst(self, launches: int) -> float:
        """Milliseconds per launch."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(launches):
                self.next()
            return 1000 * (time.perf_counter() - began) / launches
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait = min(0.1, 1.5 * launches * self.host_seconds + 1e-4)
        torch.cuda._sleep(int(wait * 2e9))  # cycles, of a clock below 2 GHz
        begin.record()
        for _ in range(launches):
            self.next()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / launches


def measure(
    calls: dict[str, Call],
    device: torch.device,
    copies: int,
    *,
    label: str = "",
    total_ms: float = 20.0,
    limit_ms: float = 1500.0,
) -> dict[str, dict]:
    """Per call, which takes turns on ``copies`` of its inputs, its median time in ``ms``, or the ``error``.

    At least ten bursts that take ``total_ms`` together; fewer, but three, where they would take more than ``limit_ms``.
    """
    results: dict[str, dict] = {}
    plans: dict[str, tuple[Stopwatch, int, int]] = {}
    for name, call in calls.items():
        show(f"{label}: warming up {name}")
        watch, error = attempt(Stopwatch, call, copies, device)
        if watch is None:
            results[name] = {"error": error}
            release(device)
            continue
        launches = min(MOST_LAUNCHES, max(1, round(BURST_MS / watch.estimate)))
        burst_ms = launches * watch.estimate
        rounds = max(10, round(total_ms / burst_ms))
        plans[name] = watch, launches, max(FEWEST_ROUNDS, min(rounds, int(limit_ms / burst_ms)))
    samples: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(max((rounds for _, _, rounds in plans.values()), default=0)):
        show(f"{label}: round {turn + 1}")
        for name, (watch, launches, rounds) in plans.items():
            if turn < rounds and name not in results:
                sample, error = attempt(watch.burst, launches)
                if sample is None:
                    results[name] = {"error": error}
                else:
                    samples[name].append(sample)
    show("")
    for name, (_, launches, _) in plans.items():
        if name not in results:
            values = samples[name]
            results[name] = {"ms": statistics.median(values), "launches": launches * len(values), "samples": values}
    return {name: results[name] for name in calls}


def rates(device: torch.device) -> dict[str, float]:
    """What the machine moves and multiplies: bytes read and written per second of a copy, operations per second."""
    gpu = device.type == "cuda"
    source = torch.zeros((1 << 30) if gpu else (1 << 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if gpu else 256
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    calls = {"copy": lambda _: target.copy_(source), "matmul": lambda _: torch.mm(left, right, out=product)}
    times = measure(calls, device, 1, label="rates", total_ms=50)
    return {
        "copy_bytes_per_second": 2 * source.numel() / times["copy"]["ms"] * 1e3,
        "matmul_flops_per_second": 2 * side**3 / times["matmul"]["ms"] * 1e3,
    }


# -------------------------------------------------------------------------------------------------------------- report


def arguments(doc: str, name: str, quick: dict, add: Callable[[argparse.ArgumentParser], None]) -> argparse.Namespace:
    """The command line; ``quick`` are the defaults under ``--quick``. Ends the script where there is no such device."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add(parser)
    parser.add_argument("--quick", action="store_true", help=f"under a minute: {quick}")
    parser.add_argument("--device", default="cuda", help="cpu only tests this script")
    parser.add_argument("--commit", help="what was measured, where git cannot say it")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="where the figures go")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).name}: PyTorch sees no CUDA device, nothing is measured", file=sys.stderr)
        sys.exit(0)
    return args


def environment(args: argparse.Namespace) -> dict:
    """What the figures depend on besides the code."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    found, _ = attempt(subprocess.run, git, capture_output=True, text=True, check=True)

    def version(package: str) -> str | None:
        return attempt(importlib.metadata.version, package)[0]

    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": args.commit or (found.stdout.strip() if found else None),
        "device": platform.processor() or "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": version("triton"),
        "flash_attn_4": version("flash-attn-4"),
        "xformers_sparsek": xformers_sparsek.__version__,
    }
    if args.device.type == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        facts["device"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_bytes"] = properties.total_memory
    return facts


def show(line: str) -> None:
    """Replaces what the terminal's last line says about progress; says nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{line:<70}", end="" if line else "\r", file=sys.stderr, flush=True)


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first being the head, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float | None, digits: int = 3) -> str:
    """Some significant digits; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def size_name(length: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def verdict(what: str, value: float | None, least: float, aim: float, more_is_better: bool = True) -> dict:
    """A figure with its two targets: below the first it is not done."""
    sign = 1 if more_is_better else -1
    met = None
    if value is not None:
        met = "aim" if sign * value >= sign * aim else "yes" if sign * value >= sign * least else "no"
    return {"what": what, "value": value, "least": least, "aim": aim, "more_is_better": more_is_better, "met": met}


def report_verdicts(verdicts: list[dict]) -> str:
    rows = [["figure", "measured", "at least", "aim", "met"]]
    for v in verdicts:
        sign = ">=" if v["more_is_better"] else "<="
        targets = [f"{sign} {v[name]:g}" for name in ("least", "aim")]
        rows.append([v["what"], number(v["value"]), *targets, v["met"] or "not measured"])
    return table(rows)


def report_errors(results: list[dict]) -> list[str]:
    """What could not be measured, and why: no text or one, with a line per reason."""
    cases: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if "error" in result:
            cases.setdefault(("all", result["error"]), []).append(result["label"])
        for name, timing in result.get("times", {}).items():
            if "error" in timing:
                cases.setdefault((name, timing["error"]), []).append(result["label"])
    lines = [f"{name}: {error} ({', '.join(labels)})" for (name, error), labels in cases.items()]
    return ["\n".join(["not measured", *lines])] if lines else []


def write(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def print_facts(facts: dict) -> None:
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n", flush=True)
