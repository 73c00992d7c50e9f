"""Figures that set things side by side: criteria and domains, sources of text, plans and what they
cost. As those of `reap.report.figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from reap.report.drawing import (
    LETTER,
    bottom_of,
    entry,
    name_columns,
    name_rows,
    plain_numbers,
    scale_bar,
    tinted,
)
from reap.report.style import (
    MARKERS,
    WIDTH,
    Theme,
    canvas,
    themed,
)


@themed
def agreement(
    theme: Theme,
    names: Sequence[str],
    correlation: Tensor,  # [N,N]
    shared: Tensor,  # [N,N]
) -> Figure:
    """Two tables of N against N: mean rank correlation, and what dropped sets have in common."""
    N = len(names)
    left = 0.2 + LETTER * max(map(len, names))
    side = min(0.62, (WIDTH / 2 - left - 0.25) / N)
    high = min(side, 0.34)
    figure, first = canvas(
        WIDTH,
        N * high + 0.45 + bottom_of(names, side),
        left=left,
        right=WIDTH - left - N * side,
        top=0.35,
        bottom=0.1 + bottom_of(names, side),
    )
    box = first.get_position()
    second = figure.add_axes((0.5 + box.x0, box.y0, box.width, box.height))
    for axes, table, title, form in (
        (first, correlation, "rank correlation, mean over layers", "{:.2f}"),
        (second, shared, "dropped experts in common, mean over layers", "{:.0%}"),
    ):
        tinted(axes, table, form if side > 0.3 else "")
        axes.set_title(title)
        name_rows(axes, names, high)
        name_columns(axes, names, side)
    return figure


@themed
def by_layer(
    theme: Theme,
    labels: Sequence[str],
    names: Sequence[str],
    shared: Tensor,  # [N,L]
) -> Figure:
    """Per layer, what each of N rankings would drop in common with the first."""
    N, L = shared.shape
    left = 0.35 + LETTER * max(map(len, names))
    figure, axes = canvas(
        WIDTH,
        N * 0.24 + 1.0 + bottom_of(labels),
        left=left,
        top=0.45,
        bottom=0.3 + bottom_of(labels),
    )
    tinted(axes, shared, "{:.0%}" if L <= 24 else "")
    name_rows(axes, names, 0.24)
    name_columns(axes, labels)
    scale_bar(figure, None, "dropped experts in common", [0, 0.25, 0.5, 0.75, 1])
    return figure


@themed
def composition(
    theme: Theme,
    sources: Sequence[str],
    tokens: Sequence[int],
    domains: Sequence[int],  # number of each one's domain
    names: Sequence[str],  # of the domains
) -> Figure:
    """Tokens counted of each source of text, by domain."""
    N = len(sources)
    left = 0.3 + LETTER * max(map(len, sources))
    figure, axes = canvas(WIDTH, 0.26 * N + 0.85, left=left, right=1.0, top=0.4, bottom=0.45)
    for domain in dict.fromkeys(domains):
        mine = [at for at in range(N) if domains[at] == domain]
        axes.barh(
            mine,
            [tokens[at] for at in mine],
            height=0.62,
            color=theme.series[domain % len(theme.series)],
            label=entry(names[domain]),
        )
    whole = sum(tokens)
    for at, amount in enumerate(tokens):
        part = f"  {amount / whole:.0%}" if whole else ""
        axes.text(amount, at, part, ha="left", va="center", fontsize=8)
    axes.set_ylim(N - 0.5, -0.5)
    axes.set_xlabel("tokens")
    axes.grid(axis="x")
    name_rows(axes, sources, 0.26)
    plain_numbers(axes.xaxis)
    shown = min(len(names), 6)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[:shown], labels[:shown], loc="upper left", ncols=6, borderaxespad=0.1)
    return figure


@themed
def costs(
    theme: Theme,
    plans: Sequence[str],
    domains: Sequence[str],
    tables: Mapping[str, Tensor],  # what was measured -> [plans, domains]
) -> Figure:
    """What plans cost on held-out text, a panel per measure."""
    P = len(plans)
    left = 0.3 + LETTER * max(map(len, plans))
    gap = 0.35
    panel = (WIDTH - left - 0.2 - gap * (len(tables) - 1)) / len(tables)
    height = 0.3 * P + 0.95
    figure = Figure(figsize=(WIDTH, height))
    for number_of, (what, table) in enumerate(tables.items()):
        axes = figure.add_axes(
            (
                (left + number_of * (panel + gap)) / WIDTH,
                0.5 / height,
                panel / WIDTH,
                (0.3 * P) / height,
            )
        )
        for at, domain in enumerate(domains):
            shift = (at - (len(domains) - 1) / 2) * min(0.16, 0.7 / len(domains))
            axes.plot(
                table[:, at].tolist(),
                np.arange(P) + shift,
                linestyle="none",
                marker=MARKERS[at % len(MARKERS)],
                markersize=5.5,
                color=theme.series[at % len(theme.series)],
                label=entry(domain) if not number_of else None,
            )
        axes.set_ylim(P - 0.5, -0.5)
        axes.set_xlabel(what)
        low, high = axes.get_xlim()
        if low < high / 2:  # near enough to zero for lengths to be compared
            axes.set_xlim(min(low, -0.02 * high), high)
            axes.axvline(0, color=theme.muted, linewidth=0.6)
        axes.grid(axis="x")
        name_rows(axes, plans if not number_of else [""] * P, 0.3)
        plain_numbers(axes.xaxis)
    figure.legend(loc="upper left", ncols=6, borderaxespad=0.1)
    return figure
