"""The network that scores keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SparseKScorer(nn.Module):
    """Scores every token for selection: linear in the hidden state, plus a slope along the position.

    ``score[b, t, g] = gain[g] * w[g] . x[b, t] / rms(x[b, t]) + slope[g] * t / slope_length``
    (Lou et al., arXiv:2406.16747, section 3.1: a linear scoring network and a position slope). The gates of SparseK are
    one unit of score wide, so the spread of the scores decides how selective they are. Dividing by the root mean square
    of the hidden state, with rows ``w[g]`` of unit length, gives scores a standard deviation of ``spread`` at
    initialisation, whatever the scale of the hidden state; from there ``gain``, ``w`` and ``slope`` learn.

    The slope decides how far a group sees at first: with 1 per ``k`` tokens, keys that are otherwise equal fade out
    within ``1.5 k`` tokens, and one that scores higher by 1 stays for ``k`` tokens longer. Training moves slopes but
    little, so the groups start with slopes of a geometric sequence, as the heads of ALiBi do (Press et al.,
    arXiv:2108.12409), from one that makes a soft window to one that selects from a text of many times ``k`` tokens.

    Args:
        dim: width of the hidden state.
        num_groups: number of key/value heads ``G``.
        spread: standard deviation of the scores at initialisation, in units of score.
        slope: initial slope of the first group, in units of score per ``slope_length`` tokens; positive favours recent
            keys.
        slope_ratio: that slope over the one of the last group.
        slope_length: tokens per unit of slope: the ``k`` of the selection is a good choice.
        eps: added to the mean square of the hidden state.

    Raises:
        ValueError: a size is smaller than 1, or ``spread``, ``slope_ratio`` or ``slope_length`` is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_groups: int,
        *,
        spread: float = 1.0,
        slope: float = 1.0,
        slope_ratio: float = 64.0,
        slope_length: int = 1024,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_groups < 1 or spread <= 0 or slope_ratio <= 0 or slope_length <= 0:
            raise ValueError(
                f"SparseKScorer needs dim >= 1, num_groups >= 1, spread > 0, slope_ratio > 0 and slope_length > 0, "
                f"got {dim=}, {num_groups=}, {spread=}, {slope_ratio=}, {slope_length=}"
            )
        self.spread, self.slope_length, self.eps = spread, slope_length, eps
        self.initial_slopes = [slope * slope_ratio ** (-group / max(num_groups - 1, 1)) for group in range(num_groups)]
        self.weight = nn.Parameter(torch.empty(num_groups, dim, device=device, dtype=dtype))
        self.gain = nn.Parameter(torch.empty(num_groups, device=device, dtype=dtype))
        self.slope = nn.Parameter(torch.empty(num_groups, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws unit-length weight rows and sets the gain and the slopes to their initial values."""
        with torch.no_grad():
            nn.init.normal_(self.weight)
            self.weight.div_(self.weight.norm(dim=-1, keepdim=True))
            nn.init.constant_(self.gain, self.spread)
            self.slope.copy_(torch.tensor(self.initial_slopes))

    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Scores of ``hidden [B, M, dim]``.

        Args:
            hidden: hidden states; each token is scored on its own, so scores are causal.
            positions: ``[M]`` or ``[B, M]`` positions; ``0 .. M - 1`` by default. Decoding and packed sequences pass
                theirs.

        Returns:
            ``[B, M, G]`` scores in float32, or float64 for float64 hidden states: positions of long texts need it.
        """
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            x = nn.functional.rms_norm(hidden.to(wide), hidden.shape[-1:], eps=self.eps)
            content = nn.functional.linear(x, self.weight.to(wide)) * self.gain.to(wide)
            if positions is None:
                positions = torch.arange(hidden.shape[1], device=hidden.device)
            steps = positions.to(wide).unsqueeze(-1) / self.slope_length
            return torch.addcmul(content, steps, self.slope.to(wide))

    def extra_repr(self) -> str:
        groups, dim = self.weight.shape
        return f"dim={dim}, num_groups={groups}, spread={self.spread}, slope_length={self.slope_length}"
