"""A small decoder-only language model whose attention follows one of several patterns.

Only the pattern differs between the models that ``compare_lm.py`` compares: which earlier keys a query sees, and with
which gates. Everything else is common practice: rotary positions, grouped heads, RMSNorm before each part, a short
convolution before attention, a gated MLP, and one matrix for embedding and logits.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xformers_sparsek import SparseKScorer, sparsek_attention

LEARNED = ("sparsek", "hard")  # the patterns whose scorers learn
SCORED = (*LEARNED, "frozen")  # the patterns that have scorers


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The size of a model, and what its scorers start from."""

    vocabulary: int
    context: int
    dim: int
    layers: int
    heads: int
    groups: int
    spread: float
    slope: float
    slope_ratio: float
    scorer_input: str


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which keys a query sees: its latest ``window`` ones and ``k`` earlier ones, chosen by the scores of ``kind``.

    - ``dense``: all earlier keys; ``window``: the window alone.
    - ``sparsek``: soft gates by learned scores; ``hard``: gates of 0 and 1 by learned scores.
    - ``frozen``: soft gates by a scorer that stays as it was initialised.
    - ``random``: soft gates by scores drawn once for every position.
    - ``recency``: soft gates by scores that rise by 1 with every position. They keep the ``k`` keys just before the
      window: a window of ``k + window``, computed through selection.
    """

    kind: str
    k: int = 1
    window: int = 0


class Attention(nn.Module):
    """Causal self-attention with grouped heads in the given pattern."""

    def __init__(self, s: ModelSettings, pattern: Pattern) -> None:
        super().__init__()
        self.pattern, self.spread = pattern, s.spread
        self.heads, self.groups, self.width = s.heads, s.groups, s.dim // s.heads
        self.query_key_value = nn.Linear(s.dim, (s.heads + 2 * s.groups) * self.width, bias=False)
        self.out = nn.Linear(s.heads * self.width, s.dim, bias=False)
        angles = torch.arange(s.context)[:, None] * 10_000.0 ** -(torch.arange(0, self.width, 2) / self.width)
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]).unsqueeze(2), persistent=False)

    def add_scorer(self, s: ModelSettings) -> None:
        """What the pattern needs for its scores; drawn after all else, which is so the same for all patterns."""
        if self.pattern.kind in SCORED:
            slopes = {"slope": s.slope, "slope_ratio": s.slope_ratio, "slope_length": self.pattern.k}
            self.scorer = SparseKScorer(s.dim, s.groups, spread=s.spread, **slopes)
            self.scorer.requires_grad_(self.pattern.kind in LEARNED)
        elif self.pattern.kind == "random":
            self.register_buffer("drawn", torch.randn(s.context, s.groups) * s.spread)

    def scores(self, hidden: Tensor) -> Tensor:
        """The scores ``[B, M, G]`` of all keys."""
        batch, length, _ = hidden.shape
        kind, shape = self.pattern.kind, (batch, length, self.groups)
        if kind == "frozen":
            # Else the layers below would learn what the scorer does not: hidden states that it scores well.
            return self.scorer(hidden.detach())
        if kind in LEARNED:
            return self.scorer(hidden)
        if kind == "random":
            return self.drawn[:length].expand(shape)
        if kind == "recency":
            positions = torch.arange(length, device=hidden.device, dtype=torch.float32)
            return positions[:, None].expand(shape)
        # Nothing is a candidate, which leaves the window alone.
        return torch.full(shape, -torch.inf, device=hidden.device)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding of ``x [B, M, heads, width]``."""
        cos, sin = self.rotation[:, : x.shape[1]]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Attention over ``x [B, M, dim]``, with scores of ``hidden``."""
        projected = self.query_key_value(x).unflatten(-1, (-1, self.width))
        query, key, value = projected.split([self.heads, self.groups, self.groups], dim=2)
        query, key = self.rotate(query), self.rotate(key)
        if self.pattern.kind == "dense":
            heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            out = sparsek_attention(
                query,
                key,
                value,
                self.scores(hidden),
                self.pattern.k,
                window=self.pattern.window,
                hard=self.pattern.kind == "hard",
            )
        return self.out(out.flatten(2))


class ShortConvolution(nn.Module):
    """Weighs each channel of the latest few positions: a byte alone says too little for a query, a key or a score."""

    def __init__(self, dim: int, reach: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(reach, dim) * reach**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        reach, length = len(self.weight), x.shape[1]
        padded = F.pad(x, (0, 0, reach - 1, 0))
        return sum(padded[:, i : i + length] * self.weight[i] for i in range(reach))


class Block(nn.Module):
    """Attention and a gated MLP, each on the normalised input and added to it."""

    def __init__(self, s: ModelSettings, pattern: Pattern) -> None:
        super().__init__()
        self.scores_mixed = s.scorer_input == "mixed"
        self.norm1, self.norm2 = nn.RMSNorm(s.dim), nn.RMSNorm(s.dim)
        self.mix = ShortConvolution(s.dim)
        self.attention = Attention(s, pattern)
        width = 8 * s.dim // 3 // 8 * 8  # tensor cores want rows of whole 16 bytes
        self.gate_up = nn.Linear(s.dim, 2 * width, bias=False)
        self.down = nn.Linear(width, s.dim, bias=False)

    def attention_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads, and what its scorer reads."""
        mixed = self.mix(self.norm1(x))
        return mixed, mixed if self.scores_mixed else x

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(*self.attention_inputs(x))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class LanguageModel(nn.Module):
    """A decoder-only transformer from tokens to the logits of the token that follows each."""

    def __init__(self, s: ModelSettings, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern
        self.embedding = nn.Embedding(s.vocabulary, s.dim)
        self.blocks = nn.ModuleList(Block(s, pattern) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            for linear in (block.attention.out, block.down):
                nn.init.normal_(linear.weight, std=(2 * s.layers * linear.in_features) ** -0.5)
        for block in self.blocks:
            block.attention.add_scorer(s)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, M, vocabulary]`` for ``tokens [B, M]``."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def losses(self, tokens: Tensor) -> Tensor:
        """Nats ``[B, M]`` of predicting every token of ``tokens [B, M + 1]`` but the first."""
        logits = self(tokens[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(tokens.shape[0], -1)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that learn: matrices of the blocks, the embedding, those of scorers, and the rest."""
        groups: dict[str, list[nn.Parameter]] = {"matrices": [], "embedding": [], "scorers": [], "rest": []}
        matrices = {id(module.weight) for module in self.modules() if isinstance(module, nn.Linear)}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if ".scorer." in name:
                group = "scorers"
            elif parameter is self.embedding.weight:
                group = "embedding"
            else:
                group = "matrices" if id(parameter) in matrices else "rest"
            groups[group].append(parameter)
        return groups

    @torch.no_grad()
    def keys_seen(self, tokens: Tensor) -> Tensor:
        """``[M]``: how many keys with a gate above 0 each query sees, on average over texts, layers and groups."""
        length = tokens.shape[1]
        if self.pattern.kind == "dense":
            return torch.arange(1.0, length + 1)
        changes = torch.zeros(length + 1, dtype=torch.float64)
        x, lists = self.embedding(tokens), 0
        for block in self.blocks:
            scores = block.attention.scores(block.attention_inputs(x)[1])
            p = self.pattern
            _, expiry = torch.ops.xformers_sparsek.select(
                scores, None, None, length, p.k, p.window, True, p.kind == "hard"
            )
            # Key j is seen by queries j .. expiry - 1, if by any.
            begins = torch.arange(length, device=expiry.device).expand(expiry.shape)
            ends = expiry.clamp(max=length).maximum(begins)
            for sign, positions in ((1, begins), (-1, ends)):
                changes += sign * torch.bincount(positions.flatten().cpu(), minlength=length + 1)
            lists += expiry.shape[0] * expiry.shape[1]
            x = block(x)
        return changes[:length].cumsum(0) / lists


def scorer_statistics(model: LanguageModel) -> dict[str, float]:
    """Means over all scorers of what their parameters have become, where there are any."""
    scorers = [block.attention.scorer for block in model.blocks if model.pattern.kind in SCORED]
    if not scorers:
        return {}
    values = {
        "spread": [s.gain.abs() * s.weight.norm(dim=-1) for s in scorers],
        "slope": [s.slope for s in scorers],
    }
    return {name: torch.stack([*itertools.chain(*parts)]).mean().item() for name, parts in values.items()}
