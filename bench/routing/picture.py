"""The picture of a replay as SVG: regret over time, and traffic around the outage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from bench.routing.data import Recorded
from bench.routing.report import Results

WIDTH, HEIGHT = 900, 720
LEFT, RIGHT = 60, 170
PANEL, TOP, GAP = 270, 50, 90
POINTS = 150
COLOURS = ("#0b6e4f", "#c8553d", "#3d5a98", "#e0a030", "#7b4b94", "#4c9aa8", "#8a8a8a", "#222222")
AROUND = 500
BLOCK = 50


def svg(data: Recorded, found: Results) -> str:
    """Two panels, one above the other; means over the seeds."""
    title = "<title>Regret over time, and traffic per model around an outage</title>"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
            f' font-family="sans-serif" font-size="12">{title}',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            *regret(found),
            *traffic(data, found),
            "</svg>\n",
        ]
    )


def regret(found: Results) -> Iterator[str]:
    """What each policy lost to the oracle, summed up over the requests."""
    names = [policy for policy, scenario in found if scenario == "errors" and policy != "oracle"]
    curves = [
        np.mean([np.cumsum(r.ideal - r.utility) for r in found[name, "errors"]], axis=0)
        for name in names
    ]
    # The worst policies would press all others to the bottom.
    top = float(np.sort([curve[-1] for curve in curves])[len(curves) // 2]) * 1.3
    count = len(curves[0])
    first = found["learning", "errors"][0]
    yield from frame(TOP, "Utility lost to the per-task oracle, summed", count, 0, top)
    yield outage(TOP, first.first_hurt / count, first.outage_requests / count)
    places = np.linspace(0, count - 1, POINTS).astype(int)
    ends = []
    for name, curve, colour in zip(names, curves, COLOURS, strict=False):
        inside = places[curve[places] <= top]
        yield line(
            inside / count, curve[inside] / top, TOP, colour, 2.5 if name == "learning" else 1.3
        )
        ends.append((min(float(curve[-1]) / top, 1.0), f"{name} {curve[-1]:.0f}", colour))
    yield from labels(ends, TOP)


def traffic(data: Recorded, found: Results) -> Iterator[str]:
    """Each model's share of the requests from before the outage to after it."""
    results = found["learning", "errors"]
    first, length = results[0].first_hurt, results[0].outage_requests
    begin = max(0, first - AROUND)
    end = min(len(results[0].chosen), first + length + AROUND)
    block = max(1, min(BLOCK, (end - begin) // 10))
    starts = np.arange(begin, end - block + 1, block)
    # By place of merit: which model is the best one may differ from seed to seed.
    shares = np.array(
        [
            [np.mean([(r.chosen[s : s + block] == m).mean() for r in results]) for s in starts]
            for m in range(len(data.models))
        ]
    )
    top = TOP + PANEL + GAP
    yield from frame(top, "Share of the requests per model around the outage", end, begin, 1)
    yield outage(top, (first - begin) / (end - begin), length / (end - begin))
    ends = []
    for place, model in enumerate(np.argsort(-shares.mean(axis=1))[: len(COLOURS)]):
        across = (starts + block / 2 - begin) / (end - begin)
        yield line(across, shares[model], top, COLOURS[place], 2.5 if not place else 1.3)
        ends.append((float(shares[model, -1]), data.models[model][:24], COLOURS[place]))
    yield from labels(ends, top)


def frame(top: int, title: str, end: int, begin: int, highest: float) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, top + PANEL
    yield f'<text x="{LEFT}" y="{top - 14}" font-size="14">{escape(title)}</text>'
    yield f'<path d="M{LEFT} {top}V{bottom}H{right}" fill="none" stroke="#666"/>'
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = LEFT + part * (right - LEFT), bottom - part * PANEL
        value = f"{part * highest:.0%}" if highest == 1 else f"{part * highest:.0f}"
        yield f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{value}</text>'
        request = f"{begin + part * (end - begin):,.0f}"
        yield f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{request}</text>'
    yield f'<text x="{right}" y="{bottom + 34}" text-anchor="end" fill="#555">requests</text>'


def outage(top: int, start: float, length: float) -> str:
    width = WIDTH - LEFT - RIGHT
    return (
        f'<rect x="{LEFT + start * width:.1f}" y="{top}" width="{length * width:.1f}"'
        f' height="{PANEL}" fill="#c8553d" opacity="0.12"/>'
    )


def line(
    x: NDArray[np.float64], y: NDArray[np.float64], top: int, colour: str, width: float
) -> str:
    points = " ".join(
        f"{LEFT + a * (WIDTH - LEFT - RIGHT):.1f},{top + PANEL * (1 - b):.1f}"
        for a, b in zip(x, y, strict=True)
    )
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def labels(ends: Sequence[tuple[float, str, str]], top: int) -> Iterator[str]:
    """The names at the right, where their lines end, moved apart where they would overlap."""
    floor = top + PANEL + 12.0
    for height, name, colour in sorted(ends):
        floor = min(floor - 14, top + PANEL * (1 - height) + 4)
        yield f'<text x="{WIDTH - RIGHT + 8}" y="{floor:.0f}" fill="{colour}">{escape(name)}</text>'
