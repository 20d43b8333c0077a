"""Charts as SVG, and the page that they are on: one file without network or libraries. Shared by all reports."""

from html import escape

import numpy as np

COLOURS = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
WIDTH, HEIGHT, LEFT, BOTTOM, GAP = 480, 320, 50, 40, 12  # of a chart, in its own units: 360 pixels of a phone keep the text readable
TITLE = 20  # room for the name of the upright axis

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 86rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } .wide img { max-width: none; display: block; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
.words td { white-space: normal; text-align: left; min-width: 5rem; } .words th { text-align: left; } .words .long { min-width: 18rem; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; } th[aria-sort=descending] button::after { content: " \\25BC"; }
tbody tr:hover { background: var(--soft); } code { overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0 0 1rem; max-width: 42rem; } figcaption { font-size: .9rem; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font-size: 13px; }
.legend span { display: inline-block; margin-right: 1rem; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; border-radius: 2px; }
"""


SORT = """
for (const head of document.querySelectorAll("table.sort th")) head.firstChild.addEventListener("click", () => {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
  const value = row => row.cells[column].textContent, empty = text => text === "-";
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  body.append(...[...body.rows].sort((x, y) => {
    const a = value(x), b = value(y);
    return empty(a) || empty(b) ? empty(a) - empty(b) : down * order(a, b);
  }));
});
"""


def document(title: str, parts: list[str], script: str = "") -> str:
    """A page as one html file; `parts` are its elements, `script` what it needs besides the sorting of tables."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n' + "\n".join(parts)
        + f"\n<script>{SORT}{script}</script></body></html>\n"
    )  # fmt: skip


def html_table(head: list[str], rows: list[list[str]], sort: bool = False) -> str:
    kind = " ".join(["sort"] * sort + ["words"] * any(len(value) > 40 for row in rows for value in row))
    cell = {True: '<td class="long">', False: "<td>"}
    cells = "".join(f"<tr>{''.join(f'{cell[len(value) > 40]}{escape(value)}</td>' for value in row)}</tr>" for row in rows)
    names = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table></div>'


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def legend(colours: dict[str, str]) -> str:
    """{name: colour} as a line of text."""
    names = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items())
    return f'<p class="legend">{names}</p>'


def text_width(text: str) -> float:
    """Room that a label needs: 0.64 em of 13 pixels per character, the width of a digit in the widest of the usual fonts."""
    return 8.3 * len(text)


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers within [low, high]."""
    step = 10 ** np.floor(np.log10(max(high - low, 1e-9)))
    step = next(step * factor for factor in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * factor) < 7)
    return [float(value) for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0]  # no -0


class Axes:
    """A frame with ticks; `x` and `y` turn values into places on it. The left edge is as wide as the labels there need."""

    def __init__(self, xs: list[float], ys: list[float], x_title: str, y_title: str):
        (self.x0, self.x1), (self.y0, self.y1) = (self.limits(values) for values in (xs, ys))
        heights = ticks(self.y0, self.y1)
        self.left = max(LEFT, TITLE + 6 + max((text_width(f"{value:g}") for value in heights), default=0))
        self.marks = []
        for value in self._apart(ticks(self.x0, self.x1)):
            place = min(self.x(value), WIDTH - text_width(f"{value:g}") / 2)  # the last one is not cut off
            self.marks.append(f'<line x1="{self.x(value):.1f}" x2="{self.x(value):.1f}" y1="{GAP}" y2="{HEIGHT - BOTTOM}" stroke="#8884"/>'
                              f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')  # fmt: skip
        for value in heights:
            self.marks.append(f'<line x1="{self.left:.1f}" x2="{WIDTH - GAP}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}" stroke="#8884"/>'
                              f'<text x="{self.left - 6:.1f}" y="{self.y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')  # fmt: skip
        middle = HEIGHT / 2 - 14
        self.marks.append(f'<text x="{(self.left + WIDTH) / 2:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>'
                          f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_title)}</text>')

    @staticmethod
    def limits(values: list[float]) -> tuple[float, float]:
        low, high = min(values, default=0.0), max(values, default=1.0)
        margin = 0.06 * (high - low) or max(0.5, 0.06 * abs(high))
        return low - margin, high + margin

    def _apart(self, values: list[float]) -> list[float]:
        """Every value, or every second, ... : as many as stand beside each other."""
        widest = max((text_width(f"{value:g}") for value in values), default=0) + 6
        every = 1
        while len(values) > 1 and every * (self.x(values[1]) - self.x(values[0])) < widest and every < len(values):
            every += 1
        return values[::every]

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - GAP - self.left)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - BOTTOM - GAP)

    def line(self, points: list[tuple[float, float]], colour: str, title: str, dots: bool = False) -> str:
        """Connected points, with a dot on each where `dots`; `title` shows under the pointer."""
        places = [(f"{self.x(x):.1f}", f"{self.y(y):.1f}") for x, y in points]
        marks = "".join(f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>' for x, y in places) if dots else ""
        return (f'<polyline points="{" ".join(f"{x},{y}" for x, y in places)}" fill="none" stroke="{colour}" stroke-opacity=".6" '
                f'stroke-width="1.5"><title>{escape(title)}</title></polyline>{marks}')  # fmt: skip

    def band(self, low: list[tuple[float, float]], high: list[tuple[float, float]], colour: str) -> str:
        """The area between two lines."""
        places = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in [*low, *reversed(high)])
        return f'<polygon points="{places}" fill="{colour}" fill-opacity=".18"/>'

    def svg(self, marks: list[str]) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join([*self.marks, *marks])}</svg>'
