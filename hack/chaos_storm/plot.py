"""A figure of several quantities over one, as SVG. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, PANEL_HEIGHT, GAP = 760, 130, 34
LEFT, RIGHT, TOP = 70, 20, 30
TICKS = 4
STYLE = "font-family: sans-serif; font-size: 12px"


class Panel(NamedTuple):
    """One quantity: its name with the unit, and a value per place on the common axis."""

    name: str
    values: Sequence[float]


def svg(title: str, axis: str, places: Sequence[float], panels: Sequence[Panel]) -> str:
    """The figure: the panels below each other, each from zero to a little above its largest value."""
    height = TOP + len(panels) * (PANEL_HEIGHT + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" style="{STYLE}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, places, TOP + GAP / 2 + number * (PANEL_HEIGHT + GAP))
    bottom = TOP + GAP / 2 + len(panels) * (PANEL_HEIGHT + GAP)
    most = max(places)
    for tick in range(TICKS + 1):
        x = LEFT + (WIDTH - LEFT - RIGHT) * tick / TICKS
        parts.append(f'<text x="{x:.0f}" y="{bottom:.0f}" text-anchor="middle">{most * tick / TICKS:,.0f}</text>')
    parts.append(f'<text x="{WIDTH / 2:.0f}" y="{bottom + 16:.0f}" text-anchor="middle">{escape(axis)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, places: Sequence[float], top: float) -> list[str]:
    most = max(max(panel.values) * 1.15, 1.0)
    width = WIDTH - LEFT - RIGHT
    points = " ".join(
        f"{LEFT + width * place / max(places):.1f},{top + PANEL_HEIGHT * (1 - value / most):.1f}"
        for place, value in zip(places, panel.values, strict=True)
    )
    parts = [f'<text x="{LEFT}" y="{top - 4:.0f}">{escape(panel.name)}</text>']
    for tick in range(3):
        y = top + PANEL_HEIGHT * (1 - tick / 2)
        parts.append(f'<line x1="{LEFT}" y1="{y:.0f}" x2="{WIDTH - RIGHT}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{most * tick / 2:,.0f}</text>')
    parts.append(f'<polyline points="{points}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>')
    return parts
