"""Profiles, devices, and the count of checked cases.

``pytest`` runs the default profile on the CPU; ``HYPOTHESIS_PROFILE=fuzz pytest`` draws many times as many cases
(``FUZZ_CASES`` for most properties), fresh ones each time; ``pytest -m cuda`` runs the same tests on a GPU.
"""

from __future__ import annotations

import os

import pytest
import tally
import torch
from hypothesis import HealthCheck, settings

_COMMON = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# The default run draws the same cases every time, so that it passes or fails with the code alone.
settings.register_profile("default", _COMMON, max_examples=80, derandomize=True, database=None)
settings.register_profile("fuzz", _COMMON, max_examples=int(os.environ.get("FUZZ_CASES", "1000")), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: runs on a GPU; only with -m cuda")
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # the workers of xdist share the cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "cuda" in config.option.markexpr:
        return
    for_gpu = [item for item in items if item.get_closest_marker("cuda")]
    if for_gpu:
        config.hook.pytest_deselected(items=for_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("-m cuda needs a GPU that PyTorch can use")
    return torch.device(request.param)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = [[*key, n] for key, n in tally.COUNTS.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for name, quantity, n in getattr(node, "workeroutput", {}).get("tally", []):
        tally.COUNTS[name, quantity] += n


def pytest_terminal_summary(terminalreporter) -> None:
    if tally.COUNTS:
        terminalreporter.section("cases drawn and checked")
        for line in tally.lines():
            terminalreporter.write_line(line)
