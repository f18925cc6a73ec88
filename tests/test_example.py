"""The example as its users run it: trains, learns to select, draws, stops on Ctrl-C and resumes."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib import image

SCRIPT = Path(__file__).parent.parent / "examples" / "train_bytes.py"
STEPS = 150
SMALL = f"--steps {STEPS} --minutes 5 --context 96 --dim 64 --layers 2 --heads 2 --k 8 --window 4 --batch 8".split()


def start(folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--sample-bytes", "40", *options]
    # The model is too small for more threads to pay, and other tests may be running beside this one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    try:
        return process.communicate(timeout=120)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of one run from the first step to the last."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(folder, *SMALL)
    output, errors = finish(process)
    assert process.returncode == 0, errors
    return folder, output


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_bytes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt")


def test_learns_more_than_byte_frequencies(uninterrupted):
    folder, output = uninterrupted
    nats = {name: float(value) for name, value in re.findall(r"^(.+?) +(\d+\.\d+) nats/byte", output, re.MULTILINE)}
    assert set(nats) == {"training loss", "held-out loss", "unigram entropy"}
    assert 2.5 < nats["unigram entropy"] < 4  # English and code have 3 to 3.5
    assert nats["held-out loss"] < nats["unigram entropy"] - 0.4
    assert nats["training loss"] < nats["unigram entropy"] - 0.4
    losses = checkpoint(folder)["losses"]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(256), abs=1e-3)  # the untrained model knows nothing
    assert "\ndef " in output  # the sample, as the prompt begins it


def test_scorers_learn(uninterrupted, example):
    trained = checkpoint(uninterrupted[0])
    fresh = example.Training(example.Settings(**trained["settings"]), torch.zeros(0, dtype=torch.uint8))
    initial = {name: value for name, value in fresh.model.state_dict().items() if ".scorer." in name}
    assert len(initial) == 6  # weight, gain and slope in each of two layers
    for name, value in initial.items():
        # Nothing but a gradient moves them: the scorers have no weight decay. One weight of a group may come back to
        # where it was, all of them do not.
        moved = (trained["model"][name] - value).abs()
        assert (moved.mean(1) if moved.ndim == 2 else moved).min() > 1e-5, name


def test_picture(uninterrupted):
    pixels = image.imread(uninterrupted[0] / "kept_bytes.png")
    height, width, _ = pixels.shape
    assert width > 1000
    assert height > 500
    colors = (pixels[..., :3] * 255).astype(int) @ [65536, 256, 1]
    coloured = (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)) > 0.2
    assert len(set(colors.ravel().tolist())) > 200
    assert 0.01 < coloured.mean() < 0.5


def test_interrupted_run_resumes_to_the_same_losses(uninterrupted, tmp_path):
    process = start(tmp_path, *SMALL, "--no-plot")
    try:
        # Waits for the first step; libraries may warn before it.
        assert any(f" 1/{STEPS} " in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
    finally:
        _, errors = finish(process)
    assert process.returncode == 1
    assert "--resume" in errors
    partial = checkpoint(tmp_path)["losses"]
    expected = checkpoint(uninterrupted[0])["losses"]
    assert 0 < len(partial) < STEPS

    process = start(tmp_path, "--resume", "--no-plot")
    output, errors = finish(process)
    assert process.returncode == 0, errors
    resumed = checkpoint(tmp_path)
    assert resumed["losses"][: len(partial)] == partial
    assert resumed["losses"] == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / "kept_bytes.png").exists()
    tail = "held-out loss"
    assert (
        output[output.index(tail) :].split("\n\n")[0]
        == uninterrupted[1][uninterrupted[1].index(tail) :].split("\n\n")[0]
    )


@pytest.mark.parametrize("option, reason", [("--dim=32", "another --dim: 64"), ("--out=nowhere", "there is no")])
def test_resume_refuses(uninterrupted, example, monkeypatch, capsys, option, reason):
    monkeypatch.setattr(sys, "argv", ["train_bytes.py", "--out", str(uninterrupted[0]), "--resume", option])
    with pytest.raises(SystemExit) as refusal:
        example.parse_arguments()
    assert refusal.value.code == 2
    assert reason in capsys.readouterr().err
