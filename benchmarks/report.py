# SPDX-License-Identifier: MIT OR Apache-2.0
"""What `compare` found, as JSON, as tables for the terminal and for the docs, and as a plot.

Pure: results in, text out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Self

__all__ = [
    "BEGIN",
    "END",
    "ENGINE",
    "OWN",
    "Comparison",
    "Ratio",
    "Sample",
    "WorkloadResult",
    "replace_section",
    "section",
    "summary",
    "svg",
    "table",
]

OWN = "embedding-server"
ENGINE = "engine"
"""The samples of the backend alone stand under this name."""

BEGIN = "<!-- compare: begin -->"
END = "<!-- compare: end -->"

TITLES: Mapping[str, str] = {
    OWN: "embedding-server",
    "infinity-onnx": "infinity, ONNX",
    "infinity-torch": "infinity, torch",
    "plain": "plain",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: of one server, with one workload, in one round."""

    requests: int
    seconds: float
    cpu_seconds: float
    """The server's."""
    p50_ms: float | None = None
    p99_ms: float | None = None
    load_cpu_seconds: float | None = None
    """The generator's."""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the rounds' ratios, and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, one: Sequence[Sample], other: Sequence[Sample]) -> Self:
        """``one`` over ``other``, round by round."""
        ratios = [a.rate / b.rate for a, b in zip(one, other, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True, slots=True)
class WorkloadResult:
    """One workload's samples, a list of rounds for each server and for the engine."""

    name: str
    help: str
    connections: int
    seconds: float
    samples: Mapping[str, Sequence[Sample]]
    memory_mib: Mapping[str, float]
    """Peak resident memory of each server, from its start to the end of this workload."""

    def rate(self, name: str) -> float:
        """The median of the rounds, in requests a second."""
        return statistics.median(sample.rate for sample in self.samples[name])

    def ratio(self, name: str) -> Ratio:
        """This server over ``name``."""
        return Ratio.of(self.samples[OWN], self.samples[name])

    def cpu_ms(self, name: str) -> float:
        """Processor time of a request in milliseconds, the median of the rounds."""
        return statistics.median(
            1000 * sample.cpu_seconds / sample.requests for sample in self.samples[name]
        )

    @property
    def rounds(self) -> int:
        return len(next(iter(self.samples.values())))

    @property
    def servers(self) -> list[str]:
        return [name for name in self.samples if name != ENGINE]

    @property
    def compared(self) -> list[str]:
        """Everything that this server has a ratio to; none if it wasn't measured itself."""
        return [name for name in self.samples if name != OWN] if OWN in self.samples else []


@dataclass(frozen=True, slots=True)
class Comparison:
    """One or more workloads, measured on one machine."""

    date: str
    machine: str
    versions: Mapping[str, str]
    commands: Sequence[str]
    tested: Sequence[WorkloadResult]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``."""
        tested = [
            WorkloadResult(
                **{
                    **row,
                    "samples": {
                        name: [Sample(**sample) for sample in samples]
                        for name, samples in row["samples"].items()
                    },
                }
            )
            for row in value["tested"]
        ]
        return cls(**{**value, "tested": tested})

    @classmethod
    def merged(cls, parts: Sequence[Comparison]) -> Comparison:
        """Workloads of several runs; of one that was run twice the last counts.

        Raises ValueError if they are of different machines or versions, as then they would not
        be one comparison.
        """
        last = parts[-1]
        for part in parts:
            if (part.machine, part.versions) != (last.machine, last.versions):
                raise ValueError("These results are of different machines or versions.")
        return cls(
            date=last.date,
            machine=last.machine,
            versions=last.versions,
            commands=list(dict.fromkeys(command for part in parts for command in part.commands)),
            tested=list({row.name: row for part in parts for row in part.tested}.values()),
        )


def summary(comparison: Comparison) -> dict[str, Any]:
    """Medians and ratios by workload, for the line of JSON."""
    return {
        row.name: {
            "requests_per_second": {name: round(row.rate(name), 3) for name in row.samples},
            "ratio_to": {name: asdict(row.ratio(name)) for name in row.compared},
            "cpu_ms_per_request": {name: round(row.cpu_ms(name), 3) for name in row.samples},
            "peak_memory_mib": dict(row.memory_mib),
        }
        for row in comparison.tested
    }


def table(comparison: Comparison) -> str:
    """For the terminal: a row for each workload and server."""
    heading = ("workload", "server", "req/s", "this/that", "p50 ms", "p99 ms", "CPU ms", "MiB")
    rows = [heading]
    for tested in comparison.tested:
        for name in tested.samples:
            ratio = _range(tested.ratio(name)) if name in tested.compared else ""
            memory = tested.memory_mib.get(name)
            rows.append(
                (
                    tested.name,
                    name,
                    _number(tested.rate(name)),
                    ratio,
                    _latency(tested.samples[name], "p50_ms"),
                    _latency(tested.samples[name], "p99_ms"),
                    _number(tested.cpu_ms(name)),
                    "" if memory is None else f"{memory:.0f}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row[2:], widths[2:], strict=True)
        left = f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}"
        lines.append("  ".join([left, *(f"{cell:>{width}}" for cell, width in cells)]))
    return "\n".join(line.rstrip() for line in lines)


def section(comparison: Comparison) -> str:
    """The generated part of docs/performance.md."""
    rows = comparison.tested
    peers = [name for name in TITLES if name != OWN and any(name in row.samples for row in rows)]
    rates = [("workload", "connections", *(TITLES[n] for n in (OWN, *peers)), "engine alone")]
    ratios = [("workload", *(f"to {TITLES[n]}" for n in peers), "share of the engine alone")]
    cost = [("workload", *(TITLES[n] for n in (OWN, *peers)))]
    for row in rows:
        names = (OWN, *peers)
        rates.append(
            (
                f"`{row.name}`: {row.help}",
                str(row.connections),
                *(_number(row.rate(n)) if n in row.samples else "" for n in (*names, ENGINE)),
            )
        )
        ratios.append(
            (
                f"`{row.name}`",
                *(f"{_range(row.ratio(n))}" if n in row.compared else "" for n in peers),
                _share(row.ratio(ENGINE)) if ENGINE in row.compared else "",
            )
        )
        cost.append(
            (
                f"`{row.name}`",
                *(
                    f"{_number(row.cpu_ms(n))} ms, {row.memory_mib[n]:.0f} MiB"
                    if n in row.samples
                    else ""
                    for n in names
                ),
            )
        )
    return "\n\n".join(
        (
            "![Requests a second of each server, as a share of what the engine alone does]"
            "(performance.svg)",
            "Requests a second, the median of the rounds:",
            _markdown(rates),
            "This server's rate over each peer's, and over the engine's alone: the median of the "
            "rounds' ratios and their range.",
            _markdown(ratios),
            "Processor time of a request, and peak resident memory since the start:",
            _markdown(cost),
            *_how(comparison),
        )
    )


def _how(comparison: Comparison) -> Iterator[str]:
    rounds = " and ".join(sorted({f"{row.rounds}" for row in comparison.tested}))
    seconds = " and ".join(sorted({f"{row.seconds:g}" for row in comparison.tested}))
    yield (
        f"Each workload in one run: in each of {rounds} rounds every server was measured for "
        f"{seconds} s "
        "and until its last answer, the others stopped meanwhile. `engine alone` is the backend "
        "without HTTP, tokenizer or queue, in the same rounds, on the texts of as many requests "
        "as there are connections, sorted by length into full batches. Every server's vectors "
        "were compared with sentence-transformers' before, and all of its answers had the status "
        "200. `plain` is [benchmarks/peers/plain.py](../benchmarks/peers/plain.py): "
        "sentence-transformers, FastAPI, hypercorn."
    )
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    yield f"{comparison.date}, {comparison.machine}. {versions}."
    commands = "\n".join(f"$ {command}" for command in comparison.commands)
    yield f"```console\n{commands}\n```"


def replace_section(page: str, content: str) -> str:
    """``page`` with ``content`` between its two markers; raises ValueError if it lacks them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The page lacks the lines {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


# -------------------------------------------------------------------------------------------- plot

_WIDTH = 760
_LEFT = 150
_RIGHT = 130
_BAR = 18
_GAP = 5
_HEAD = 34
_LABEL = 50

_STYLE = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.small { font-size: 12px; fill: #59636e }
.head { font-weight: 600 }
.own { fill: #0969da }
.on-own { fill: #ffffff }
.on-peer { fill: #1f2328 }
.peer { fill: #afb8c1 }
.line { stroke: #59636e; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .own { fill: #1f6feb }
  .on-own, .on-peer { fill: #ffffff }
  .peer { fill: #656c76 }
  .line { stroke: #9198a1 }
}"""  # noqa: E501


def svg(comparison: Comparison) -> str:
    """Bars of requests a second, each workload scaled to what the engine alone does."""
    room = _WIDTH - _LEFT - _RIGHT
    parts: list[str] = []
    y = 10
    for row in comparison.tested:
        names = [name for name in TITLES if name in row.samples]
        scale = room / max(row.rate(name) for name in row.samples)
        limit = row.rate(ENGINE) * scale if ENGINE in row.samples else 0.0
        heading = f'<tspan class="head">{escape(row.name)}</tspan>'
        about = f'<tspan class="small" dx="8">{escape(_about(row))}</tspan>'
        parts.append(f'<text x="{_LEFT}" y="{y + 16}">{heading}{about}</text>')
        y += _HEAD - 8
        top = y
        for name in names:
            width = max(1.0, row.rate(name) * scale)
            style = "own" if name == OWN else "peer"
            middle = y + _BAR - 5
            parts += [
                f'<text x="{_LEFT - 10}" y="{middle}" text-anchor="end">{TITLES[name]}</text>',
                f'<rect class="{style}" x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" '
                'rx="2"/>',
                _bar_label(row.rate(name), width, limit, style, middle),
            ]
            y += _BAR + _GAP
        if ENGINE in row.samples:
            x = _LEFT + limit
            parts += [
                f'<line class="line" x1="{x:.1f}" y1="{top - 3}" x2="{x:.1f}" y2="{y - 2}"/>',
                f'<text class="small" x="{x + 8:.1f}" y="{y - _GAP - 5}">engine alone '
                f"{_number(row.rate(ENGINE))}</text>",
            ]
        y += 14
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" '
        f'height="{y}" role="img" aria-label="Requests a second">\n'
        f"<style>\n{_STYLE}\n</style>\n{body}\n</svg>\n"
    )


def _bar_label(rate: float, width: float, limit: float, style: str, y: int) -> str:
    """The number behind its bar, or in it where it would run into the line at ``limit``."""
    if width < limit < width + _LABEL:
        return (
            f'<text class="on-{style}" x="{_LEFT + width - 8:.1f}" y="{y}" text-anchor="end">'
            f"{_number(rate)}</text>"
        )
    return f'<text x="{_LEFT + width + 8:.1f}" y="{y}">{_number(rate)}</text>'


def _about(row: WorkloadResult) -> str:
    return f"{row.help}, {row.connections} connections: requests a second"


# ----------------------------------------------------------------------------------------- numbers


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _range(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _share(ratio: Ratio) -> str:
    return f"{ratio.median:.0%} ({ratio.low:.0%}-{ratio.high:.0%})"


def _latency(samples: Sequence[Sample], key: str) -> str:
    values = [value for sample in samples if (value := getattr(sample, key)) is not None]
    return _number(statistics.median(values)) if values else ""


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
