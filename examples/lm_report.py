#!/usr/bin/env python3
"""Tables, verdicts and the plot of what ``compare_lm.py`` has measured; of a file of it, where called as a script."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

ORDER = (
    "dense",
    "sparsek",
    "hard",
    "window",
    "wider-window",
    "recency",
    "frozen",
    "random",
    "convert-dense",
    "convert-sparsek",
    "convert-hard",
    "convert-window",
    "convert-wider-window",
)
# Of what is compared most, each has its colour in all panels.
COLORS = {
    "dense": "black",
    "sparsek": "tab:red",
    "hard": "tab:orange",
    "window": "tab:blue",
    "wider-window": "tab:cyan",
    "recency": "tab:purple",
    "frozen": "tab:green",
    "random": "tab:gray",
}
MOST_ABOVE_DENSE = 0.02
LEAST_RECOVERED = 0.9


# --------------------------------------------------------------------------------------------------------------- lookup


def find(runs: list[dict], variant: str, budget: int | None, seed: int) -> dict | None:
    """The run with this key, if it is finished."""
    return next((r for r in runs if (r["variant"], r["budget"], r["seed"]) == (variant, budget, seed)), None)


def select(runs: list[dict], variant: str, budget: int | None) -> list[dict]:
    """The runs of all seeds."""
    return [r for r in runs if (r["variant"], r["budget"]) == (variant, budget)]


def budgets_of(runs: list[dict]) -> list[int]:
    return sorted({r["budget"] for r in runs if r["budget"] is not None})


def pairs(runs: list[dict], one: str, budget_one: int | None, other: str, budget_other: int | None) -> list[tuple]:
    """The runs of two variants, seed by seed, of the seeds that both have."""
    found = [(r, find(runs, other, budget_other, r["seed"])) for r in select(runs, one, budget_one)]
    return [(a, b) for a, b in found if b is not None]


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def spread(values: list[float]) -> float:
    return max(values) - min(values)


# --------------------------------------------------------------------------------------------------------------- tables


def text(report: dict) -> str:
    """Everything that there is to say about the runs."""
    runs, context = report["runs"], report["settings"]["context"]
    if not runs:
        return "no run is finished"
    sections = []
    for prefix, title in (("", "trained from scratch"), ("convert-", "the dense model, trained on in another pattern")):
        rows = rows_of(runs, context, prefix)
        if len(rows) > 1:
            sections.append(
                f"{title}; losses in nats per token, in brackets from the best seed to the worst\n{table(rows)}"
            )
    lines = [
        line
        for budget in budgets_of(runs)
        for line in (*verdicts(runs, budget, context), *recovery(runs, budget, context))
    ]
    return "\n\n".join([*sections, "\n".join(lines)]) if lines else "\n\n".join(sections)


def rows_of(runs: list[dict], context: int, prefix: str) -> list[list[str]]:
    """A row per budget and variant whose name begins so, below the head."""
    converted = bool(prefix)
    head = ["budget", "variant", "seeds", "loss", "vs. dense", "first quarter", "last quarter", "keys seen", "late"]
    rows = [[*head, *(["before"] if converted else []), "seconds", "tokens/s"]]
    for budget in (None, *budgets_of(runs)):
        for variant in ORDER:
            found = select(runs, variant, budget)
            if not found or variant.startswith("convert-") != converted:
                continue
            compared = pairs(runs, variant, budget, prefix + "dense", None)
            losses = [r["loss"] for r in found]
            speeds = [r["tokens_per_second"] for r in found]
            row = [
                name_of(budget, context) if budget else "all",
                variant,
                str(len(found)),
                f"{mean(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})",
                f"{100 * (mean([a['loss'] / b['loss'] for a, b in compared]) - 1):+.2f} %" if compared else "-",
                *(f"{mean([r['quarters'][part] for r in found]):.4f}" for part in (0, 3)),
                *(f"{mean([r[name] for r in found]):.0f}" for name in ("keys_seen", "keys_seen_late")),
            ]
            if converted:
                row.append(f"{mean([r['curve'][0]['loss'] for r in found]):.4f}")
            rows.append([*row, f"{mean([r['seconds'] for r in found]):.1f}", f"{mean(speeds):,.0f}" if speeds else "-"])
    return rows


def name_of(budget: int, context: int) -> str:
    return f"{budget} = 1/{context // budget}"


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first being the head, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ------------------------------------------------------------------------------------------------------------- verdicts


def verdicts(runs: list[dict], budget: int, context: int) -> list[str]:
    """How SparseK at a budget compares with dense attention and with the other patterns, a line each."""
    lines, label = [], f"budget {name_of(budget, context)}"
    against_dense = pairs(runs, "sparsek", budget, "dense", None)
    if against_dense:
        excess = mean([a["loss"] / b["loss"] for a, b in against_dense]) - 1
        lines.append(
            f"{label}: sparsek is {100 * excess:+.2f} % from dense, at most {100 * MOST_ABOVE_DENSE:+.0f} %: "
            f"{met(excess <= MOST_ABOVE_DENSE)}"
        )
    for other in ("window", "wider-window", "recency", "hard", "frozen", "random"):
        compared = pairs(runs, "sparsek", budget, other, budget)
        if compared:
            margins = [b["loss"] - a["loss"] for a, b in compared]
            noise = max(spread([run["loss"] for run in side]) for side in zip(*compared))
            decided = met(mean(margins) > noise) if len(margins) > 1 else "not decided by one seed"
            lines.append(
                f"{label}: loss of {other} less that of sparsek, over {len(margins)} seeds: {mean(margins):+.4f} "
                f"({min(margins):+.4f} to {max(margins):+.4f}), beyond their spread of {noise:.4f}: {decided}"
            )
    return lines


def recovery(runs: list[dict], budget: int, context: int) -> list[str]:
    """How much of what the dense model loses by a window alone conversion wins back, a line per case."""
    lines = []
    for variant in ("convert-sparsek", "convert-hard", "convert-wider-window"):
        # Of the window as it is, and of the one that was trained on as long as the converted model.
        for case, point in (("as it is", 0), ("trained on", -1)):
            parts = [
                recovered(point, run, window, find(runs, "convert-dense", None, run["seed"]))
                for run, window in pairs(runs, variant, budget, "convert-window", budget)
            ]
            parts = [part for part in parts if part is not None]
            if parts:
                lines.append(
                    f"budget {name_of(budget, context)}: {variant} recovers {100 * mean(parts):.1f} % "
                    f"({100 * min(parts):.1f}-{100 * max(parts):.1f}) of the gap between the dense model and a window "
                    f"{case}, at least {100 * LEAST_RECOVERED:.0f} %: {met(mean(parts) >= LEAST_RECOVERED)}"
                )
    return lines


def recovered(point: int, run: dict, window: dict, dense: dict | None) -> float | None:
    """The part of the gap between window and dense that a run closes; None without a gap.

    Both the window and the dense model are taken at one point of their curves: 0 is before they were trained on.
    """
    if dense is None:
        return None
    low, high = dense["curve"][point]["loss"], window["curve"][point]["loss"]
    return (high - run["loss"]) / (high - low) if high > low else None


def met(true: bool) -> str:
    return "met" if true else "not met"


# ----------------------------------------------------------------------------------------------------------------- plot


def plot(report: dict, path: Path) -> None:
    """Draws loss against budget, against time and by position, and what conversion does."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    runs, context = report["runs"], report["settings"]["context"]
    figure, ((by_budget, by_time), (by_position, by_conversion)) = plt.subplots(
        2, 2, figsize=(13, 9), layout="constrained", facecolor="white"
    )
    budgets = budgets_of(runs)
    shown = budgets[len(budgets) // 2] if budgets else None
    label = f" (budget {name_of(shown, context)})" if shown else ""

    for variant, color in COLORS.items():
        if variant == "dense":
            losses = [r["loss"] for r in select(runs, variant, None)]
            if losses:
                by_budget.axhspan(min(losses), max(losses), color=color, alpha=0.2)
                by_budget.axhline(mean(losses), color=color, label=variant)
            chosen = select(runs, variant, None)
        else:
            points = [(b, [r["loss"] for r in select(runs, variant, b)]) for b in budgets if select(runs, variant, b)]
            if points:
                means = [mean(losses) for _, losses in points]
                errors = [[m - min(x), max(x) - m] for m, (_, x) in zip(means, points)]
                xs = [b for b, _ in points]
                by_budget.errorbar(xs, means, list(zip(*errors)), color=color, marker="o", capsize=3, label=variant)
                if variant != "wider-window":
                    # Soft gates see more keys than the budget: the same losses, dotted, over the keys that they see.
                    seen = [mean([r["keys_seen_late"] for r in select(runs, variant, b)]) for b in xs]
                    by_budget.plot(seen, means, color=color, marker="o", markerfacecolor="none", linestyle=":")
            chosen = select(runs, variant, shown)
        for index, r in enumerate(chosen):
            name = variant if index == 0 else None
            curve = r["curve"][1:]
            by_time.plot([p["seconds"] for p in curve], [p["loss"] for p in curve], color=color, label=name, marker=".")
        if chosen:
            quarters = [mean([r["quarters"][part] for r in chosen]) for part in range(4)]
            by_position.plot([1, 2, 3, 4], quarters, color=color, marker="o", label=variant)
    by_budget.set(
        xscale="log",
        xlabel="keys for each query: budget, dotted: seen",
        ylabel="held-out loss, nats per token",
        title="Loss by budget",
    )
    by_budget.set_xticks(budgets, [str(b) for b in budgets])
    by_budget.minorticks_off()
    by_time.set(xlabel="seconds of training", ylabel="held-out loss", title=f"Loss by time{label}")
    by_position.set(xlabel="quarter of the context", ylabel="held-out loss", title=f"Loss by position{label}")
    by_position.set_xticks([1, 2, 3, 4])
    for variant in ("dense", "sparsek", "hard", "window", "wider-window"):
        found = select(runs, f"convert-{variant}", None if variant == "dense" else shown)
        for index, r in enumerate(found):
            steps, losses = zip(*((p["step"], p["loss"]) for p in r["curve"]))
            name = f"convert-{variant}" if index == 0 else None
            by_conversion.plot(steps, losses, color=COLORS[variant], marker=".", label=name)
    by_conversion.set(xlabel="steps after conversion", ylabel="held-out loss", title=f"Converted dense model{label}")
    for axes in (by_budget, by_time, by_position, by_conversion):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="the file of compare_lm.py; the picture goes next to it")
    path = parser.parse_args().json
    report = json.loads(path.read_text())
    print(text(report))
    plot(report, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
