#!/usr/bin/env python3
"""Trains a small byte-level language model whose layers choose by learned scores which earlier bytes to attend to.

The text is the source code of the Python standard library on this machine; every tenth file or so is held out. Every
layer attends through ``xformers.ops.memory_efficient_attention`` with a ``SparseKBias``: each query sees the latest
``--window`` bytes and about ``--k`` of all earlier ones, chosen by a scoring network that learns with the rest.

Leaves in the ``--out`` folder a checkpoint (``checkpoint.pt``) and a picture of which bytes some queries kept
(``kept_bytes.png``). Ctrl-C saves too; ``--resume`` continues where the checkpoint was made, as if never stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# xFormers warns on import where its own compiled operators do not load; none of them is used here.
logging.getLogger("xformers").setLevel(logging.ERROR)

import xformers.ops as xops  # noqa: E402

from xformers_sparsek import SparseKBias, SparseKScorer  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the course of a training run: a resumed run must keep these."""

    steps: int
    batch: int
    context: int
    dim: int
    layers: int
    heads: int
    k: int
    window: int
    lr: float
    seed: int


# ---------------------------------------------------------------------------------------------------------------- text


def read_text() -> tuple[Tensor, Tensor]:
    """The standard library's sources as bytes: files to train on, and held-out files, each put end to end."""
    root = Path(sysconfig.get_path("stdlib"))
    # Installed packages are not the standard library; tests and tables would outweigh everything else.
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "__pycache__"}
    training, held_out = bytearray(), bytearray()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - skipped)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                # A checksum of the name, so that a file stays on its side whatever other files there are.
                part = held_out if zlib.crc32(path.relative_to(root).as_posix().encode()) % 10 == 0 else training
                part += path.read_bytes()
    if min(len(training), len(held_out)) < 100_000:
        raise SystemExit(f"{root} holds too few Python sources to train on: {len(training)} + {len(held_out)} bytes")
    return torch.frombuffer(training, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def unigram_entropy(text: Tensor) -> float:
    """Nats per byte that remain when only the frequency of each byte is known."""
    frequency = torch.bincount(text, minlength=256).double() / text.numel()
    return -torch.special.xlogy(frequency, frequency).sum().item()


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """``[len(starts), length]`` bytes of the text as indices."""
    return text[starts.unsqueeze(-1) + torch.arange(length)].long()


# --------------------------------------------------------------------------------------------------------------- model


class Attention(nn.Module):
    """Self-attention over the latest ``window`` bytes and ``k`` earlier ones, selected for each head on its own."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads, self.k, self.window = s.heads, s.k, s.window
        self.qkv = nn.Linear(s.dim, 3 * s.dim, bias=False)
        self.out = nn.Linear(s.dim, s.dim, bias=False)
        self.scorer = SparseKScorer(s.dim, s.heads, slope_length=s.k)

    def forward(self, x: Tensor) -> tuple[Tensor, SparseKBias]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key = (rotate(F.rms_norm(heads, heads.shape[-1:])) for heads in (query, key))
        bias = SparseKBias(self.scorer(x), k=self.k, window=self.window)
        out = xops.memory_efficient_attention(query, key, value, attn_bias=bias)
        return self.out(out.flatten(2)), bias


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of ``x [B, M, H, K]``."""
    cos, sin = rotation(x.shape[1], x.shape[3] // 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@functools.lru_cache(maxsize=4)
def rotation(length: int, planes: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[length, 1, planes]`` of each position's angle in each plane."""
    frequency = 10_000.0 ** -(torch.arange(planes) / planes)
    angle = torch.arange(length).unsqueeze(-1) * frequency
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


class Block(nn.Module):
    """Attention and a gated MLP, each on the normalised input and added to it."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(s.dim), nn.RMSNorm(s.dim)
        self.attention = Attention(s)
        width = 8 * s.dim // 3
        self.gate_up = nn.Linear(s.dim, 2 * width, bias=False)
        self.down = nn.Linear(width, s.dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, SparseKBias]:
        attended, bias = self.attention(self.norm1(x))
        x = x + attended
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up), bias


class ByteModel(nn.Module):
    """A decoder-only transformer from bytes to the logits of the byte that follows each."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, s.dim)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.dim)
        self.head = nn.Linear(s.dim, 256, bias=False)
        nn.init.zeros_(self.head.weight)  # starts from the uniform distribution
        for block in self.blocks:
            for linear in (block.attention.out, block.down):
                nn.init.normal_(linear.weight, std=(2 * s.layers * linear.in_features) ** -0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[SparseKBias]]:
        """Logits ``[B, M, 256]`` for ``tokens [B, M]``, and each layer's bias to look at."""
        x, biases = self.embedding(tokens), []
        for block in self.blocks:
            x, bias = block(x)
            biases.append(bias)
        return self.head(self.norm(x)), biases

    def loss(self, tokens: Tensor) -> Tensor:
        """Nats per byte of predicting every byte of ``tokens [B, M + 1]`` but the first."""
        logits, _ = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# ------------------------------------------------------------------------------------------------------------ training


class Training:
    """A model with all that its further training depends on, so that it can be stopped and resumed anywhere."""

    def __init__(self, settings: Settings, text: Tensor) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.text = settings, text
        self.model = ByteModel(settings)
        # Decay would flatten the scores, and flat scores select nothing.
        named = list(self.model.named_parameters())
        decayed = [p for name, p in named if p.ndim == 2 and ".scorer." not in name]
        others = [p for name, p in named if p.ndim != 2 or ".scorer." in name]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
        self.data = torch.Generator().manual_seed(settings.seed)  # draws the batches
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    def advance(self) -> None:
        """One step of training on a fresh batch."""
        s = self.settings
        warmup = min(1.0, (self.step + 1) / max(1, s.steps // 20))
        cosine = 0.55 + 0.45 * math.cos(math.pi * self.step / s.steps)  # from 1 down to 0.1
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(warmup, cosine)
        starts = torch.randint(self.text.numel() - s.context, (s.batch,), generator=self.data)
        loss = self.model.loss(windows(self.text, starts, s.context + 1))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())

    def save(self, path: Path) -> None:
        """Writes the checkpoint; whoever reads it sees the old one or the new one, never half of one."""
        state = {
            "settings": dataclasses.asdict(self.settings),
            "text": zlib.crc32(self.text.numpy()),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.data.get_state(),
            "losses": self.losses,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, state: dict) -> None:
        """Continues from the contents of a checkpoint."""
        if state["text"] != zlib.crc32(self.text.numpy()):
            raise SystemExit("the checkpoint was trained on the sources of another Python: start without --resume")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.data.set_state(state["data"])
        self.losses = state["losses"]


def train(training: Training, checkpoint: Path, seconds: float, save_every: int) -> bool:
    """Trains to the last step or for some seconds, saving along the way; returns whether it was interrupted."""
    interrupted = False

    def interrupt(*_: object) -> None:
        """Notes it, since stopping between two steps keeps the checkpoint whole; the next one interrupts at once."""
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, interrupt)
    bar = ProgressBar(training.step, training.settings.steps, seconds)
    try:
        while training.step < training.settings.steps and not interrupted and bar.elapsed() < seconds:
            training.advance()
            bar.show(training.losses)
            if training.step % save_every == 0:
                training.save(checkpoint)
    finally:
        bar.close()
        signal.signal(signal.SIGINT, previous)
    training.save(checkpoint)
    return interrupted


class ProgressBar:
    """One line that shows how far training is: redrawn on a terminal, a new line now and then elsewhere."""

    def __init__(self, start: int, total: int, seconds: float) -> None:
        self.start, self.total, self.seconds = start, total, seconds
        self.began, self.shown = time.monotonic(), -math.inf
        self.redraws = sys.stderr.isatty()

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def show(self, losses: list[float]) -> None:
        """Draws the bar, if it is time to."""
        done, elapsed = len(losses), self.elapsed()
        if elapsed - self.shown < (0.2 if self.redraws else 10) and done < self.total:
            return
        self.shown = elapsed
        speed = (done - self.start) / elapsed
        left = round(min((self.total - done) / speed, max(0.0, self.seconds - elapsed)))
        recent = sum(losses[-20:]) / len(losses[-20:])
        filled = 24 * done // self.total
        line = (
            f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{self.total}  loss {recent:.3f} nats/byte  "
            f"{speed:.1f} steps/s  {left // 60}:{left % 60:02} left"
        )
        if self.redraws:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.redraws:
            print(file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: ByteModel, text: Tensor, s: Settings, count: int = 48) -> float:
    """Mean loss in nats per byte over ``count`` windows spread evenly over the text."""
    starts = torch.linspace(0, text.numel() - s.context - 1, count).long()
    return sum(model.loss(windows(text, part, s.context + 1)).item() * len(part) for part in starts.split(8)) / count


@torch.no_grad()
def sample(model: ByteModel, prompt: bytes, count: int, s: Settings, temperature: float = 0.7) -> str:
    """The prompt and ``count`` bytes that the model makes of it."""
    generator = torch.Generator().manual_seed(s.seed)
    tokens = torch.tensor([list(prompt)])
    for _ in range(count):
        logits, _ = model(tokens[:, -s.context :])
        probabilities = (logits[0, -1] / temperature).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


# ------------------------------------------------------------------------------------------------------------- picture


@torch.no_grad()
def plot(model: ByteModel, text: Tensor, s: Settings, path: Path) -> None:
    """Draws which bytes of a piece of held-out text some queries kept, and the gates of all queries in all heads."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap

    data = text.numpy().tobytes()
    start = data.find(b"\ndef ", len(data) // 3) + 1
    content = data[start : start + s.context]
    length = len(content)
    cells = text_cells(content)
    _, biases = model(torch.tensor([list(content)]))
    gates = torch.cat([bias.materialize((1, s.heads, length, length)).exp()[0] for bias in biases])
    gates[gates == 0] = torch.nan  # drawn as nothing
    deeper = s.heads if s.layers > 1 else 0  # the first layer knows a byte's value alone, not its surroundings
    head = deeper + furthest_reaching(gates[deeper:])
    queries = [length * part // 8 - 1 for part in (3, 5, 8)]
    colors = LinearSegmentedColormap.from_list("gates", plt.get_cmap("YlOrRd")(torch.linspace(0.1, 0.7, 64).numpy()))

    upper_height = 1 + 0.16 * (cells[-1][0] + 1)
    figure = plt.figure(figsize=(16, upper_height + 6), layout="constrained", facecolor="white")
    upper, lower = figure.subfigures(2, 1, height_ratios=(upper_height, 6))
    upper.suptitle(
        f"Layer {head // s.heads + 1}, head {head % s.heads + 1}: each query (dark blue) sees the latest {s.window} "
        f"bytes (light blue) and about {s.k} of all earlier ones (yellow to red by their gates)",
        fontsize=14,
    )
    for axes, query in zip(upper.subplots(1, len(queries)), queries):
        draw_text(axes, content, cells, gates[head, query], query, s.window, colors)
        axes.set_title(f"what byte {query + 1} sees", fontsize=11)

    left, right = lower.subfigures(1, 2, width_ratios=(1, 1.35))
    axes = left.subplots()
    band = torch.ones(length, length).tril().triu(1 - s.window)
    band[band == 0] = torch.nan
    light = ListedColormap(["lightblue"])
    image = axes.imshow(gates[head], cmap=colors, vmin=0, vmax=1, interpolation="nearest")
    axes.imshow(band, cmap=light, interpolation="nearest")
    axes.hlines(queries, 0, queries, colors="tab:blue", linewidth=1.5)
    axes.set(xlabel="key (byte)", ylabel="query (byte)")
    left.suptitle("the same head: the gates of all queries; the blue ones are those above")
    left.colorbar(image, label="gate", shrink=0.6)
    right.suptitle("the gates of all heads: a row per layer")
    for index, axes in enumerate(right.subplots(s.layers, s.heads, squeeze=False).flat):
        axes.imshow(gates[index], cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        axes.imshow(band, cmap=light, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="tab:blue" if index == head else "lightgray", linewidth=3 if index == head else 1)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def furthest_reaching(gates: Tensor) -> int:
    """The head whose last query looks back furthest on average: it goes by content rather than by recency."""
    age = torch.arange(gates.shape[-1] - 1, -1, -1)
    return int((gates[:, -1].nan_to_num() * age).sum(-1).argmax())


def text_cells(content: bytes, columns: int = 64) -> list[tuple[int, int]]:
    """Row and column of every byte, with lines wrapped at ``columns``."""
    cells, row, column = [], 0, 0
    for byte in content:
        cells.append((row, column))
        row, column = (row + 1, 0) if byte == ord("\n") or column + 1 == columns else (row, column + 1)
    return cells


def draw_text(
    axes, content: bytes, cells: list[tuple[int, int]], gates: Tensor, query: int, window: int, colors
) -> None:
    """Writes the text with a coloured ground under every byte that the query sees; what comes later is pale."""
    for index, (byte, (row, column), gate) in enumerate(zip(content, cells, gates.tolist())):
        ground, ink = colors(gate), "black"
        if index > query - window:
            ground, ink = "lightblue", "black"
        if index == query:
            ground, ink = "tab:blue", "white"
        if gate > 0:
            axes.fill_between([column, column + 1], row, row + 1, color=ground, linewidth=0)
        glyph = chr(byte) if 32 <= byte < 127 else "\u21b5" if byte == ord("\n") and gate > 0 else ""
        ink = "silver" if index > query else ink
        axes.text(column + 0.5, row + 0.52, glyph, color=ink, family="monospace", fontsize=9, ha="center", va="center")
    axes.set(xlim=(0, 64), ylim=(cells[-1][0] + 1, 0), aspect=2)
    axes.axis("off")


# ---------------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> tuple[argparse.Namespace, dict | None]:
    """The command line, and with --resume the checkpoint, whose settings become the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, epilog="Ctrl-C stops after the current step and saves."
    )
    add = parser.add_argument
    add("--steps", type=positive, default=900, help="steps of training in all; the learning rate falls until the last")
    add("--minutes", type=float, default=1.5, help="stop training after this time, whatever the steps")
    add("--batch", type=positive, default=2, help="pieces of text per step")
    add("--context", type=positive, default=512, help="bytes per piece of text")
    add("--dim", type=positive, default=128, help="width of the hidden state")
    add("--layers", type=positive, default=4, help="transformer layers")
    add("--heads", type=positive, default=4, help="attention heads, each with its own scores")
    add("--k", type=positive, default=32, help="bytes that each query keeps of those before the window")
    add("--window", type=int, default=16, help="latest bytes that each query always sees")
    add("--lr", type=float, default=6e-3, help="learning rate at its highest")
    add("--seed", type=int, default=0, help="seed of the parameters, the batches and the sample")
    add("--out", type=Path, default=Path("out"), help="folder for the checkpoint and the picture")
    add("--save-every", type=positive, default=100, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, with its settings")
    add("--prompt", default="def ", help="how the sample begins; not empty")
    add("--sample-bytes", type=int, default=300, help="length of the sample")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the picture (needs matplotlib)")
    args = parser.parse_args()
    if not args.prompt:
        parser.error("--prompt must not be empty")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("the picture needs matplotlib: install it, or pass --no-plot")
    if not args.resume:
        return args, None
    path = args.out / "checkpoint.pt"
    if not path.exists():
        parser.error(f"--resume: there is no {path}")
    state = torch.load(path)
    parser.set_defaults(**state["settings"])
    args = parser.parse_args()
    changed = [name for name, value in state["settings"].items() if getattr(args, name) != value and name != "steps"]
    if changed:
        parser.error(f"--resume: the checkpoint has another --{changed[0]}: {state['settings'][changed[0]]}")
    return args, state


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it stands above."""


def main() -> None:
    args, state = parse_arguments()
    s = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    if s.dim % (2 * s.heads):
        raise SystemExit(f"--dim {s.dim} must be a multiple of twice --heads {s.heads}")
    args.out.mkdir(parents=True, exist_ok=True)
    training_text, held_out = read_text()
    training = Training(s, training_text)
    if state is not None:
        training.restore(state)
    model, checkpoint = training.model, args.out / "checkpoint.pt"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{training_text.numel():,} bytes of text and {held_out.numel():,} held out; {parameters:,} parameters")
    print(f"each query sees its latest {s.window} bytes and about {s.k} earlier ones, of up to {s.context}", flush=True)

    if train(training, checkpoint, 60 * args.minutes, args.save_every):
        raise SystemExit(f"interrupted after step {training.step}, saved to {checkpoint}; --resume continues")
    if training.step < s.steps:
        print(f"--minutes {args.minutes:g} are over after step {training.step} of {s.steps}; --resume continues")

    recent = training.losses[-50:]
    print()
    for name, nats in (
        ("training loss", sum(recent) / max(1, len(recent))),
        ("held-out loss", evaluate(model, held_out, s)),
        ("unigram entropy", unigram_entropy(held_out)),
    ):
        print(f"{name:<16} {nats:.4f} nats/byte = {nats / math.log(2):.4f} bits/byte")
    print(f"\n{sample(model, args.prompt.encode(), args.sample_bytes, s)}\n")
    print(f"checkpoint: {checkpoint}")
    if args.plot:
        plot(model, held_out, s, args.out / "kept_bytes.png")
        print(f"picture: {args.out / 'kept_bytes.png'}")


if __name__ == "__main__":
    main()
