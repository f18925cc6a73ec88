"""What the add-on does to xFormers itself: registration, imports, other add-ons, compilation; with either layout."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable

import pytest
import torch
import xformers
import xformers.ops as xops
from torch import Tensor
from xformers.ops import fmha
from xformers_case import Case, attend, check, make, results

from xformers_sparsek import SparseKBias
from xformers_sparsek.xformers_ops import BACKWARD_OPERATORS, CPU, FORWARD_OPERATORS, SIMT

# Inductor compiles C++ that includes Python.h, which a machine that only runs Python programs does not have.
HAS_PYTHON_HEADERS = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
COMPILED = [
    pytest.param("aot_eager", True, id="aot_eager, op by hand"),
    pytest.param("aot_eager", False, id="aot_eager, op=None"),
    pytest.param(
        "inductor",
        False,
        id="inductor, op=None",
        marks=pytest.mark.skipif(not HAS_PYTHON_HEADERS, reason="inductor needs Python.h"),
    ),
]

# Preludes of the programs below: another add-on, with an operator and a bias of its own, hooked into the dispatcher.
ADD_ON = """
import sys, torch
import xformers.ops as xops
from xformers.ops import fmha

core = sys.modules[xops.memory_efficient_attention.__module__]
dispatch = sys.modules[core._dispatch_fw.__module__]
common = sys.modules[core.Inputs.__module__]

class OtherBias(core.AttentionBias):
    pass

class OtherFw(common.AttentionFwOpBase):
    NAME, OPERATOR, SUPPORTED_DEVICES, SUPPORTED_DTYPES = "otherF", True, {"cpu"}, {torch.float32}
    SUPPORTED_MAX_K, SUPPORTS_DROPOUT, SUPPORTED_ATTN_BIAS_TYPES = 64, False, (type(None), OtherBias)

    @classmethod
    def apply(cls, inp, needs_gradient):
        q, k, v = (x.transpose(1, 2) for x in (inp.query, inp.key, inp.value))
        logits = q @ k.mT * inp.scale_float
        out = (logits.softmax(-1) @ v).transpose(1, 2).contiguous()
        return out, common.Context(lse=logits.logsumexp(-1), out=out) if needs_gradient else None

class OtherBw(common.AttentionBwOpBase):
    NAME, OPERATOR, SUPPORTED_DEVICES, SUPPORTED_DTYPES = "otherB", True, {"cpu"}, {torch.float32}
    SUPPORTED_MAX_K, SUPPORTS_DROPOUT, SUPPORTED_ATTN_BIAS_TYPES = 64, False, (type(None), OtherBias)

    @classmethod
    def apply(cls, ctx, inp, grad):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (inp.query, inp.key, inp.value)]
            out = OtherFw.apply(common.Inputs(*leaves, scale=inp.scale), False)[0]
        return common.Gradients(*torch.autograd.grad(out, leaves, grad))

def hook_add_on(claims):
    inner = dispatch._run_priority_list
    def run_priority_list(name, priority_list, inp, *args, **kwargs):
        if claims(inp.attn_bias):
            priority_list = [OtherBw if "backward" in name else OtherFw, *priority_list]
        return inner(name, priority_list, inp, *args, **kwargs)
    dispatch._run_priority_list = run_priority_list

torch.manual_seed(0)
q, k, v = (torch.randn(2, 5, 3, 8, requires_grad=True) for _ in range(3))
scores = torch.randn(2, 5, 3, requires_grad=True)

def gradients(bias, *leaves, **options):
    out = xops.memory_efficient_attention(q, k, v, bias, **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
"""


@functools.cache
def run_program(*parts: str) -> str:
    """What a fresh Python process prints that runs ``parts``, one after the other."""
    source = "\n".join(textwrap.dedent(part) for part in parts)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -------------------------------------------------------------------------------------------------------- registration


def test_operators_are_listed() -> None:
    for forward in FORWARD_OPERATORS:
        assert fmha.ALL_FW_OPS.count(forward) == 1
    for backward in BACKWARD_OPERATORS:
        assert fmha.ALL_BW_OPS.count(backward) == 1
    core = sys.modules[xops.memory_efficient_attention.__module__]
    assert core.ALL_FW_OPS is fmha.ALL_FW_OPS
    printed = run_program("import xformers_sparsek, xformers.info; xformers.info.print_info()")
    status = dict(line.split(":", 1) for line in printed.splitlines() if ":" in line)
    ours = [*FORWARD_OPERATORS, *BACKWARD_OPERATORS]
    names = ["F-decode", *(f"{way}-{name}" for name in ("sm90", "sm80", "simt", "cpu") for way in "FB")]
    assert sorted(x.NAME for x in ours) == sorted(f"sparsek{name}" for name in names)
    for operator in ours:
        expected = "available" if operator.is_available() else "unavailable"
        assert status[f"memory_efficient_attention.{operator.NAME}"].strip() == expected
    assert all(operator.is_available() for operator in CPU)


def test_layout_under_test() -> None:
    """The environment's mslk layout is really that, and the other is really xFormers' own code."""
    owner = xops.memory_efficient_attention.__module__
    if "standin" in xformers.__version__:
        assert owner == "mslk.attention.fmha"
        importlib.import_module("xformers.ops.fmha.dispatch")  # a stub there: hooking it would do nothing
        check(make())
    else:
        assert owner == "xformers.ops.fmha"


PLAIN_CALLS = """
def outcome(function, *args, **options):
    try:
        result = function(*args, **options)
    except Exception as error:
        print(type(error).__name__, error)
    else:
        results = result if isinstance(result, tuple) else (result,)
        print([(tuple(x.shape), str(x.dtype), x.double().sum().item()) for x in results])

ops = [None, (OtherFw, OtherBw), (OtherFw, None), *((fw, None) for fw in first_fw_ops)]
biases = [None, torch.zeros(2, 3, 5, 5), xops.LowerTriangularMask(), OtherBias(),
          fmha.attn_bias.BlockDiagonalMask.from_seqlens([2, 3])]
for op in ops:
    for bias in biases:
        outcome(xops.memory_efficient_attention, q, k, v, bias, op=op)
        outcome(xops.memory_efficient_attention, q, k, v, bias, p=0.5, op=op)
        with torch.no_grad():
            outcome(xops.memory_efficient_attention_forward, q, k, v, bias, op=op and op[0])
            outcome(xops.memory_efficient_attention_forward_requires_grad, q, k, v, bias, op=op and op[0])
            outcome(fmha.memory_efficient_attention_partial, q, k, v, bias, op=op and op[0])
            out, lse = OtherFw.apply(common.Inputs(q, k, v), True)
            outcome(xops.memory_efficient_attention_backward, out, out, lse.lse, q, k, v, bias, op=op and op[1])
for shape in [(2, 5, 8), (2, 5, 3, 1, 8), (5, 8), (1, 4, 3, 8), (2, 5, 1, 8)]:
    for op in (None, (OtherFw, OtherBw)):
        outcome(xops.memory_efficient_attention, q, torch.zeros(shape), torch.zeros(shape), op=op)
        outcome(xops.memory_efficient_attention, *(torch.zeros(shape) for _ in range(3)), op=op)
for other in (k.half(), k.int(), k.to("meta")):
    outcome(xops.memory_efficient_attention, q, other, v)
    outcome(xops.memory_efficient_attention, other, other, other)
outcome(xops.memory_efficient_attention, q, k, v, "bias")
for result in gradients(OtherBias(), q, k, v, op=(OtherFw, OtherBw)):
    print(result.tolist())
"""


def test_plain_calls_are_as_before() -> None:
    """Results and errors, to the letter, of calls that are none of ours: before our import, and after it."""
    known = "first_fw_ops = list(core.ALL_FW_OPS)"
    # In one process: messages show sets of dtypes, whose order differs from process to process.
    printed = run_program(ADD_ON, known, PLAIN_CALLS, "import xformers_sparsek; print('imported')", PLAIN_CALLS)
    before, after = printed.split("imported\n")
    assert before.count("NotImplementedError No operator found") > 20
    assert "ValueError" in before
    assert before == after


# ------------------------------------------------------------------------------------- imports and other add-ons

OUR_CALLS = """
def ours(package):
    for op in (None, package.xformers_ops.CPU):
        for frozen in (False, True):
            bias = package.SparseKBias(scores, 2, window=1)
            leaves = [scores] if frozen else [q, k, v, scores]
            out, *grads = gradients(bias, *leaves, op=op)
            expected = package.sparsek_attention(q, k, v, scores, 2, window=1)
            torch.testing.assert_close(out, expected)
            for actual, other in zip(grads, torch.autograd.grad(expected.square().sum(), leaves)):
                torch.testing.assert_close(actual, other)
            print(out.double().sum().item(), [x.double().sum().item() for x in grads])
        op_fw = op and op[0]
        out, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v, bias, op=op_fw)
        xops.memory_efficient_attention_backward(out, out, lse, q, k, v, bias, op=op and op[1])
"""


def test_importing_again_is_harmless() -> None:
    printed = run_program(
        ADD_ON,
        OUR_CALLS,
        """
        import importlib
        import xformers_sparsek as first
        ours(first)
        first.xformers_ops.register(first.SparseKBias)
        importlib.reload(first)
        ours(first)
        hooked = core._memory_efficient_attention
        core._memory_efficient_attention = lambda inp, op=None: hooked(inp, op)  # hides that we hooked it
        first.xformers_ops.register(first.SparseKBias)
        importlib.reload(first.xformers_ops).register(first.SparseKBias)
        importlib.reload(first)
        ours(first)
        for name in [name for name in sys.modules if name.partition(".")[0] == "xformers_sparsek"]:
            del sys.modules[name]
        import xformers_sparsek as second
        assert second is not first and second.SparseKBias is not first.SparseKBias
        ours(second)
        ours(first)  # whoever still holds the first one
        names = [operator.NAME for operator in core.ALL_FW_OPS + core.ALL_BW_OPS + xops.common.OPERATORS_REGISTRY]
        assert names.count("sparsekF-cpu") == names.count("sparsekB-cpu") == 2, names
        """,
    )
    lines = printed.splitlines()
    assert len(lines) == 5 * 4
    assert lines[4:] == 4 * lines[:4]


US = "import xformers_sparsek"
# What other add-ons claim: their own bias, or (as impolite ones would) everything.
POLITE = "hook_add_on(lambda bias: type(bias) is OtherBias)"
GREEDY = "hook_add_on(lambda bias: True)"


@pytest.mark.parametrize("hooks", [(US, POLITE, GREEDY), (GREEDY, POLITE, US)], ids=["us first", "us last"])
def test_beside_other_add_ons(hooks: tuple[str, ...]) -> None:
    """Each serves its own bias, whoever hooked the dispatcher first."""
    calls = """
    import xformers_sparsek
    for _ in range(2):
        theirs = gradients(OtherBias(), q, k, v)
        for actual, expected in zip(theirs, gradients(OtherBias(), q, k, v, op=(OtherFw, OtherBw))):
            assert torch.equal(actual, expected)
        ours(xformers_sparsek)
    """
    printed = run_program(ADD_ON, OUR_CALLS, *hooks, calls).splitlines()
    assert len(printed) == 8
    assert printed[:4] == printed[4:]


def test_without_xformers() -> None:
    """Everything but the xFormers call works where xFormers is not installed, and where it has no attention."""
    uses = """
    import torch
    import xformers_sparsek as package
    assert package.xformers_ops.MISSING is not None
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 4, requires_grad=True) for _ in range(3))
    scores = package.SparseKScorer(8, 2)(torch.randn(1, 6, 8))
    out = package.sparsek_attention(q, k, v, scores, 2, window=1)
    out.sum().backward()
    bias = package.SparseKBias(scores, 2, window=1).materialize((1, 2, 6, 6))
    dense = ((q.transpose(1, 2) @ k.transpose(1, 2).mT / 2 + bias).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, dense)
    package.xformers_ops.register(package.SparseKBias)
    print("done")
    """
    absent = "import sys; sys.modules['xformers'] = None"
    # What xFormers after 0.0.35 leaves of itself where mslk is not installed.
    hollow = """
    import sys, types
    for name in ("xformers", "xformers.ops"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["xformers"].ops = sys.modules["xformers.ops"]
    """
    for prelude in (absent, hollow):
        assert run_program(prelude, uses) == "done\n"


# ---------------------------------------------------------------------------------------------------------- compilation


def _compiled(function: Callable, backend: str) -> Callable[[Case], Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    return lambda case: compiled(*case.tensors(), case.scores)


@pytest.mark.parametrize(("backend", "by_hand"), COMPILED)
def test_compiled_with_gradients(backend: str, by_hand: bool, device: torch.device) -> None:
    op = {"cpu": CPU, "cuda": SIMT}[device.type] if by_hand else None

    def attention(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        bias = SparseKBias(scores * 1.5, k=6, window=3)
        return xops.memory_efficient_attention(query, key, value, bias, scale=0.3, op=op) * 2

    case = make(device=device, ratio=3, is_5d=not by_hand, expanded=not by_hand)
    call = _compiled(attention, backend)
    eager = check_equal_to_eager(case, call, attention)
    assert eager["scores"].abs().max() > 0


def check_equal_to_eager(case: Case, call: Callable, function: Callable) -> dict[str, Tensor]:
    expected = results(case, lambda case: function(*case.tensors(), case.scores))
    actual = results(case, call)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
    return expected


@pytest.mark.parametrize(
    "options",
    [{"causal": False}, {"hard": True, "window": 2}, {"dtype": torch.bfloat16}, {"packed": (9, 0, 28)}],
    ids=str,
)
def test_compiled_options(options: dict, device: torch.device) -> None:
    options = dict(options)
    lengths = options.pop("packed", None)
    ends = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    case = make(device=device, **options, batch=2 if lengths is None else 1)

    def attention(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return xops.memory_efficient_attention(query, key, value, SparseKBias(scores, **case.options, cu_seqlens=ends))

    check_equal_to_eager(case, _compiled(attention, "aot_eager"), attention)


def test_compiled_for_other_lengths(device: torch.device) -> None:
    """Lengths become symbols when they change, and the calls stay right."""

    def attention(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return xops.memory_efficient_attention(query, key, value, SparseKBias(scores, k=6, window=3))

    call = _compiled(attention, "aot_eager")
    for queries, keys in ((37, 37), (53, 53), (20, 70), (71, 71)):
        check_equal_to_eager(make(device=device, queries=queries, keys=keys, ratio=2), call, attention)


def test_compiled_with_a_bias_made_outside(device: torch.device) -> None:
    case = make(device=device).differentiable()
    bias = case.bias()
    torch._dynamo.reset()
    compiled = torch.compile(xops.memory_efficient_attention, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*case.tensors(), bias), list(case.leaves.values()), case.grad)
    expected = torch.autograd.grad(attend(case), list(case.leaves.values()), case.grad)
    for got, wanted in zip(actual, expected):
        torch.testing.assert_close(got, wanted)


def test_compiled_refusals_name_all_reasons(device: torch.device) -> None:
    case = make(device=device, ratio=3)

    def attention(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, **options) -> Tensor:
        return xops.memory_efficient_attention(query, key, value, SparseKBias(scores, 4), **options)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    scores = torch.zeros(2, 37, 4, device=device)  # six heads of query are no multiple of four
    for function in (attention, compiled):
        with pytest.raises(Exception, match="not a multiple of the 4 heads") as caught:
            function(*case.tensors(), scores, p=0.5)
        assert "dropout" in str(caught.value)


def test_compiled_calls_of_others_are_traced_as_before() -> None:
    """A compiled call without our bias still ends in xFormers' own refusal on the CPU."""
    case = make()
    torch._dynamo.reset()
    compiled = torch.compile(xops.memory_efficient_attention, backend="aot_eager")
    with pytest.raises(Exception, match="No operator found for"):
        compiled(*case.tensors())
