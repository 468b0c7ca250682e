"""Tokens per second by streams and by context, as an SVG picture."""
from xml.sax.saxutils import escape

from tinychat.bench.decoding import DECODE_PROMPT, depth_key, streams_key

WIDTH, HEIGHT, GAP = 360, 240, 40        # of a panel, and between two
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 34, 44  # of a panel, round its axes
COLOURS = ("#1f6fb4", "#c8641e")         # ours, the rival's
STYLE = "text{font:12px sans-serif;fill:#333} .title{font-weight:bold} line{stroke:#ddd}"


def plot(result: dict) -> str:
    """The picture of bench.run's result: a panel for each of the two that has points."""
    names = {"tinychat": result}
    if rival := result.get("llama.cpp"):
        names[rival["version"]] = rival
    first = ("decode_tokens_per_second", 1), ("decode_tokens_per_second", DECODE_PROMPT)
    panels = [
        (title, unit, {name: _points(found, [start, *((key(n), n) for n in numbers)])
                       for name, found in names.items()})
        for title, unit, start, key, numbers in (
            ("decoding together", "streams", first[0], streams_key, result["streams"]),
            ("decoding one", "tokens of context", first[1], depth_key, result["depths"]))]
    width = len(panels) * WIDTH + GAP
    body = "".join(f'<g transform="translate({i * (WIDTH + GAP)} 0)">{_panel(*panel)}</g>'
                   for i, panel in enumerate(panels))
    heading = f"{result['model']} {result['quantization']}, {result['machine']}, " \
              f"{result['threads']} threads"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 24}" '
            f'width="{width}" height="{HEIGHT + 24}"><style>{STYLE}</style>'
            f'<rect width="100%" height="100%" fill="white"/>{body}'
            f'<text x="{LEFT}" y="{HEIGHT + 14}">{escape(heading)}</text></svg>\n')


def _points(found: dict, places: list[tuple[str, int]]) -> list[tuple[int, float]]:
    return [(x, found[key]) for key, x in sorted(places, key=lambda place: place[1])
            if key in found]


def _panel(title: str, unit: str, lines: dict[str, list[tuple[int, float]]]) -> str:
    points = [point for line in lines.values() for point in line]
    x_high, y_high = max(x for x, _ in points), _round_up(max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return (round(LEFT + x / x_high * (WIDTH - LEFT - RIGHT), 1),
                round(HEIGHT - BOTTOM - y / y_high * (HEIGHT - TOP - BOTTOM), 1))

    out = [f'<text class="title" x="{LEFT}" y="16">tokens per second, {title}</text>']
    for i in range(5):
        x, y = place(0, y_high * i / 4)
        out.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>'
                   f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{y_high * i / 4:g}</text>')
    for number in _apart(sorted({x for x, _ in points}), x_high):
        x, y = place(number, 0)
        out.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{number}</text>')
    out.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{unit}'
               '</text>')
    for i, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in line))
        dots = "".join('<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*place(*p), COLOURS[i])
                       for p in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[i]}" '
                   f'stroke-width="2"/>{dots}<text x="{WIDTH - RIGHT}" y="{TOP + 14 * i}" '
                   f'text-anchor="end" style="fill:{COLOURS[i]}">{escape(name)}</text>')
    return "".join(out)


def _apart(numbers: list[int], high: int) -> list[int]:
    """Those that can be written below an axis that ends at `high` without touching."""
    out: list[int] = []
    for number in reversed(numbers):
        if not out or (out[-1] - number) / high > 0.1:
            out.append(number)
    return out


def _round_up(value: float) -> float:
    """To a number of which quarters are easily read."""
    unit = 1.0
    while unit * 10 <= value:
        unit *= 10
    while unit > value:
        unit /= 10
    return next(unit * step for step in (1, 2, 4, 8, 10, 20) if unit * step >= value)
