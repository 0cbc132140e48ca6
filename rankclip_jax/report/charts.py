"""Drawings as inline SVG, in the page's own colours (CSS variables), so that they follow its light or dark theme."""

import base64
import html
import io
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 216, 46, 16, 10, 26
_MOST_POINTS = 400  # a line of more is thinned evenly; the last point stays


def line_chart(title: str, series: list[dict], percent: bool = False) -> str:
    """A figure of lines over training steps.

    Args:
      series: {"label", "colour" (a CSS colour), "points" [(x, y)], "dashed"}; those without points are left out.
      percent: values are shares, shown times 100.
    """
    series = [dict(s, points=_thin(s["points"])) for s in series if s["points"]]
    if not series:
        return ""
    factor = 100 if percent else 1
    xs = [x for s in series for x, _ in s["points"]]
    ys = [factor * y for s in series for _, y in s["points"]]
    x_ticks, y_ticks = _ticks(min(0, *xs), max(xs)), _ticks(min(ys), max(ys))
    to_x = _scale(min(0, *xs), max(*xs, 1), _LEFT, _WIDTH - _RIGHT)
    to_y = _scale(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x_ticks, y_ticks, to_x, to_y, "%" if percent else "")]
    for s in series:
        path = " ".join(f"{to_x(x):.1f},{to_y(factor * y):.1f}" for x, y in s["points"])
        dash = ' stroke-dasharray="5 4"' if s.get("dashed") else ""
        if len(s["points"]) == 1:
            x, y = s["points"][0]
            parts.append(f'<circle cx="{to_x(x):.1f}" cy="{to_y(factor * y):.1f}" r="3.5" fill="{s["colour"]}"/>')
        else:
            parts.append(f'<polyline points="{path}" fill="none" stroke="{s["colour"]}" stroke-width="2"{dash}/>')
    values = [
        {"label": s["label"], "colour": s["colour"], "points": [[x, round(factor * y, 6)] for x, y in s["points"]]}
        for s in series
    ]
    area = [to_x(0), to_x(1) - to_x(0)]
    data = html.escape(json.dumps({"series": values, "area": area, "unit": " %" if percent else ""}), quote=True)
    body = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" data-chart="{data}">{"".join(parts)}</svg>'
    return _figure(title, body)


def histogram(title: str, edges: np.ndarray, groups: list[tuple[str, str, np.ndarray]]) -> str:
    """Steps of shares per bin; each group (label, colour, counts) adds up to one of its own."""
    shares = [counts / max(counts.sum(), 1) for _, _, counts in groups]
    used = np.flatnonzero(np.sum(shares, axis=0))
    low, high = (max(used[0] - 1, 0), min(used[-1] + 2, len(edges) - 1)) if len(used) else (0, len(edges) - 1)
    y_ticks = _ticks(0, 100 * max(share.max() for share in shares))
    to_x = _scale(edges[low], edges[high], _LEFT, _WIDTH - _RIGHT)
    to_y = _scale(0, max(y_ticks[-1], 100 * max(share.max() for share in shares)), _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(_ticks(edges[low], edges[high]), y_ticks, to_x, to_y, "%")]
    for (label, colour, _), share in zip(groups, shares, strict=True):
        corners = [(edges[low], 0.0)]
        for i in range(low, high):
            corners += [(edges[i], 100 * share[i]), (edges[i + 1], 100 * share[i])]
        corners.append((edges[high], 0.0))
        points = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in corners)
        parts.append(
            f'<polygon points="{points}" fill="{colour}" fill-opacity="0.25" stroke="{colour}" stroke-width="1.5">'
            f"<title>{html.escape(label)}</title></polygon>"
        )
    body = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>'
    return _figure(title, _key([(label, colour) for label, colour, _ in groups]) + body)


def scatter(
    title: str,
    image_Nx2: np.ndarray,
    text_Nx2: np.ndarray,
    captions: Sequence[str],
    colours: tuple[str, str],
    most: int = 400,
) -> str:
    """Points of both modalities, a thin line from each image to its caption."""
    step = max(1, -(-len(image_Nx2) // most))
    images, texts, captions = image_Nx2[::step], text_Nx2[::step], captions[::step]
    both = np.concatenate([images, texts])
    # One scale on both axes: distances must mean the same in all directions.
    middle, half = (both.min(0) + both.max(0)) / 2, max(np.ptp(both, axis=0).max() / 2, 1e-9) * 1.05
    side = 380
    place = lambda point: (side / 2 * (1 + (point - middle) / half * [1, -1])).round(1)  # noqa: E731
    lines, dots = [], []
    for image, text, caption in zip(images, texts, captions, strict=True):
        (x1, y1), (x2, y2) = place(image), place(text)
        name = html.escape(str(caption))
        lines.append(f"M{x1} {y1}L{x2} {y2}")
        dots.append(f'<circle cx="{x1}" cy="{y1}" r="3" fill="{colours[0]}"><title>image: {name}</title></circle>')
        dots.append(f'<rect x="{x2 - 2.6}" y="{y2 - 2.6}" width="5.2" height="5.2" fill="{colours[1]}">'
                    f"<title>text: {name}</title></rect>")  # fmt: skip
    body = (
        f'<svg viewBox="0 0 {side} {side}"><path d="{"".join(lines)}" stroke="var(--faint)" stroke-width="0.6"/>'
        f'<g fill-opacity="0.75">{"".join(dots)}</g></svg>'
    )
    return _figure(title, _key([("images", colours[0]), ("texts", colours[1])]) + body)


def heatmap(confusion_CxC: np.ndarray) -> str:
    """Rows scaled to shares, one pixel a cell, as a PNG that the page enlarges without blurring."""
    shares = confusion_CxC / np.maximum(confusion_CxC.sum(axis=1, keepdims=True), 1)
    # White to the accent blue by the square root: a few per cent of confusion must be seen.
    depth = np.sqrt(shares)[..., None]
    pixels = np.round((1 - depth) * np.array([246, 248, 252]) + depth * np.array([16, 66, 160])).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img class="heat" alt="confusion matrix" src="data:image/png;base64,{data}">'


def _figure(title: str, body: str) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{body}</figure>"


def _key(entries) -> str:
    return '<div class="key">' + "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(label)}</span>' for label, colour in entries
    ) + "</div>"  # fmt: skip


def _grid(x_ticks, y_ticks, to_x, to_y, unit: str) -> str:
    parts = []
    for y in y_ticks:
        at = f"{to_y(y):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy="4" text-anchor="end">{_number(y)}{unit}</text>')
    for x in x_ticks:
        at = f"{to_x(x):.1f}"
        parts.append(f'<text x="{at}" y="{_HEIGHT - 8}" text-anchor="middle">{_number(x)}</text>')
    return "".join(parts)


def _scale(low, high, start, end):
    span = (high - low) or 1
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], `most` at most; around one value where they are equal."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-30):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / most
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first = np.ceil(low / step - 1e-9)
    return [float(step * i) + 0.0 for i in np.arange(first, np.floor(high / step + 1e-9) + 1)] or [low]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def _thin(points):
    if len(points) <= _MOST_POINTS:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, _MOST_POINTS).astype(int)]
