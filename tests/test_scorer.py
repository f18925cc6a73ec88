"""The scoring network."""

from __future__ import annotations

import pytest
import torch
from strategies import BF16, F16, F32, F64

from xformers_sparsek import SparseKScorer, sparsek


def hidden_states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scorer(dim: int = 64, groups: int = 4, seed: int = 0, **options) -> SparseKScorer:
    torch.manual_seed(seed)
    return SparseKScorer(dim, groups, **options)


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(("dim", "groups"), [(64, 4), (768, 2)])
@pytest.mark.parametrize("spread", [4.0, 1.5])
def test_spread_at_initialisation(scale, dim, groups, spread, device):
    """Scores start with the standard deviation asked for, in every group, whatever the scale of the hidden state."""
    module = scorer(dim, groups, spread=spread, slope=0.0).to(device)
    scores = module((hidden_states(4, 2048, dim) * scale).to(device))
    deviation = scores.std((0, 1))
    assert ((deviation > 0.9 * spread) & (deviation < 1.1 * spread)).all(), deviation
    assert scores.mean((0, 1)).abs().max() < 0.15 * spread


def test_selection_at_initialisation_is_useful(device):
    """By default a support of less than 2.7 k, with gradients to a fair part of it; one group is near, one far."""
    scores = scorer(256, 2, slope_length=64).to(device)(hidden_states(2, 2048, 256).to(device))
    gates = sparsek(scores, 64, dim=1)
    support = (gates > 0).sum(1)
    fractional = ((gates > 0) & (gates < 1)).sum(1)
    assert (support < 2.7 * 64).all() and (support > 64).all()
    assert (fractional > 6).all()
    distance = 2047 - torch.arange(2048, device=device)
    near, far = ((gates > 0) * distance[:, None]).sum(1).div(support).mean(0).tolist()
    assert near < 2 * 64 and far > 8 * 64


def test_each_token_is_scored_on_its_own(device):
    """Later tokens, NaN included, change no score, bit for bit."""
    module = scorer().to(device)
    hidden = hidden_states(2, 33, 64).to(device)
    scores = module(hidden)
    changed = hidden.clone()
    changed[:, 20:] = torch.nan
    assert torch.equal(module(changed)[:, :20], scores[:, :20])
    assert module(changed)[:, 20:].isnan().all()


@pytest.mark.parametrize(("slope", "length"), [(1.0, 1024), (-2.0, 16), (0.0, 1)])
def test_slope(slope, length, device):
    """Equal hidden states differ by the slope alone, which counts in tokens."""
    module = scorer(slope=slope, slope_ratio=1.0, slope_length=length).to(device)
    hidden = hidden_states(1, 1, 64).to(device).expand(2, 50, 64)
    scores = module(hidden).double()
    steps = torch.arange(50, device=device, dtype=F64).view(1, -1, 1) * slope / length
    torch.testing.assert_close(scores - scores[:, :1], steps.expand_as(scores), rtol=1e-6, atol=1e-5)


def test_positions(device):
    """Positions of one's own stand in for 0, 1, 2, ...: for decoding, and for packed sequences."""
    module = scorer(slope=3.0, slope_ratio=1.0, slope_length=8).to(device)
    hidden = hidden_states(2, 20, 64).to(device)
    full = module(hidden)
    torch.testing.assert_close(module(hidden[:, 12:], torch.arange(12, 20, device=device)), full[:, 12:])
    each = torch.stack([torch.arange(20), torch.arange(5, 25)]).to(device)
    shifted = module(hidden, each)
    torch.testing.assert_close(shifted[0], full[0])
    torch.testing.assert_close(shifted[1], full[1] + 5 * 3.0 / 8)


def test_slope_is_exact_at_long_positions(device):
    """A 16-bit slope would not tell neighbouring tokens apart a million tokens in."""
    module = scorer(slope=1.0, slope_ratio=1.0, slope_length=1, dtype=BF16).to(device)
    hidden = torch.zeros(1, 3, 64, dtype=BF16, device=device)
    scores = module(hidden, torch.tensor([10**6, 10**6 + 1, 10**6 + 2], device=device))
    assert (scores.diff(dim=1) == 1).all()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("autocast", [False, True])
def test_shapes_and_dtypes(dtype, autocast, device):
    module = scorer(dim=24, groups=3, dtype=dtype).to(device)
    hidden = hidden_states(2, 7, 24).to(device, dtype)
    with torch.autocast(device.type, BF16, enabled=autocast):
        scores = module(hidden)
    assert scores.shape == (2, 7, 3)
    assert scores.dtype == (F64 if dtype == F64 else F32)
    exact = module.double()(hidden.double())
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5 if dtype != F64 else 1e-12, atol=1e-5)
    assert module(hidden[:, :0]).shape == (2, 0, 3) and module(hidden[:0]).shape == (0, 7, 3)


def test_gradients_flow(device):
    """To the hidden state and every parameter, correct by finite differences."""
    module = scorer(dim=5, groups=2).to(device).double()
    hidden = hidden_states(2, 6, 5).double().to(device).requires_grad_()
    parameters = dict(module.named_parameters())
    assert set(parameters) == {"weight", "gain", "slope"}

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (hidden, *parameters.values()))
    module(hidden).square().sum().backward()
    for tensor in (hidden, *parameters.values()):
        assert tensor.grad.isfinite().all() and (tensor.grad != 0).any()


def test_hidden_state_of_zeros(device):
    """Padding gives finite scores and gradients."""
    module = scorer().to(device)
    hidden = torch.zeros(1, 4, 64, device=device, requires_grad=True)
    scores = module(hidden)
    (grad,) = torch.autograd.grad(scores.sum(), hidden)
    torch.testing.assert_close(scores[0, :, 0].detach().cpu(), torch.arange(4) / 1024)
    assert grad.isfinite().all()


def test_parameters_initialised_again_and_saved():
    module = scorer(seed=1, spread=2.5, slope=-0.5, slope_ratio=8.0)
    assert (module.gain == 2.5).all()
    torch.testing.assert_close(module.slope.detach(), torch.tensor([-0.5, -0.25, -0.125, -0.0625]))
    torch.testing.assert_close(module.weight.norm(dim=-1), torch.ones(4))
    other = scorer(seed=2)
    assert not torch.equal(other.weight, module.weight)
    other.load_state_dict(module.state_dict())
    hidden = hidden_states(1, 9, 64)
    assert torch.equal(other(hidden), module(hidden))
    first = module.weight.detach().clone()
    module.reset_parameters()
    assert not torch.equal(module.weight, first)


@pytest.mark.parametrize(
    "changes",
    [{"dim": 0}, {"num_groups": 0}, {"spread": 0.0}, {"spread": -1.0}, {"slope_length": 0}, {"slope_ratio": 0.0}],
    ids=str,
)
def test_bad_arguments(changes):
    with pytest.raises(ValueError, match="SparseKScorer needs"):
        SparseKScorer(**{"dim": 8, "num_groups": 2, **changes})
