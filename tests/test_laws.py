"""Laws of attention as a whole: what one output may depend on, and that runs repeat to the last bit."""

from __future__ import annotations

import dataclasses

import pytest
import tally
import torch
from hypothesis import strategies as st
from reference import QUANTITIES, Pattern, Reference, operator
from strategies import Inputs, Problem, law, problems
from torch import Tensor

POISON = st.sampled_from([float("nan"), float("inf"), -float("inf"), 6e4])
ROWS = ("out", "lse", "dq")  # have a query dimension
COLUMNS = ("dk", "dv", "dscores")  # have a key dimension
FEW_QUERIES = 8  # up to which CUDA has a kernel of its own, which splits keys, for calls that are not packed


def same_kernel(queries: int, device: torch.device) -> bool:
    """Whether a call of so many queries goes through the same kernel, and the same parts of the keys, as more do."""
    return device.type == "cpu" or queries > FEW_QUERIES


def contiguous(inputs: Inputs) -> Inputs:
    changes = {name: getattr(inputs, name).contiguous() for name in ("query", "key", "value", "scores", "grad_out")}
    return dataclasses.replace(inputs, **changes)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def rows_of(results: dict[str, Tensor], name: str, mask: Tensor) -> Tensor:
    """The entries of ``results[name]`` for the queries in ``mask [B, H, Mq]``."""
    return results[name][mask if name == "lse" else mask.transpose(1, 2)]


def columns_of(results: dict[str, Tensor], name: str, mask: Tensor) -> Tensor:
    """The entries of ``results[name]`` for the keys in ``mask [B, G, Mk]``."""
    return results[name][mask.transpose(1, 2)]


def replaced(inputs: Inputs, keys: Tensor, poison: float, what: str = "both") -> Inputs:
    """``inputs`` with ``poison`` in the keys and/or values in ``keys [B, G, Mk]``."""
    mask = keys.transpose(1, 2).unsqueeze(-1)
    names = ("key", "value") if what == "both" else (what,)
    return dataclasses.replace(inputs, **{name: getattr(inputs, name).masked_fill(mask, poison) for name in names})


@law(drawn=problems(causal=True), poison=POISON, cut=st.floats(0, 1), seed=st.integers(0, 1000))
def test_causality(drawn, device, poison, cut, seed):
    """Nothing at later positions, NaN included, reaches an output or an LSE, nor the gradient of its query."""
    inputs = contiguous(drawn.inputs(device))
    position = int(cut * max((mk for _, mk in drawn.lengths), default=0)) - 1
    pattern = Pattern(drawn, device)
    other = contiguous(dataclasses.replace(drawn, seed=seed, kind="integers and infinities").inputs(device))
    later_query = (pattern.position > position).view(1, -1, 1, 1)
    later_key = pattern.index > position
    changed = dataclasses.replace(
        inputs,
        query=torch.where(later_query, other.query, inputs.query),
        scores=torch.where(later_key.view(1, -1, 1), other.scores, inputs.scores),
    )
    changed = replaced(changed, later_key.expand(drawn.batch, drawn.groups, -1), poison)
    before, after = operator(drawn, inputs), operator(drawn, changed)
    earlier = (pattern.position <= position).expand(drawn.batch, drawn.heads, -1)
    for name in ROWS:
        assert same(rows_of(before, name, earlier), rows_of(after, name, earlier)), name
    if earlier.any() and later_key.any():
        tally.checked("rows before changes")


@law(drawn=problems(), poison=POISON)
def test_keys_that_no_query_sees_do_not_matter(drawn, device, poison):
    inputs = contiguous(drawn.inputs(device))
    unseen = ~(Reference(drawn, inputs).gates > 0).any(-2)
    before, after = operator(drawn, inputs), operator(drawn, replaced(inputs, unseen, poison))
    for name in QUANTITIES:
        assert same(before[name], after[name]), name
    if unseen.any():
        tally.checked("unseen keys")


@law(
    drawn=problems(),
    poison=POISON,
    what=st.sampled_from(["both", "key", "value"]),
    rate=st.sampled_from([0.01, 0.1, 0.5]),
    seed=st.integers(0, 1000),
)
def test_a_key_matters_to_nobody_who_does_not_see_it(drawn, device, poison, what, rate, seed):
    """Poisoned keys change the queries that see them, and the keys and scores that meet them there: nothing else."""
    inputs = contiguous(drawn.inputs(device))
    gen = torch.Generator().manual_seed(seed)
    poisoned = torch.rand(drawn.batch, drawn.groups, drawn.keys, generator=gen).to(device) < rate
    visible = Reference(drawn, inputs).gates > 0
    hit = (visible & poisoned.unsqueeze(-2)).any(-1)  # [B, G, Mq]
    met = (visible & hit.unsqueeze(-1)).any(-2)  # [B, G, Mk]: keys that some such query sees too
    before, after = operator(drawn, inputs), operator(drawn, replaced(inputs, poisoned, poison, what))

    clean = ~hit.repeat_interleave(drawn.ratio, 1)
    for name in ROWS:
        assert same(rows_of(before, name, clean), rows_of(after, name, clean)), name
    for name in ("dk", "dv"):
        assert same(columns_of(before, name, ~met), columns_of(after, name, ~met)), name
    untouched = ~hit.any(-1, keepdim=True).expand_as(met)  # groups of heads without such a query
    assert same(columns_of(before, "dscores", untouched), columns_of(after, "dscores", untouched))
    if hit.any() and not hit.all():
        tally.checked("clean rows beside poisoned ones")
    if met.any() and not met.all():
        tally.checked("clean keys beside poisoned ones")


@pytest.mark.parametrize("what, poison", [("key", torch.nan), ("value", torch.nan), ("value", torch.inf)])
def test_who_sees_nan_shows_it(what, poison, device):
    """In the output and in the gradient of the query, also among 150 other queries of its tile."""
    problem = Problem(
        lengths=((150, 150),), packed=False, batch=1, groups=1, ratio=2, width=4, value_width=3, dtype=torch.float32,
        score_dtype=torch.float32, kind="normal", spread=1.0, num_keys=20, window=2, causal=True, hard=False,
        scale=None, sharpness=1.0, layouts=("contiguous",) * 5, lse_grad=False, seed=0,
    )  # fmt: skip
    inputs = problem.inputs(device)
    visible = Reference(problem, inputs).gates > 0  # [1, 1, Mq, Mk]
    poisoned = torch.zeros(1, 1, problem.keys, dtype=torch.bool, device=device)
    poisoned[..., 30] = True
    hit = (visible & poisoned.unsqueeze(-2)).any(-1).repeat_interleave(problem.ratio, 1)
    assert hit.any() and not hit.all()
    after = operator(problem, replaced(inputs, poisoned, poison, what))
    for name in ("out", "dq"):
        finite = after[name].isfinite().all(-1).transpose(1, 2)
        assert torch.equal(finite, ~hit), name


@law(drawn=problems(kinds=("normal", "rising", "integers"), hard=False))
def test_score_gradients_of_keys_that_meet_no_nan(drawn, device):
    """Also within a group of heads: a sum over the fractional queries of a key holds no term of others."""
    inputs = contiguous(drawn.inputs(device))
    reference = Reference(drawn, inputs)
    visible = reference.gates > 0
    poisoned = torch.zeros(drawn.batch, drawn.groups, drawn.keys, dtype=torch.bool, device=device)
    poisoned[..., drawn.keys // 2 : drawn.keys // 2 + 1] = True
    hit = (visible & poisoned.unsqueeze(-2)).any(-1)
    clean = ~(visible & hit.unsqueeze(-1)).any(-2)
    before, after = operator(drawn, inputs), operator(drawn, replaced(inputs, poisoned, torch.nan))
    assert columns_of(after, "dscores", clean).isfinite().all()
    # Sums over other queries may round differently without the poisoned terms.
    mask = (~clean).transpose(1, 2)
    reference.check_agreement(
        {"dscores": after["dscores"].masked_fill(mask, 0)},
        {"dscores": before["dscores"].masked_fill(mask, 0)},
        ("dscores",),
    )
    if hit.any() and before["dscores"][~mask].any():
        tally.checked("clean gradients beside poisoned ones")


@law(0.6, drawn=problems(packed=False, causal=True), fewer=st.integers(1, 300))
def test_last_queries_alone(drawn, device, fewer):
    inputs = drawn.inputs(device)
    last = min(fewer, drawn.queries)
    first = drawn.queries - last
    alone = dataclasses.replace(drawn, lengths=((last, drawn.keys),))
    part = dataclasses.replace(
        inputs,
        query=inputs.query[:, first:],
        grad_out=inputs.grad_out[:, first:],
        grad_lse=None if inputs.grad_lse is None else inputs.grad_lse[:, :, first:],
    )
    rows = {"out": (slice(None), slice(first, None)), "lse": (..., slice(first, None))}
    Reference(drawn, inputs).check_agreement(
        operator(alone, part),
        operator(drawn, inputs),
        ROWS,
        {**rows, "dq": rows["out"]},
        same_kernel=same_kernel(alone.queries, device),
    )


@law(0.6, drawn=problems(packed=True))
def test_packed_equals_separate(drawn, device):
    inputs = drawn.inputs(device)
    reference, together = Reference(drawn, inputs), operator(drawn, inputs)
    for (rows, keys), lengths in zip(reference.pattern.slices(drawn), drawn.lengths, strict=True):
        one = dataclasses.replace(drawn, lengths=(lengths,), packed=False)
        part = Inputs(
            inputs.query[:, rows],
            inputs.key[:, keys],
            inputs.value[:, keys],
            inputs.scores[:, keys],
            inputs.grad_out[:, rows],
            None if inputs.grad_lse is None else inputs.grad_lse[..., rows],
            None,
        )
        where = {name: (slice(None), rows) for name in ("out", "dq")} | {name: (slice(None), keys) for name in COLUMNS}
        where["lse"] = (..., rows)
        alike = same_kernel(one.queries, device)
        reference.check_agreement(operator(one, part), together, QUANTITIES, where, same_kernel=alike)


@law(drawn=problems(packed=False, sizes=("small", "medium")), poison=POISON, which=st.sampled_from(["batch", "group"]))
def test_batch_entries_and_groups_are_apart(drawn, device, poison, which):
    """What the others hold, NaN included, does not change a bit of a batch entry or of a group of heads."""
    drawn = dataclasses.replace(drawn, batch=max(2, drawn.batch), groups=max(2, drawn.groups))
    inputs = contiguous(drawn.inputs(device))
    apart = torch.zeros(drawn.batch, drawn.groups, 1, dtype=torch.bool, device=device)
    if which == "batch":
        apart[0] = True
    else:
        apart[:, 0] = True
    other = dataclasses.replace(drawn, seed=drawn.seed + 1, kind="normal", spread=1.0).inputs(device)
    changed = dataclasses.replace(inputs, scores=torch.where(apart.transpose(1, 2), inputs.scores, other.scores))
    changed = replaced(changed, ~apart.expand(-1, -1, drawn.keys), poison)
    before, after = operator(drawn, inputs), operator(drawn, changed)
    rows = apart.repeat_interleave(drawn.ratio, 1).expand(-1, -1, drawn.queries)
    keys = apart.expand(-1, -1, drawn.keys)
    for name in QUANTITIES:
        of, mask = (rows_of, rows) if name in ROWS else (columns_of, keys)
        assert same(of(before, name, mask), of(after, name, mask)), name


@law(0.5, drawn=problems(packed=False, sizes=("small", "medium")))
def test_one_batch_entry_alone(drawn, device):
    drawn = dataclasses.replace(drawn, batch=2)
    inputs = drawn.inputs(device)
    tensors = [None if x is None else x[1:] for x in dataclasses.astuple(inputs)[:6]]
    alone = operator(dataclasses.replace(drawn, batch=1), Inputs(*tensors, None))
    part = dict.fromkeys(QUANTITIES, slice(1, None))
    together = operator(drawn, inputs)
    alike = same_kernel(drawn.queries, device)
    Reference(drawn, inputs).check_agreement(alone, together, QUANTITIES, part, same_kernel=alike)


@law(drawn=problems())
def test_layout_does_not_matter(drawn, device):
    inputs = drawn.inputs(device)
    strided, dense = operator(drawn, inputs), operator(drawn, contiguous(inputs))
    for name in QUANTITIES:
        assert same(strided[name], dense[name]), name


@law(drawn=problems(sizes=("small", "medium", "large")))
def test_runs_repeat_bit_for_bit(drawn, device):
    """On any number of threads, too."""
    inputs = drawn.inputs(device)
    first = operator(drawn, inputs)
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 5):
            torch.set_num_threads(count)
            again = operator(drawn, inputs)
            for name in QUANTITIES:
                assert same(first[name], again[name]), (name, count)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("zero", ["batch", "queries", "keys", "sequences"])
def test_nothing_to_do(zero, device):
    """Empty tensors give empty or zero results of the right shapes."""
    lengths = {"queries": ((0, 5),), "keys": ((5, 0),), "sequences": ()}.get(zero, ((5, 5),))
    problem = Problem(
        lengths=lengths, packed=zero == "sequences", batch=int(zero != "batch"), groups=2, ratio=2, width=4,
        value_width=3, dtype=torch.float32, score_dtype=torch.float32, kind="normal", spread=1.0, num_keys=2, window=1,
        causal=True, hard=False, scale=None, sharpness=1.0, layouts=("contiguous",) * 5, lse_grad=True, seed=0,
    )  # fmt: skip
    inputs = problem.inputs(device)
    results = operator(problem, inputs)
    assert results["out"].shape == inputs.grad_out.shape and (results["out"] == 0).all()
    assert (results["lse"] == -torch.inf).all()
    for name in ("dq", "dk", "dv", "dscores"):
        assert (results[name] == 0).all()
