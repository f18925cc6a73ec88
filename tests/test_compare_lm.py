"""The comparison of language models as its users run it: every variant trains, is reported, and is not run twice."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib import image

from xformers_sparsek import sparsek

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = "--steps 2 --context 64 --dim 16 --layers 2 --heads 2 --groups 1 --batch 2 --validation 4 --convert-share 0.5"
BUDGETED = {"sparsek", "window", "hard", "random", "frozen", "recency", "wider-window"}
CONVERTED = {"convert-window", "convert-sparsek", "convert-hard", "convert-wider-window"}
ALL = {"dense", "convert-dense"} | BUDGETED | CONVERTED


def compare(file: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "compare_lm.py"), *SMALL.split(), "--json", str(file), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The file and the output of a run of every variant for two budgets and two seeds."""
    file = tmp_path_factory.mktemp("compare") / "figures.json"
    done = compare(file, "--variants", *sorted(ALL), "--budgets", "8", "16", "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    return file, done.stdout


@pytest.fixture(scope="module")
def runs(finished) -> dict[tuple, dict]:
    """The figures by variant, budget and seed."""
    report = json.loads(finished[0].read_text())
    return {(run["variant"], run["budget"], run["seed"]): run for run in report["runs"]}


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The script and its parts as modules."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import compare_lm
        import lm_model
        import lm_report
    finally:
        sys.path.remove(str(EXAMPLES))
    return {"script": compare_lm, "model": lm_model, "report": lm_report}


def test_every_variant_runs_once(runs):
    expected = {(v, b, s) for v in BUDGETED | CONVERTED for b in (8, 4) for s in (0, 1)}
    assert set(runs) == expected | {(v, None, s) for v in ("dense", "convert-dense") for s in (0, 1)}


def test_figures(runs):
    for (variant, budget, _), run in runs.items():
        losses = [run["loss"], *run["quarters"], *(point["loss"] for point in run["curve"])]
        # Little is learnt in two steps: near the uniform distribution over bytes, but nowhere worse than it started.
        assert all(math.isfinite(loss) and abs(loss - math.log(256)) < 0.5 for loss in losses), losses
        assert run["loss"] == pytest.approx(sum(run["quarters"]) / 4)
        assert run["curve"][-1]["loss"] == run["loss"] < run["curve"][0]["loss"]
        # Half as many tokens after conversion as before, in steps of one text instead of two.
        assert run["steps"] == 2 and run["tokens"] == 2 * 64 * (1 if variant.startswith("convert-") else 2)
        if variant in {"sparsek", "hard", "random", "frozen", "recency", "convert-sparsek", "convert-hard"}:
            assert run["k"] + run["window"] == budget and run["k"] > 0 < run["window"]
        elif variant in {"window", "convert-window"}:
            assert (run["k"], run["window"]) == (0, budget)
        if variant in {"window", "hard", "recency", "convert-window", "convert-hard"}:
            assert run["keys_seen_late"] == budget
        elif variant in {"dense", "convert-dense"}:
            assert run["keys_seen"] == 32.5
        elif not variant.endswith("wider-window"):
            assert budget <= run["keys_seen_late"] < 4 * budget


def test_scorers_are_reported(runs):
    for (variant, _, _), run in runs.items():
        if variant == "frozen":
            assert run["scorers"] == pytest.approx({"spread": 1, "slope": 1})
        elif variant.removeprefix("convert-") in {"sparsek", "hard"}:
            assert run["scorers"] == pytest.approx({"spread": 1, "slope": 1}, abs=0.5)
        else:
            assert run["scorers"] == {}


@pytest.mark.parametrize("kind", ["sparsek", "hard", "frozen"])
def test_scorers_learn_unless_frozen(kind, modules):
    model, tokens = small_model(modules["model"], kind)
    model.losses(tokens).mean().backward()
    hidden = torch.randn(2, 24, 16, requires_grad=True)
    assert model.blocks[0].attention.scores(hidden).requires_grad == (kind != "frozen")
    scorers = [parameter for name, parameter in model.named_parameters() if ".scorer." in name]
    learning = model.parameter_groups()["scorers"]
    assert len(scorers) == 3 and len(learning) == (0 if kind == "frozen" else 3)
    for parameter in scorers:
        assert parameter.grad is None if kind == "frozen" else parameter.grad.abs().max() > 0


def test_all_else_is_equal(runs):
    """Rising scores select what a window of the same budget sees, so both models must learn the very same."""
    for budget in (4, 8):
        for seed in (0, 1):
            window, recency = (runs[variant, budget, seed] for variant in ("window", "recency"))
            assert recency["loss"] == pytest.approx(window["loss"], rel=1e-5)
            assert runs["sparsek", budget, seed]["loss"] != pytest.approx(window["loss"], rel=1e-6)
        assert runs["window", budget, 0]["loss"] != pytest.approx(runs["window", budget, 1]["loss"], rel=1e-4)


def test_wider_window_is_as_wide_as_what_sparsek_saw(runs):
    for (variant, budget, seed), run in runs.items():
        if variant.endswith("wider-window"):
            seen = runs[variant.replace("wider-window", "sparsek"), budget, seed]["keys_seen_late"]
            assert run["window"] == run["keys_seen_late"] == math.ceil(seen) > budget


def test_conversion_starts_from_the_dense_model(runs):
    for seed in (0, 1):
        dense = runs["dense", None, seed]["loss"]
        assert runs["convert-dense", None, seed]["curve"][0]["loss"] == pytest.approx(dense, rel=1e-6)
        for variant in CONVERTED:
            before = runs[variant, 8, seed]["curve"][0]["loss"]
            assert before != pytest.approx(dense, rel=1e-7) and before == pytest.approx(dense, rel=0.05)


def test_second_call_skips_and_a_new_seed_is_added(finished, tmp_path):
    file = tmp_path / "figures.json"
    before = finished[0].read_bytes()
    file.write_bytes(before)
    again = compare(file, "--variants", *sorted(ALL), "--budgets", "8", "16", "--seeds", "0", "1")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before, skipped") == 48 and "step" not in again.stderr
    assert file.read_bytes() == before
    assert tables(again.stdout) == tables(finished[1])

    more = compare(file, "--variants", "hard", "convert-hard", "--budgets", "8", "--seeds", "1", "2", "--no-plot")
    assert more.returncode == 0, more.stderr
    assert "convert-hard, budget 8, seed 2: not run, needs the checkpoint" in more.stderr
    old, new = (json.loads(text)["runs"] for text in (before, file.read_text()))
    assert new[:-1] == old
    assert (new[-1]["variant"], new[-1]["budget"], new[-1]["seed"], new[-1]["call"]) == ("hard", 8, 2, 1)


def tables(output: str) -> str:
    return output[output.index("trained from scratch") : output.index("figures:")]


def test_no_time_left(tmp_path):
    """No run begins that would end too late."""
    file = tmp_path / "figures.json"
    done = compare(file, "--variants", "window", "wider-window", "hard", "--minutes", "0.000001", "--no-plot")
    assert done.returncode == 0, done.stderr
    assert "left for the next call" in done.stderr
    assert not file.exists() and "no run is finished" in done.stdout


def test_calls_side_by_side(tmp_path):
    """Several calls fill one file, and lose nothing of each other's."""
    file = tmp_path / "figures.json"
    with ThreadPoolExecutor() as pool:
        calls = [
            pool.submit(compare, file, "--variants", "window", "random", "--seeds", str(seed), "--no-plot")
            for seed in range(3)
        ]
    assert [call.result().returncode for call in calls] == [0, 0, 0], [call.result().stderr for call in calls]
    runs = json.loads(file.read_text())["runs"]
    assert sorted((r["variant"], r["seed"]) for r in runs) == [(v, s) for v in ("random", "window") for s in range(3)]


def test_dense_models_of_other_settings_are_not_converted(finished, tmp_path):
    """They lie beside each other; what dense models do not depend on may differ."""
    kept = finished[0].parent / "checkpoints"
    options = ("--variants", "convert-sparsek", "--checkpoints", str(kept), "--no-plot")
    done = compare(tmp_path / "spread.json", *options, "--spread", "0.5", "--convert-lr", "0.2")
    assert done.returncode == 0 and "convert-sparsek" in done.stdout, done.stderr
    done = compare(tmp_path / "lr.json", *options, "--lr", "0.02")
    assert done.returncode == 0, done.stderr
    assert "seed 0: not run, needs the checkpoint" in done.stderr


def test_pieces_of_several_bytes(tmp_path):
    """A vocabulary of 512 is half bytes, half pieces that the text repeats; its tokens are made once."""
    pytest.importorskip("tokenizers")
    file = tmp_path / "figures.json"
    kept = []
    for seed in ("0", "1"):
        done = compare(file, "--variants", "window", "--vocabulary", "512", "--seeds", seed, "--no-plot")
        assert done.returncode == 0, done.stderr
        [path] = (tmp_path / "checkpoints").glob("text_*_512.pt")
        kept.append(path.stat().st_mtime_ns)
    assert kept[0] == kept[1]
    report = json.loads(file.read_text())
    assert 1.5 < report["settings"]["bytes_per_token"] < 4
    assert all(abs(run["loss"] - math.log(512)) < 0.5 for run in report["runs"])


def test_other_settings_are_refused(finished):
    before = finished[0].read_bytes()
    done = compare(finished[0], "--lr", "0.5", "--variants", "dense")
    assert done.returncode == 1
    assert "lr 0.01 there and 0.5 here" in done.stderr
    assert finished[0].read_bytes() == before


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--dim=18", "--dim 18 must be a multiple"),
        ("--short-share=1.5", "--short-share must be from 0 to 1"),
        ("--short-share=0.5 --short-context=48", "--short-context 48 must divide --context 64"),
        ("--validation=3", "--validation 3 must be a multiple"),
        ("--budgets=64", "must divide --context 64"),
        ("--window-share=1", "--window-share and --convert-window-share must be"),
        ("--layers=0", "--layers: invalid"),
    ],
)
def test_bad_arguments(modules, monkeypatch, capsys, option, reason):
    monkeypatch.setattr(sys, "argv", ["compare_lm.py", *SMALL.split(), *option.split()])
    with pytest.raises(SystemExit) as refusal:
        modules["script"].parse_arguments()
    assert refusal.value.code == 2
    assert reason in capsys.readouterr().err


def test_preset(modules, monkeypatch):
    """A preset sets defaults, which flags override."""
    monkeypatch.setattr(sys, "argv", ["compare_lm.py", "--preset", "gpu", "--steps", "7"])
    args = modules["script"].parse_arguments()
    assert (args.context, args.steps, args.device, args.seeds) == (4096, 7, "cuda", [0, 1, 2])


def test_short_texts_at_first(modules, tmp_path, monkeypatch):
    """As many tokens of them in a step, and only at first."""
    script = modules["script"]
    options = f"{SMALL} --short-share 0.5 --short-context 16 --json {tmp_path}/figures.json".split()
    monkeypatch.setattr(sys, "argv", ["compare_lm.py", *options])
    trainer = script.make_trainer(script.parse_arguments())
    model = trainer.make(modules["model"].Pattern("window", window=4), 0)
    shapes = []
    losses = model.losses
    monkeypatch.setattr(model, "losses", lambda tokens: shapes.append(tuple(tokens.shape)) or losses(tokens))
    trainer.evaluate = lambda model: {"loss": 0.0}
    course = script.Course(steps=4, batch=2, lr=1e-3, scorer_lr=1e-3, data_seed=0, short_share=0.5)
    figures = trainer.train(model, course, "")
    short, long = (8, 17), (2, 65)
    assert sorted(shapes[:2]) == [long, short]  # what the clock leaves out
    assert shapes[2:] == [short, short, long, long]
    assert figures["tokens"] == 4 * 2 * 64


def test_picture(finished):
    pixels = image.imread(finished[0].with_suffix(".png"))
    height, width, _ = pixels.shape
    assert height > 500 and width > 800
    assert len(set(map(tuple, (pixels[::2, ::2, :3] * 255).astype(int).reshape(-1, 3).tolist()))) > 50


def test_verdicts(modules):
    """Made-up figures, whose verdicts are known."""

    def made(variant: str, budget: int | None, seed: int, before: float, loss: float) -> dict:
        key = {"variant": variant, "budget": budget, "seed": seed, "loss": loss, "quarters": [loss] * 4}
        counts = {"keys_seen": 8.0, "keys_seen_late": 8.0, "seconds": 1.0, "tokens_per_second": 1.0}
        return key | counts | {"curve": [{"loss": before}, {"loss": loss}]}

    made_up = []
    for seed, shift in ((0, 0.0), (1, 0.002)):
        for variant, budget, before, loss in (
            ("dense", None, 5.5, 1.0),
            ("sparsek", 8, 5.5, 1.01),
            ("window", 8, 5.5, 1.05),
            ("hard", 8, 5.5, 1.011),
            ("convert-dense", None, 1.0, 0.98),
            ("convert-window", 8, 2.0, 1.18),
            ("convert-sparsek", 8, 1.8, 0.99),
            ("convert-hard", 8, 1.8, 1.08),
        ):
            made_up.append(made(variant, budget, seed, before + shift, loss + shift))
    told = modules["report"].text({"settings": {"context": 64}, "runs": made_up})
    ends = {
        "sparsek is +1.00 % from dense": "met",
        "loss of window less that of sparsek, over 2 seeds: +0.0400 (+0.0400 to +0.0400)": "0.0020: met",
        "loss of hard less that of sparsek": "0.0020: not met",
        "convert-sparsek recovers 101.0 % (101.0-101.0) of the gap": "met",
        "convert-sparsek recovers 95.0 %": "met",
        "convert-hard recovers 50.0 %": "not met",
    }
    lines = told.splitlines()
    for begin, end in ends.items():
        (line,) = [line for line in lines if begin in line]
        assert line.endswith(end if "met" in end and ":" in end else f": {end}"), line
    made_up[1]["loss"] = 1.03  # sparsek of seed 0
    lines = modules["report"].text({"settings": {"context": 64}, "runs": made_up[:8]}).splitlines()
    assert any("sparsek is +3.00 % from dense" in line and line.endswith(": not met") for line in lines)
    assert any("loss of window" in line and line.endswith("not decided by one seed") for line in lines)


def small_model(lm: ModuleType, kind: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model of one layer for texts of 24 bytes, which keeps 5 and a window of 3 of them, and two texts."""
    torch.manual_seed(0)
    settings = lm.ModelSettings(
        vocabulary=256,
        context=24,
        dim=16,
        layers=1,
        heads=2,
        groups=2,
        spread=4.0,
        slope=1.0,
        slope_ratio=64.0,
        scorer_input="mixed",
    )
    model = lm.LanguageModel(settings, lm.Pattern(kind, k=1 if kind == "window" else 5, window=3))
    return model, torch.randint(256, (2, 25))


@pytest.mark.parametrize("kind", ["sparsek", "hard", "random", "frozen", "window", "recency"])
def test_keys_seen(kind, modules):
    """Counted from expiries, as from the gates themselves."""
    model, tokens = small_model(modules["model"], kind)
    tokens = tokens[:, :-1]
    block = model.blocks[0]
    scores = block.attention.scores(block.mix(block.norm1(model.embedding(tokens)))).detach()
    expected = []
    for i in range(24):
        candidates = scores[:, : max(0, i - 2)]
        if kind == "window":
            selected = torch.zeros(2, 1, 2)
        elif kind == "hard":
            selected = torch.full((2, 1, 2), min(5, candidates.shape[1]))
        else:
            selected = (sparsek(candidates, 5, dim=1) > 0).sum(1) if candidates.shape[1] else torch.zeros(2, 1, 2)
        expected.append(min(i + 1, 3) + selected.double().mean().item())
    assert model.keys_seen(tokens).tolist() == pytest.approx(expected)
