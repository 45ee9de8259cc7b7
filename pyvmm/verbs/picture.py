"""An update as a picture: lanes of spans over an axis in ms, SVG without anything from outside.

What a guest notices takes a hundredth of an update or less, so below the whole update those parts
are drawn again, each with an axis of its own.
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

from pyvmm.verbs.timeline import CARRIED, MAIN, MOVING, RUNNING, STOPPED, Lane, Span

_WIDTH, _LEFT, _RIGHT = 1000, 92, 20
_PLOT = _WIDTH - _LEFT - _RIGHT
_TOP = 66  # of the first panel: title and sum are above it
_LEAST = 1.5  # a span is never drawn narrower, that it be seen
_ROW = 24  # the height of a lane
_LABELLED = 14  # the least height of a lane that has words in it
_CHAR = 6.4  # of the labels, in the font that is asked for
#: Of vCPUs; distinguished by those who do not see all colours as well (Okabe and Ito's palette).
_STATES = {RUNNING: "#009e73", MOVING: "#f0a31c", CARRIED: "#56b4e9", STOPPED: "#d5410b"}
#: Of the main thread's steps, in their order.
_STEPS = "#8c96a8 #a6b3c7 #c8786e #b7a4d6 #7f97c9 #9dbbe0 #8fc1ae #d8b36a".split()
#: What is drawn again larger, if there is any.
_DETAILS = ((MOVING, "vCPUs move into the carrier"), (STOPPED, "vCPUs stand"))
_MARGIN = 0.3  # on each side of a detail, of its length
_STYLE = """\
text{font:12px system-ui,'DejaVu Sans',sans-serif;fill:#1d2330}
.h{font-size:16px;font-weight:600}.b{font-weight:600}.s{fill:#5a6475}.e{text-anchor:end}.m{text-anchor:middle}
.in{fill:#10131a;font-size:11px;pointer-events:none}
.bg{fill:#fff}.row{fill:#eef1f5}.g{stroke:#c9d0da}.z{fill:none;stroke:#1d2330}
@media(prefers-color-scheme:dark){text{fill:#e6e9ef}.s{fill:#a3adbd}.in{fill:#10131a}
.bg{fill:#14171d}.row{fill:#20252e}.g{stroke:#454d5b}.z{stroke:#e6e9ef}}"""


class _Window(NamedTuple):
    """The part of the time that a panel shows, in us."""

    begin: float
    end: float

    def x(self, at: float) -> float:
        """Return where a time is, in pixels; beyond the edges it is at the edge."""
        share = (min(max(at, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return _LEFT + share * _PLOT


def draw(title: str, lanes: list[Lane]) -> str:
    """Return the picture of an update."""
    ends = [span.end for lane in lanes for span in lane.spans]
    whole = _Window(0.0, max([*ends, 1.0]))
    colours = _colours(lanes)
    parts, height = _panel(lanes, whole, _TOP, colours, origin=0.0)
    top = _TOP + height
    for name, words in _DETAILS:
        spans = [span for lane in lanes for span in lane.spans if span.name == name]
        if not spans:
            continue
        begin, end = min(span.begin for span in spans), max(span.end for span in spans)
        margin = max((end - begin) * _MARGIN, 1.0)
        window = _Window(max(begin - margin, 0.0), min(end + margin, whole.end))
        y = top + 58
        left, right = whole.x(window.begin), max(whole.x(window.end), whole.x(window.begin) + 1)
        parts.append(
            f'<path class="z" d="M{left - 1:.1f} {_TOP - 3}H{right + 1:.1f}V{_TOP + height:.1f}'
            f'H{left - 1:.1f}Z"/>'
        )
        longest = max(span.length_ms for span in spans)
        parts.append(
            _text(_LEFT, y - 14, f"{words}: {_ms(longest)} ms at the longest", "b")
            + _text(_WIDTH - _RIGHT, y - 14, f"0 is at {_ms(begin / 1e3)} ms", "s e")
        )
        more, size = _panel(lanes, window, y, colours, origin=begin)
        parts += more
        top = y + size
    legend, bottom = _legend(lanes, colours, top + 52)
    parts += legend
    head = [
        f'<rect class="bg" width="{_WIDTH}" height="{bottom:.0f}"/>',
        _text(_LEFT, 28, title, "h"),
        _text(_LEFT, 48, f"{_ms(whole.end / 1e3)} ms; times in ms since it began", "s"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom:.0f}" '
            f'width="{_WIDTH}" height="{bottom:.0f}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            *head,
            *parts,
            "</svg>\n",
        ]
    )


def _colours(lanes: list[Lane]) -> dict[tuple[bool, str], str]:
    # By whether it is a step of the main thread, and name.
    found: dict[tuple[bool, str], str] = {}
    for lane in lanes:
        is_main = lane.name == MAIN
        for span in lane.spans:
            of_kind = sum(key[0] is is_main for key in found)
            step = _STEPS[of_kind % len(_STEPS)]
            colour = step if is_main else _STATES.get(span.name, step)
            found.setdefault((is_main, span.name), colour)
    return found


def _panel(
    lanes: list[Lane],
    window: _Window,
    top: float,
    colours: dict[tuple[bool, str], str],
    origin: float,
) -> tuple[list[str], float]:
    """Return one set of lanes over its axis, and how high the lanes are.

    :param origin: the time that the axis calls 0
    """
    of_vcpu = _ROW if len(lanes) <= 9 else _LABELLED if len(lanes) <= 33 else 7
    gap = 3 if of_vcpu >= _LABELLED else 1
    every = 1 if of_vcpu >= _LABELLED else 8
    y = top
    rows: list[str] = []
    bars: list[str] = []
    labels: list[str] = []
    for number, lane in enumerate(lanes):
        row = of_vcpu if number else _ROW
        rows.append(f'<rect class="row" x="{_LEFT}" y="{y}" width="{_PLOT}" height="{row}"/>')
        if number == 0 or (number - 1) % every == 0:
            rows.append(_text(_LEFT - 8, y + row / 2 + 4, lane.name, "e"))
        # The shortest last: they are seen where others begin.
        for span in sorted(lane.spans, key=lambda span: span.begin - span.end):
            if span.end >= window.begin and span.begin <= window.end:
                bars.append(_bar(span, window, y, row, colours[lane.name == MAIN, span.name]))
                labels += _label(span, window, y, row)
        y += row + gap
    axis = _axis(window, y, y - top, origin)
    return [*rows, *bars, *axis, *labels], y - top


def _bar(span: Span, window: _Window, y: float, height: float, colour: str) -> str:
    x, right = window.x(span.begin), window.x(span.end)
    told = f"{span.name}, {_ms(span.length_ms)} ms, from {_ms(span.begin / 1e3)} ms on"
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{max(right - x, _LEAST):.1f}" height="{height}" '
        f'fill="{colour}"><title>{escape(told)}</title></rect>'
    )


def _label(span: Span, window: _Window, y: float, height: float) -> list[str]:
    # As much as there is room for.
    x, right = window.x(span.begin), window.x(span.end)
    for words in (f"{span.name} {_ms(span.length_ms)}", span.name):
        if height >= _LABELLED and len(words) * _CHAR < right - x - 6:
            return [_text((x + right) / 2, y + height / 2 + 4, words, "in m")]
    return []


def _axis(window: _Window, y: float, height: float, origin: float) -> list[str]:
    step = _step((window.end - window.begin) / 1e3)
    decimals = max(0, -_exponent(step))
    first = -int(-((window.begin - origin) / 1e3) // step)
    parts = []
    while origin + first * step * 1e3 <= window.end:
        x = window.x(origin + first * step * 1e3)
        parts.append(
            f'<path class="g" d="M{x:.1f} {y - height:.1f}V{y + 5:.1f}" stroke-opacity=".5"/>'
        )
        parts.append(_text(x, y + 19, f"{first * step:.{decimals}f}", "m"))
        first += 1
    parts.append(_text(_LEFT - 28, y + 19, "ms", "e s"))
    return parts


def _legend(
    lanes: list[Lane], colours: dict[tuple[bool, str], str], top: float
) -> tuple[list[str], float]:
    """Return what each colour means, the steps with their lengths, and where that ends."""
    steps = {span.name: f"{_ms(span.length_ms)} ms" for span in lanes[0].spans}
    states = dict.fromkeys(name for is_main, name in colours if not is_main)
    entries = (
        [("vCPUs", "", "")]
        + [(name, "", colours[False, name]) for name in states]
        + [("main", "", "")]
        + [(name, length, colours[True, name]) for name, length in steps.items()]
    )
    parts = []
    x, y = 0.0, top
    for name, length, colour in entries:
        words = f"{name} {length}".strip()
        width = len(words) * _CHAR + 40
        if not colour and x:
            x, y = 0.0, y + 24
        if _LEFT + x + width > _WIDTH - _RIGHT:
            x, y = 0.0, y + 20
        if colour:
            at = f'x="{_LEFT + x:.1f}" y="{y - 10:.1f}"'
            parts.append(f'<rect {at} width="12" height="12" rx="2" fill="{colour}"/>')
            parts.append(_text(_LEFT + x + 18, y, words))
            x += width
        else:
            parts.append(_text(_LEFT - 8, y, name, "e s"))
    return parts, y + 22


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named}>{escape(words)}</text>'


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _step(length: float) -> float:
    """Return the distance of an axis's ticks: 1, 2 or 5 times a power of ten, some eight of them
    in ``length``."""
    exponent = _exponent(length / 8)
    for factor in (1, 2, 5):
        if factor * 10.0**exponent * 8 >= length:
            return factor * 10.0**exponent
    return 10.0 ** (exponent + 1)


def _exponent(value: float) -> int:
    # Of the power of ten at or below it.
    exponent = 0
    while 10.0**exponent > value * (1 + 1e-9):
        exponent -= 1
    while 10.0 ** (exponent + 1) <= value * (1 + 1e-9):
        exponent += 1
    return exponent
