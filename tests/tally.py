"""Counts what the property tests drew and what they checked, for the summary after a run."""

from __future__ import annotations

import contextlib
from collections import Counter

#: (property, quantity) -> number of cases; "drawn" counts every case that the property was given, "passed" those that
#: it went through to the end, and other quantities those in which that was compared.
COUNTS: Counter[tuple[str, str]] = Counter()
_running: list[str] = []


@contextlib.contextmanager
def case(name: str):
    """One drawn case of the property ``name``."""
    COUNTS[name, "drawn"] += 1
    _running.append(name)
    try:
        yield
    finally:
        _running.pop()


def checked(quantity: str) -> None:
    """One case of the running property in which ``quantity`` was compared."""
    if _running:
        COUNTS[_running[-1], quantity] += 1


def lines() -> list[str]:
    """One line for each property: cases drawn and passed, then cases checked for each quantity."""
    names = sorted({name for name, _ in COUNTS})
    table = []
    for name in names:
        totals = f"{name}: {COUNTS[name, 'drawn']} drawn, {COUNTS[name, 'passed']} passed"
        parts = [
            f"{q} {n}" for (owner, q), n in sorted(COUNTS.items()) if owner == name and q not in ("drawn", "passed")
        ]
        table.append(", of which checked for ".join([totals, *([", ".join(parts)] if parts else [])]))
    return table
