#!/usr/bin/env python3
"""Compares SparseK attention with dense attention and with other sparse patterns in one small language model.

The text is Python sources found on this machine, in bytes or in pieces of several bytes; some files are held out.
Every variant starts from the same weights, reads the same batches in the same order and may keep the same number of
keys for each query, its budget:

    dense         all earlier keys
    window        the latest keys alone, as many as the budget
    sparsek       SparseK: a share of the budget is a window, the rest earlier keys by learned scores with soft gates
    hard          the same with gates of 0 and 1
    frozen        as sparsek, with a scorer that does not learn
    random        as sparsek, with random scores
    recency       as sparsek, with scores that rise along the text: a window of the whole budget again
    wider-window  the latest keys alone, as many as sparsek came to see: soft gates keep some keys beyond the budget

    convert-*     the dense model, trained on for a little as dense, window, sparsek, hard or wider-window

Every finished run is added to the ``--json`` file, and runs that it holds are skipped, so that several calls can share
the work, one after another or side by side (``--variants``, ``--budgets``, ``--seeds``, ``--minutes``). Tables and plot
show all runs of the file; ``lm_report.py FILE`` makes them again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
import zlib
from pathlib import Path

import lm_report
import torch
from lm_model import LanguageModel, ModelSettings, Pattern, scorer_statistics
from lm_text import BYTES, excerpts, read_text
from torch import nn

import xformers_sparsek

FROM_SCRATCH = ("dense", "sparsek", "window", "hard", "random", "frozen", "recency", "wider-window")
CONVERTED = ("convert-dense", "convert-window", "convert-sparsek", "convert-hard", "convert-wider-window")
UNLIMITED = ("dense", "convert-dense")  # these have no budget

PRESETS = {
    "cpu": {},
    "gpu": {
        "vocabulary": 8192,
        "context": 4096,
        "dim": 512,
        "layers": 8,
        "heads": 8,
        "groups": 8,
        "window_share": 0.75,
        "compile": True,
        "batch": 8,
        "steps": 1000,
        "lr": 2.5e-3,
        "short_share": 0.5,
        "short_context": 512,
        "text": "site",
        "validation": 128,
        "budgets": [32, 16, 8],
        "seeds": [0, 1, 2],
        "variants": [*FROM_SCRATCH, *CONVERTED],
        "device": "cuda",
    },
}


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained and judged."""

    steps: int
    batch: int
    lr: float
    scorer_lr: float
    short_share: float
    short_context: int
    window_share: float
    convert_window_share: float
    convert_share: float
    convert_batch: int
    convert_lr: float
    convert_scorer_lr: float
    text: str
    validation: int


@dataclasses.dataclass(frozen=True)
class Course:
    """What one training does: steps of some texts each, the first ``short_share`` of them on short texts."""

    steps: int
    batch: int
    lr: float
    scorer_lr: float
    data_seed: int
    short_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """One run of the grid; its three parts are its key in the file."""

    variant: str
    budget: int | None
    seed: int

    def name(self) -> str:
        return f"{self.variant}, {'' if self.budget is None else f'budget {self.budget}, '}seed {self.seed}"


# ------------------------------------------------------------------------------------------------------------ training


class Trainer:
    """Trains and judges models on one text, whose tokens are kept in a folder, and one device."""

    def __init__(
        self,
        model_settings: ModelSettings,
        settings: TrainingSettings,
        device: torch.device,
        *,
        kept: Path,
        evaluations: int,
        compiled: bool,
    ) -> None:
        self.model_settings, self.settings, self.device = model_settings, settings, device
        self.evaluations, self.compiled = evaluations, compiled
        training, held_out, self.text_facts = read_text(settings.text, model_settings.vocabulary, kept)
        self.text = training.to(device)
        starts = torch.linspace(0, held_out.numel() - model_settings.context - 1, settings.validation).long()
        self.held_out = excerpts(held_out, starts, model_settings.context + 1).to(device)

    def autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; the CPU's kernels are as fast in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def make(self, pattern: Pattern, seed: int, state: dict | None = None) -> LanguageModel:
        """A model with the weights of its seed, or with those of a trained one."""
        torch.manual_seed(seed)
        model = LanguageModel(self.model_settings, pattern)
        if state is not None:
            # A dense model has no scorers: these stay as they were drawn.
            missing, unexpected = model.load_state_dict(state, strict=False)
            if unexpected or any(".scorer." not in name for name in missing):
                raise SystemExit(f"the checkpoint is of another model: {missing=}, {unexpected=}")
        model.to(self.device)
        if self.compiled:
            torch._dynamo.config.recompile_limit = 64  # each pattern makes its own version
            for block in model.blocks:  # all blocks share what is compiled for one
                block.compile(dynamic=False)
        return model

    def train(self, model: LanguageModel, course: Course, progress: str) -> dict:
        """Trains a model and returns the figures of the run.

        The clock stands still while the model is judged, and starts after a pass at each length, which may compile.
        """
        steps, context, short_context = course.steps, self.model_settings.context, self.settings.short_context
        groups = model.parameter_groups()
        # By AdamW alone some seeds stay behind for as long as this training lasts, by more than patterns differ.
        muon = torch.optim.Muon(
            [{"params": groups["matrices"], "base": course.lr}], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(
            [
                {"params": groups["embedding"], "weight_decay": 0.1, "base": course.lr},
                # Decay would flatten the scores, and flat scores select nothing.
                {"params": groups["scorers"], "weight_decay": 0.0, "base": course.scorer_lr},
                {"params": groups["rest"], "weight_decay": 0.0, "base": course.lr},
            ],
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        learning = [parameter for group in groups.values() for parameter in group]
        data = torch.Generator()
        judged_at = {round(steps * part / self.evaluations) for part in range(1, self.evaluations + 1)}
        short_steps = round(steps * course.short_share)

        def mean_loss(length: int) -> torch.Tensor:
            starts = torch.randint(self.text.numel() - context, (course.batch * context // length,), generator=data)
            with self.autocast():
                return model.losses(excerpts(self.text, starts, length + 1)).mean()

        for length in {short_context if short_steps else context, context}:
            mean_loss(length).backward()
        model.zero_grad()
        data.manual_seed(course.data_seed)
        curve = [{"step": 0, "seconds": 0.0, "loss": self.evaluate(model)["loss"]}]
        seconds = 0.0
        self.synchronize()
        began = time.perf_counter()
        for step in range(steps):
            warmup = min(1.0, (step + 1) / max(1, steps // 20))
            cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)  # from 1 down to 0.1
            for group in (*muon.param_groups, *adamw.param_groups):
                group["lr"] = group["base"] * min(warmup, cosine)
            loss = mean_loss(short_context if step < short_steps else context)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            muon.step()
            adamw.step()
            if step + 1 in judged_at:
                self.synchronize()
                seconds += time.perf_counter() - began
                results = self.evaluate(model)
                curve.append({"step": step + 1, "seconds": seconds, "loss": results["loss"]})
                show(f"{progress}: step {step + 1} of {steps}, held-out loss {results['loss']:.4f}")
                self.synchronize()
                began = time.perf_counter()
        tokens = steps * course.batch * context
        return results | {
            "curve": curve,
            "steps": steps,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "scorers": scorer_statistics(model),
        }

    @torch.no_grad()
    def evaluate(self, model: LanguageModel) -> dict:
        """Mean held-out loss in nats per token: of all positions, and of each quarter of the context."""
        with self.autocast():
            # --validation is a multiple of --batch, so that all parts weigh the same.
            losses = torch.stack([model.losses(part).mean(0) for part in self.held_out.split(self.settings.batch)])
        quarters = losses.mean(0).double().view(4, -1).mean(1).tolist()
        return {"loss": sum(quarters) / 4, "quarters": quarters}

    def keys_seen(self, model: LanguageModel) -> dict:
        """Keys with a gate above 0 that a query sees: the mean over all queries, and over the last quarter of them."""
        with self.autocast():
            seen = model.keys_seen(self.held_out[: self.settings.batch, :-1])
        return {"keys_seen": seen.mean().item(), "keys_seen_late": seen.view(4, -1)[3].mean().item()}

    def everything(self) -> dict:
        """All settings, and the facts about the text."""
        return dataclasses.asdict(self.model_settings) | dataclasses.asdict(self.settings) | self.text_facts

    def fingerprint(self) -> int:
        """A number for all that a dense model depends on but its seed: several calls may keep models in one folder."""
        others = ("convert_", "scorer_", "slope", "spread", "validation", "window_share")
        relevant = {name: value for name, value in self.everything().items() if not name.startswith(others)}
        return zlib.crc32(json.dumps(relevant, sort_keys=True).encode())

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_trainer(args: argparse.Namespace) -> Trainer:
    """What the command line asks for."""
    model_settings, settings = (
        kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})
        for kind in (ModelSettings, TrainingSettings)
    )
    device = torch.device(args.device)
    return Trainer(
        model_settings, settings, device, kept=args.checkpoints, evaluations=args.evaluations, compiled=args.compile
    )


def pattern_of(work: Work, s: TrainingSettings, runs: list[dict]) -> Pattern | None:
    """The pattern of a run; None where it depends on another run that is not there yet."""
    kind = work.variant.removeprefix("convert-")
    if kind == "dense":
        return Pattern("dense")
    if kind == "window":
        return Pattern("window", window=work.budget)
    if kind == "wider-window":
        soft = lm_report.find(runs, work.variant.replace("wider-window", "sparsek"), work.budget, work.seed)
        return soft and Pattern("window", window=math.ceil(soft["keys_seen_late"]))
    share = s.convert_window_share if work.variant in CONVERTED else s.window_share
    window = min(round(work.budget * share), work.budget - 1)
    return Pattern(kind, k=work.budget - window, window=window)


# ---------------------------------------------------------------------------------------------------------------- grid


def grid(variants: list[str], budgets: list[int], seeds: list[int]) -> list[Work]:
    """All runs asked for, ordered such that those of a seed and a budget are finished together."""
    works = []
    for seed in seeds:
        for budget in (None, *budgets):
            for variant in (*UNLIMITED, *FROM_SCRATCH[1:], *CONVERTED[1:]):
                if variant in variants and (variant in UNLIMITED) == (budget is None):
                    works.append(Work(variant, budget, seed))
    return works


def run(work: Work, trainer: Trainer, runs: list[dict], checkpoints: Path) -> dict | str:
    """The figures of a run, or why it cannot be done now."""
    s = trainer.settings
    pattern = pattern_of(work, s, runs)
    if pattern is None:
        return f"needs the {work.variant.replace('wider-window', 'sparsek')} run of the same budget and seed first"
    path = checkpoints / f"dense_{trainer.fingerprint():08x}_{work.seed}.pt"
    began = time.perf_counter()
    if work.variant in CONVERTED:
        if not path.exists():
            return f"needs the checkpoint {path} of the dense run"
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = trainer.make(pattern, work.seed, state)
        steps = max(1, int(s.steps * s.convert_share * s.batch / s.convert_batch))
        rates = s.lr * s.convert_lr, s.lr * s.convert_scorer_lr
        # Other batches than those that the dense model has learnt from.
        course = Course(steps, s.convert_batch, *rates, data_seed=work.seed + 1_000_000)
    else:
        model = trainer.make(pattern, work.seed)
        course = Course(s.steps, s.batch, s.lr, s.lr * s.scorer_lr, data_seed=work.seed, short_share=s.short_share)
    figures = trainer.train(model, course, work.name())
    figures |= trainer.keys_seen(model)
    if work.variant == "dense":
        checkpoints.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    selected = {"k": pattern.k if pattern.kind not in ("dense", "window") else 0, "window": pattern.window}
    return dataclasses.asdict(work) | selected | figures | {"total_seconds": time.perf_counter() - began}


def environment(device: torch.device, commit: str | None) -> dict:
    """What the figures depend on besides the settings."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    if commit is None:
        try:
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = None
    gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "xformers_sparsek": xformers_sparsek.__version__,
    }


def load(path: Path, settings: dict) -> dict:
    """The report so far, or an empty one; refuses to mix runs of different settings."""
    if not path.exists():
        return {"settings": settings, "calls": [], "runs": []}
    report = json.loads(path.read_text())
    changes = [
        f"{name} {report['settings'].get(name)} there and {value} here"
        for name, value in settings.items()
        if report["settings"].get(name) != value
    ]
    if changes:
        raise SystemExit(f"{path} holds runs of other settings, so name another file by --json: {', '.join(changes)}")
    return report


def add_run(path: Path, settings: dict, facts: dict, figures: dict) -> None:
    """Adds a run to the report, which other calls may be adding to as well; whoever reads it sees the old one or the
    new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = load(path, settings)
        if facts not in report["calls"]:
            report["calls"].append(facts)
        report["runs"].append(figures | {"call": report["calls"].index(facts)})
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial, path)


def show(line: str) -> None:
    """Says how far the work is."""
    print(line, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    """The command line; a preset sets other defaults, which flags still override."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="sizes for two cores, or for one large GPU")
    add("--variants", nargs="+", choices=(*FROM_SCRATCH, *CONVERTED), help="what to run")
    add("--budgets", nargs="+", type=positive, help="keys for each query: 16 is a sixteenth of the context")
    add("--seeds", nargs="+", type=int)
    add("--minutes", type=float, default=math.inf, help="begin no run that would probably end later")
    add("--vocabulary", type=positive, help=f"kinds of tokens: {BYTES} for bytes, or pieces learnt from the text")
    add("--context", type=positive, help="tokens")
    add("--dim", type=positive, help="width of the hidden state")
    add("--layers", type=positive)
    add("--heads", type=positive, help="query heads")
    add("--groups", type=positive, help="key/value heads")
    add("--steps", type=positive, help="of training from scratch")
    add("--batch", type=positive, help="texts per step")
    add("--lr", type=float, help="peak learning rate")
    add("--scorer-lr", type=float, help="learning rate of the scorers in units of --lr")
    add("--short-share", type=float, help="part of the steps that train on shorter texts, as many tokens of them")
    add("--short-context", type=positive, help="tokens of those texts")
    add("--spread", type=float, help="standard deviation of the scores at the start")
    add("--slope", type=float, help="rise of the scores of the first group over k tokens at the start")
    add("--slope-ratio", type=float, help="that slope over the one of the last group")
    add("--scorer-input", choices=("mixed", "residual"), help="what attention reads, or the stream before its norm")
    add("--window-share", type=float, help="part of the budget that is a window")
    add("--convert-window-share", type=float, help="that of converted models, which are used to seeing far")
    add("--convert-share", type=float, help="tokens after conversion, as a part of those before")
    add("--convert-batch", type=positive, help="texts per step after conversion: scorers need many steps")
    add("--convert-lr", type=float, help="peak learning rate after conversion, in units of --lr")
    add("--convert-scorer-lr", type=float, help="that of the scorers, the only part that is new then")
    add("--text", choices=("stdlib", "site"), help="the standard library, or installed packages too")
    add("--validation", type=positive, help="held-out texts")
    add("--evaluations", type=positive, help="how often a run is judged")
    add("--device")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the blocks by torch.compile")
    add("--json", type=Path, default=Path("out/compare_lm/compare_lm.json"), help="where the figures go")
    add("--checkpoints", type=Path, help="where dense models and tokens are kept; next to the figures by default")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the figures next to the file")
    add("--commit", help="what was measured, where git cannot say it")
    parser.set_defaults(
        variants=["dense", "sparsek", "window", "hard", "random", *CONVERTED],
        budgets=[16],
        seeds=[0],
        vocabulary=BYTES,
        context=512,
        dim=64,
        layers=2,
        heads=4,
        groups=4,
        steps=400,
        batch=4,
        lr=1e-2,
        scorer_lr=1.0,
        short_share=0.5,
        short_context=64,
        spread=1.0,
        slope=1.0,
        slope_ratio=64.0,
        scorer_input="mixed",
        window_share=0.5,
        convert_window_share=0.25,
        convert_share=0.05,
        convert_batch=1,
        convert_lr=0.05,
        convert_scorer_lr=10.0,
        text="stdlib",
        validation=64,
        evaluations=5,
        device="cpu",
        compile=False,
    )
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset])
    args = parser.parse_args()
    args.checkpoints = args.checkpoints or args.json.parent / "checkpoints"
    if args.dim % (2 * args.heads) or args.heads % args.groups:
        parser.error(f"--dim {args.dim} must be a multiple of twice --heads {args.heads}, that one of {args.groups=}")
    if args.validation % args.batch or args.context % 4:
        parser.error(f"--validation {args.validation} must be a multiple of --batch, --context one of 4")
    if any(args.context % parts or args.context // parts < 2 for parts in args.budgets):
        parser.error(f"--budgets {args.budgets} must divide --context {args.context} into 2 keys or more")
    if not 0 <= args.short_share <= 1:
        parser.error("--short-share must be from 0 to 1")
    if args.short_share and args.context % args.short_context:
        parser.error(f"--short-context {args.short_context} must divide --context {args.context}")
    if not (0 <= args.window_share < 1 and 0 <= args.convert_window_share < 1):
        parser.error("--window-share and --convert-window-share must be at least 0 and less than 1")
    return args


def positive(text: str) -> int:
    """A count."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it stands above."""


def main() -> None:
    began = time.monotonic()
    args = parse_arguments()
    trainer = make_trainer(args)
    everything = trainer.everything()
    report = load(args.json, everything)
    facts = environment(trainer.device, args.commit) | {"compiled": args.compile}
    print("\n".join(f"{name}: {value}" for name, value in (report["settings"] | facts).items()), flush=True)

    longest = 0.0
    for work in grid(args.variants, [args.context // parts for parts in args.budgets], args.seeds):
        report = load(args.json, everything)  # with what another call may have added
        if lm_report.find(report["runs"], **dataclasses.asdict(work)):
            show(f"{work.name()}: done before, skipped")
        elif (time.monotonic() - began + longest) / 60 > args.minutes:
            show(f"{work.name()}: left for the next call, --minutes {args.minutes:g} are over")
        else:
            start = time.monotonic()
            figures = run(work, trainer, report["runs"], args.checkpoints)
            longest = max(longest, time.monotonic() - start)
            if isinstance(figures, str):
                show(f"{work.name()}: not run, {figures}")
                continue
            add_run(args.json, everything, facts, figures)

    report = load(args.json, everything)
    print(f"\n{lm_report.text(report)}")
    print(f"\nfigures: {args.json}")
    if args.plot and report["runs"]:
        picture = args.json.with_suffix(".png")
        lm_report.plot(report, picture)
        print(f"picture: {picture}")


if __name__ == "__main__":
    main()
