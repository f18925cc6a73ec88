"""Generation through the cache gives what attention over the whole sequence gives."""

from __future__ import annotations

import dataclasses

import pytest
import tally
import torch
from hypothesis import strategies as st
from reference import Reference
from strategies import BF16, F16, F32, F64, Inputs, Problem, law, problems
from torch import Tensor

from xformers_sparsek import SparseKCache, sparsek, sparsek_attention
from xformers_sparsek.attention import attend, scale_of


def cache_of(problem: Problem, inputs: Inputs, **changes) -> SparseKCache:
    options = {"num_keys": problem.num_keys, "window": problem.window, "hard": problem.hard} | changes
    options.setdefault("capacity", problem.num_keys + problem.keys)  # never too small
    sizes = (problem.batch, problem.groups, problem.width, problem.value_width)
    return SparseKCache(*sizes, dtype=problem.dtype, device=inputs.query.device, **options)


def generate(cache: SparseKCache, inputs: Inputs, sizes: list[int], scale: float | None = None) -> Tensor:
    """Attends call by call: as many tokens as ``sizes`` says, then one by one."""
    tensors = (inputs.query, inputs.key, inputs.value, inputs.scores)
    length, start, outputs = inputs.query.shape[1], 0, []
    sizes = [*sizes, *[1] * length]
    while start < length:
        end = min(start + sizes.pop(0), length)
        outputs.append(cache.attend(*(x[:, start:end] for x in tensors), scale=scale))
        start = end
    return torch.cat(outputs, 1)


def as_sequence(problem: Problem) -> Problem:
    """The same with a query for each key."""
    length = min(max(problem.keys, 1), 60)
    return dataclasses.replace(problem, lengths=((length, length),), window=min(problem.window, length))


SIZES = st.lists(st.integers(1, 25), max_size=4)


@law(drawn=problems(causal=True, packed=False, sizes=("tiny", "small", "medium")), sizes=SIZES)
def test_tokens_through_the_cache(drawn, sizes, device):
    drawn = as_sequence(drawn)
    inputs = drawn.inputs(device)
    cache = cache_of(drawn, inputs)
    out = generate(cache, inputs, list(sizes), drawn.scale)
    Reference(drawn, inputs).check({"out": out}, ("out",))
    assert cache.lengths.tolist() == [drawn.queries] * drawn.batch
    assert not cache.overflow.any()


@law(0.5, drawn=problems(causal=True, packed=False, sizes=("small", "medium"), dtypes=(F64,)), cuts=st.data())
def test_prompts_of_unequal_lengths(drawn, cuts, device):
    drawn = as_sequence(drawn)
    inputs, length = drawn.inputs(device), drawn.queries
    prompt = cuts.draw(st.integers(1, length))
    padding = [cuts.draw(st.integers(0, prompt)) for _ in range(drawn.batch)]
    mask = torch.tensor([[i >= pad for i in range(prompt)] for pad in padding], device=device)
    cache = cache_of(drawn, inputs)
    tensors = (inputs.query, inputs.key, inputs.value, inputs.scores)
    first = cache.attend(*(x[:, :prompt] for x in tensors), scale=drawn.scale, mask=mask)
    rest = Inputs(*(x[:, prompt:] for x in tensors), None, None, None)
    out = torch.cat([first, generate(cache, rest, [], drawn.scale)], 1) if prompt < length else first
    options = {"window": drawn.window, "hard": drawn.hard, "scale": drawn.scale}
    for b, pad in enumerate(padding):
        alone = sparsek_attention(*(x[b : b + 1, pad:] for x in tensors), drawn.num_keys, **options)
        torch.testing.assert_close(out[b, pad:], alone[0], rtol=1e-9, atol=1e-11)
        assert not out[b, :pad].any()
    assert cache.lengths.tolist() == [length - pad for pad in padding]
    if any(padding):
        tally.checked("padding")


class Model:
    """One batch entry and head of a cache that forgets, in a few lines."""

    def __init__(self, num_keys: int, window: int, capacity: int, hard: bool) -> None:
        self.num_keys, self.window, self.capacity, self.hard = num_keys, window, capacity, hard
        self.kept: list[tuple[int, float]] = []  # position and score
        self.latest: list[tuple[int, float]] = []
        self.overflow = 0

    def append(self, position: int, score: float) -> dict[int, float]:
        """The gates of what a token's query sees, by position."""
        self.latest.append((position, score))
        if len(self.latest) > self.window:
            self.kept.append(self.latest.pop(0))
        scores = torch.tensor([score for _, score in self.kept], dtype=F64)
        if self.hard:
            order = sorted(range(len(self.kept)), key=lambda i: (-self.kept[i][1], self.kept[i][0]))[: self.num_keys]
            gates = [float(i in order) for i in range(len(self.kept))]
        else:
            gates = sparsek(scores, self.num_keys).tolist() if self.kept else []
        seen = {position: gate for (position, _), gate in zip(self.kept, gates) if gate > 0}
        self.kept = [entry for entry in self.kept if entry[0] in seen]
        if len(self.kept) > self.capacity:
            self.kept.remove(min(self.kept, key=lambda entry: (entry[1], -entry[0])))
            self.overflow += 1
        return seen | {position: 1.0 for position, _ in self.latest}


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_keys_beyond_the_capacity(hard, window, spread, device):
    torch.manual_seed(0)
    length, num_keys, capacity = 50, 4, 6
    tensors = [torch.randn(1, length, 1, 8, dtype=F64, device=device) for _ in range(3)]
    scores = torch.randn(1, length, 1, dtype=F64, device=device) * spread
    cache = SparseKCache(
        1, 1, 8, num_keys=num_keys, window=window, capacity=capacity, hard=hard, dtype=F64, device=device
    )
    model = Model(num_keys, window, capacity, hard)
    query, key, value = (x[0, :, 0] for x in tensors)
    for t in range(length):
        seen = model.append(t, scores[0, t, 0].item())
        places = torch.tensor(list(seen), device=device)
        gates = torch.tensor(list(seen.values()), dtype=F64, device=device)
        weights = torch.softmax(key[places] @ query[t] * 8**-0.5 + gates.log(), 0)
        mask = torch.ones(1, 1, dtype=torch.bool, device=device) if t % 5 == 4 else None  # takes the way of prompts
        out = cache.attend(*(x[:, t : t + 1] for x in tensors), scores[:, t : t + 1], mask=mask)
        torch.testing.assert_close(out[0, 0, 0], weights @ value[places], rtol=1e-9, atol=1e-11)
        assert cache.overflow.item() == model.overflow
    assert hard or spread > 1 or model.overflow > 0


def test_pinned_keys_stay(device):
    torch.manual_seed(1)
    length = 40
    tensors = [torch.randn(1, length, 2, 8, dtype=F64, device=device) for _ in range(3)]
    scores = torch.randn(1, length, 2, dtype=F64, device=device)
    scores[:, :3] = torch.inf
    scores[:, 5] = -torch.inf
    cache = SparseKCache(1, 2, 8, num_keys=2, window=4, capacity=5, dtype=F64, device=device)
    out = torch.cat([cache.attend(*(x[:, t : t + 1] for x in (*tensors, scores))) for t in range(length)], 1)
    torch.testing.assert_close(out, sparsek_attention(*tensors, scores, 2, window=4), rtol=1e-9, atol=1e-11)


def test_memory_does_not_grow(device):
    cache = SparseKCache(1, 2, 8, num_keys=4, window=8, device=device)
    before = cache.nbytes
    for _ in range(5):
        cache.attend(
            *(torch.randn(1, 100, 2, 8, device=device) for _ in range(3)), torch.randn(1, 100, 2, device=device)
        )
    assert cache.nbytes == before == 2 * (9 + 8) * (2 * 8 + 1) * 4 + 2 * 8 * 4 + 2 * 9 * 4 + 2 * (4 + 8 + 8)
    assert cache.lengths.tolist() == [500]


def test_reset_and_reorder(device):
    torch.manual_seed(2)
    tensors = [torch.randn(3, 30, 2, 8, dtype=F64, device=device) for _ in range(3)]
    scores = torch.randn(3, 30, 2, dtype=F64, device=device)
    inputs = Inputs(*tensors, scores, None, None, None)
    cache = SparseKCache(3, 2, 8, num_keys=4, window=3, dtype=F64, device=device)
    out = generate(cache, inputs, [10])
    cache.reset()
    assert torch.equal(generate(cache, inputs, [10]), out)
    cache.reset()
    order = torch.tensor([2, 0, 0], device=device)
    generate(cache, Inputs(*(x[:, :20] for x in tensors), scores[:, :20], None, None, None), [10])
    cache.reorder(order)
    rest = Inputs(*(x[order, 20:] for x in tensors), scores[order, 20:], None, None, None)
    assert torch.equal(generate(cache, rest, []), out[order, 20:])


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_opcheck(hard, device):
    cache = SparseKCache(2, 2, 8, num_keys=4, window=3, hard=hard, dtype=F64, device=device)
    x, u = torch.randn(2, 1, 2, 8, dtype=F64, device=device), torch.randn(2, 1, 2, dtype=F64, device=device)
    torch.library.opcheck(torch.ops.xformers_sparsek.append.default, (x, x, u, *cache.tensors(), 4, 3, hard))


def test_operator_refuses_what_does_not_fit(device):
    cache = SparseKCache(2, 2, 8, num_keys=4, window=3, dtype=F64, device=device)
    x, u = torch.randn(2, 1, 2, 8, dtype=F64, device=device), torch.randn(2, 1, 2, dtype=F64, device=device)
    good = [x, x, u, *cache.tensors(), 4, 3, False]
    for i in range(len(good) - 3):
        for damaged in (good[i][:1], good[i].to(torch.int16), good[i].flatten()):
            with pytest.raises(RuntimeError, match="must"):
                torch.ops.xformers_sparsek.append(*good[:i], damaged, *good[i + 1 :])
    for bad in ((0, 3), (4, -1), (9, 3), (4, 2)):
        with pytest.raises(RuntimeError, match=r"needs|must"):
            torch.ops.xformers_sparsek.append(*good[:-3], *bad, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_keys": 0}, "num_keys must be at least 1"),
        ({"window": -1}, "window must be at least 0"),
        ({"capacity": 3}, "capacity must be at least num_keys = 4"),
        ({"dtype": torch.int32}, "dtype must be float64"),
        ({"hard": 1}, "hard must be True or False"),
        ({"batch": 0, "key_dim": 0}, "batch must be at least 1"),
    ],
)
def test_caches_that_make_no_sense(changes, message):
    arguments = {"batch": 1, "num_groups": 2, "key_dim": 8, "num_keys": 4} | changes
    with pytest.raises(ValueError, match=message):
        SparseKCache(**arguments)


def test_tokens_that_do_not_fit(device):
    cache = SparseKCache(2, 2, 8, num_keys=4, device=device)
    x, u = torch.randn(2, 3, 2, 8, device=device), torch.randn(2, 3, 2, device=device)
    with pytest.raises(ValueError, match="the cache is made for"):
        cache.attend(x[:1], x[:1], x[:1], u[:1])
    with pytest.raises(ValueError, match="query has 2 tokens, key has 3"):
        cache.attend(x[:, :2], x, x, u)
    with pytest.raises(ValueError, match="mask must be bool"):
        cache.attend(x, x, x, u, mask=torch.ones(2, 3, device=device))
    if device.type == "cpu":
        with pytest.raises(ValueError, match="NaN"):
            cache.attend(x, x, x, u * torch.nan)
    assert cache.lengths.tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------- the kernel on a GPU


@pytest.mark.cuda
@law(
    2.0,
    drawn=problems(packed=False, dtypes=(BF16, F16)),
    widths=st.tuples(*[st.sampled_from([8, 16, 40, 64, 72, 96, 128, 128])] * 2),
    queries=st.integers(1, 8),
)
def test_decode_kernel(drawn, widths, queries):
    queries = min(queries, max(drawn.queries, 1))
    layouts = tuple(y if y != "strided" else "contiguous" for y in drawn.layouts)
    drawn = dataclasses.replace(
        drawn, lengths=((queries, drawn.keys),), width=widths[0], value_width=widths[1], layouts=layouts
    )
    inputs = drawn.inputs("cuda")
    tensors = (inputs.query, inputs.key, inputs.value, inputs.scores)
    options = (drawn.num_keys, drawn.window, drawn.causal, drawn.hard, None, None)
    out, lse = attend(*tensors, *options, scale_of(inputs.query, drawn.scale), forward_kernel="decode")
    Reference(drawn, inputs).check({"out": out, "lse": lse}, ("out", "lse"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_decoding_in_a_graph(dtype):
    torch.manual_seed(3)
    length, sizes = 300, (2, 4, 64)
    query = torch.randn(2, length, 8, 64, device="cuda", dtype=dtype)
    key, value = (torch.randn(2, length, 4, 64, device="cuda", dtype=dtype) for _ in range(2))
    scores = torch.randn(2, length, 4, device="cuda") * 4
    inputs = Inputs(query, key, value, scores, None, None, None)
    eager = generate(SparseKCache(*sizes, num_keys=32, window=8, dtype=dtype, device="cuda"), inputs, [100])
    cache = SparseKCache(*sizes, num_keys=32, window=8, dtype=dtype, device="cuda")
    generate(cache, Inputs(*(x[:, :100] for x in (query, key, value, scores)), None, None, None), [100])
    token = [x[:, 100:101].clone() for x in (query, key, value, scores)]
    first = cache.attend(*token)  # loads code, and appends the token
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cache.attend(*token)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    outputs = [first]
    for t in range(101, length):
        for static, x in zip(token, (query, key, value, scores)):
            static.copy_(x[:, t : t + 1])
        graph.replay()
        outputs.append(out.clone())
    assert torch.equal(torch.cat(outputs, 1), eager[:, 100:])
    assert cache.lengths.tolist() == [length] * 2
