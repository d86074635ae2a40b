"""`report.html`: one self-contained page per run, from nothing but the files in its directory.

Inline SVG, no script, nothing loaded from elsewhere; it can be mailed, archived and read in ten years. Any of the files may
be missing (a run in progress, or one that was killed), and samples are hostile text, so everything is escaped.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import os
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from experiments.goodput import goodput
from train.files import write_atomic
from train.metrics import read_jsonl

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
MAX_POINTS = 800
HOVER_POINTS = 120


def write_report(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `<run_dir>/report.html` and returns its path."""
    run = read_run(pathlib.Path(run_dir))
    path = pathlib.Path(run_dir) / "report.html"
    write_atomic(path, render(run).encode())
    return path


@dataclasses.dataclass(frozen=True)
class Run:
    """What is on disk of a run. Records of one step are merged; of a step that was repeated after a restart the last counts."""

    name: str
    metrics: dict[int, dict[str, Any]]
    timing: dict[int, dict[str, Any]]
    events: list[dict[str, Any]]
    goodput: dict[str, float]
    samples: list[dict[str, Any]]
    incidents: list[dict[str, Any]]
    config: dict[str, Any]
    result: dict[str, Any]
    provenance: dict[str, Any]
    manifest: dict[str, Any]


def read_run(run_dir: pathlib.Path) -> Run:
    def read_json(name: str) -> dict[str, Any]:
        path = run_dir / name
        return json.loads(path.read_text()) if path.exists() else {}

    def by_step(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        merged: dict[int, dict[str, Any]] = {}
        for record in records:
            merged.setdefault(record["step"], {}).update(record)
        return dict(sorted(merged.items()))

    timing = read_jsonl(run_dir / "timing.jsonl")
    config = read_json("config.json")
    return Run(
        name=str(config.get("name") or run_dir.resolve().name),
        metrics=by_step(read_jsonl(run_dir / "metrics.jsonl")),
        timing=by_step([record for record in timing if "step" in record]),
        events=[record for record in timing if "event" in record],
        goodput=goodput(timing),
        samples=read_jsonl(run_dir / "samples.jsonl"),
        incidents=read_jsonl(run_dir / "incidents.jsonl"),
        config=config,
        result=read_json("result.json"),
        provenance=read_json("provenance.json"),
        manifest=read_json("data_manifest.json"),
    )


# --- Numbers ----------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min((power * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs((high - low) / size - count))
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, denser the fewer decades there are."""
    decades = math.log10(high / low)
    if decades < 0.5:
        return [tick for tick in ticks(low, high) if tick > 0]
    factors = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    stride = max(1, round(decades / 6))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**power for power in powers if power % stride == 0 for factor in factors]
    return [value for value in values if low <= value <= high]


def short(value: float) -> str:
    """At most four digits with a unit: 0.0006, 12.5, 1.2k, 3.4M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def smooth(points: Points) -> Points:
    """Mean over a fiftieth of the run around each point, which unlike a moving average does not lag; less at the ends."""
    points = [point for point in points if math.isfinite(point[1])]
    sums = list(itertools.accumulate((y for _, y in points), initial=0.0))
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(len(points) // 100, i, len(points) - 1 - i)
        result.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return result


def running_median(points: Points, window: int = 15) -> Points:
    """Of the last `window` values: one step that waited for an evaluation, or one spike, leaves no trace."""
    return [(x, statistics.median(y for _, y in points[max(0, i - window + 1) : i + 1])) for i, (x, _) in enumerate(points)]


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most about `limit` points that look the same: of each stretch its lowest and its highest, and both ends."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


# --- Charts -----------------------------------------------------------------------------------------------------------


Style = Literal["raw", "main", "marked", "complete", "reference"]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart. `raw` is thin and pale, `main` strong, `marked` has a dot at each value, `complete` is a ring,
    `reference` is dashed."""

    name: str
    points: Points
    style: Style = "main"


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps values to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    from_zero: bool = False,
    show: Callable[[float], str] = short,
) -> str:
    """A figure, or "" if there is nothing to draw. `show` writes values of the vertical axis."""
    usable = lambda p: all(map(math.isfinite, p)) and (p[1] > 0 or not log)  # noqa: E731
    series = [dataclasses.replace(line, points=list(filter(usable, line.points))) for line in series]
    series = [line for line in series if line.points]
    if not any(line.style != "reference" for line in series):
        return ""
    x_axis, y_axis = axes(series, log, from_zero)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">']
    for tick in y_axis.ticks():
        y = f"{y_axis(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 8}" y="{y}" dy="0.34em">{text(show(tick))}</text>')
    for tick in x_axis.ticks():
        x = f"{x_axis(tick):.1f}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
        parts.append(f'<text class="tick x" x="{x}" y="{HEIGHT - BOTTOM + 17}">{text(short(tick))}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">{text(x_label)}</text>')
    for line in series:
        shown = [(x_axis(x), y_axis(y)) for x, y in thin(line.points)]
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in shown)
        parts.append(f'<polyline class="{line.style}" data-name="{text(line.name)}" points="{path}"/>')
        if line.style == "marked" or len(line.points) == 1:
            dots = "".join(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3"/>' for x, y in shown)
            parts.append(f'<g class="{line.style}">{dots}</g>')
    for line in series:
        if line.style in ("main", "marked", "complete"):
            every = math.ceil(len(line.points) / HOVER_POINTS)
            for x, y in line.points[::-1][::every]:
                hint = text(f"{line.name}: {show(y)} at {short(x)} {x_label}")
                parts.append(
                    f'<circle class="hover" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="7"><title>{hint}</title></circle>'
                )
    parts.append("</svg>")
    keys = "".join(f'<span class="key {line.style}"><i></i>{text(line.name)}</span>' for line in series)
    return f'<figure><figcaption><b>{text(title)}</b><span class="legend">{keys}</span></figcaption>{"".join(parts)}</figure>'


def axes(series: Sequence[Series], log: bool, from_zero: bool) -> tuple[Axis, Axis]:
    """Axes that hold every point, with a little air above and below."""
    x_high = max(x for line in series for x, _ in line.points)
    ys = [y for line in series for _, y in line.points]
    low, high = (min(0.0, *ys), max(0.0, *ys)) if from_zero else (min(ys), max(ys))
    if log:
        air = max((high / low) ** 0.04, 1.02)
        low, high = low / air, high * air
    else:
        air = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = (low if from_zero and low == 0 else low - air), high + air
    return Axis(0.0, x_high or 1.0, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def reward_charts(run: Run) -> str:
    """Of reinforcement learning: does it learn, and is what it learns from what it seems to be?"""

    def by_step(name: str) -> Points:
        return [(step, record[name]) for step, record in run.metrics.items() if name in record]

    def line(label: str, name: str, style: Style = "main") -> Series:
        return Series(label, by_step(name), style)

    passes = sorted({name for record in run.metrics.values() for name in record if name.startswith("eval/pass@")})
    phases = sorted({name for record in run.timing.values() for name in record if name.endswith("_seconds")} - {"step_seconds"})
    times = [Series(name[: -len("_seconds")], [(s, r[name]) for s, r in run.timing.items() if name in r]) for name in phases]
    drawn = [
        chart("Held-out prompts", "steps", [line(name[len("eval/") :], name, "marked") for name in passes], from_zero=True),
        chart("Reward", "steps", [line("mean", "reward/total")], from_zero=True),
        chart(
            "Length of answers",
            "steps",
            [line("right", "length_correct"), line("wrong", "length_wrong", "marked")],
            from_zero=True,
        ),
        chart("Entropy", "steps", [line("nats a token", "entropy")], from_zero=True),
        chart("KL from the reference", "steps", [line("nats an answer", "reference_kl")]),
        chart("KL of sampler and trainer", "steps", [line("nats a token", "mismatch_kl")]),
        chart(
            "Prompts without a signal, cut answers",
            "steps",
            [line("all rewards equal", "zero_variance_fraction"), line("truncated", "truncated_fraction", "marked")],
            from_zero=True,
        ),
        chart(
            "Clipped",
            "steps",
            [line("low", "clip_low_fraction"), line("high", "clip_high_fraction", "marked")],
            from_zero=True,
            show=percent,
        ),
        chart("Gradient norm", "steps", [line("each step", "grad_norm")], log=True),
        chart("Learning rate", "steps", [line("learning rate", "learning_rate")], from_zero=True),
        chart("Seconds of a step", "steps", times, from_zero=True),
    ]
    return "".join(drawn)


def charts(run: Run) -> str:
    if any("eval/length" in record for record in run.metrics.values()):
        return reward_charts(run)
    last = next(reversed(run.metrics.values()), {})
    tokens_per_step = last.get("tokens", 0) / last["step"] if last.get("step") else 0

    def against_tokens(records: dict[int, dict[str, Any]], name: str) -> Points:
        return [(step * tokens_per_step, record[name]) for step, record in records.items() if name in record]

    longest = max((record["seconds"] for record in run.timing.values()), default=0.0)
    unit, unit_seconds = ("seconds", 1) if longest < 200 else ("minutes", 60) if longest < 3 * 3600 else ("hours", 3600)

    def against_time(name: str) -> Points:
        return [
            (run.timing[step]["seconds"] / unit_seconds, record[name])
            for step, record in run.metrics.items()
            if name in record and step in run.timing
        ]

    def complete(name: str, curve: Points, final: Points) -> list[Series]:
        """The evaluation of all held-out rows after the last step, where the curve is of some of them."""
        return [Series(name, final, "complete")] if final != curve[-1:] else []

    def losses(against: Callable[[str], Points]) -> list[Series]:
        train = against("loss")
        smoothed = [Series("training, smoothed", smooth(train))] if len(train) >= 20 else []
        return [
            Series("training", train, "raw" if smoothed else "main"),
            *smoothed,
            Series("held out", against("val_loss"), "marked"),
            *complete("all held-out text", against("val_loss"), against("final_val_loss")),
        ]

    def line(label: str, name: str, style: Style = "main") -> Series:
        points = against_tokens(run.metrics, name)
        return Series(label, smooth(points) if style == "main" else points, style)

    def chosen_and_rejected(name: str) -> list[Series]:
        return [line("chosen", f"{name}_chosen"), line("rejected", f"{name}_rejected", "marked")]

    told_right = [line("training, smoothed", "accuracy"), line("held out", "val_accuracy", "marked")]
    of_preferences = [
        chart("Preferences told right", "tokens", told_right, show=percent),
        chart("Rewards", "tokens", chosen_and_rejected("reward")),
        chart("Log-probabilities", "tokens", chosen_and_rejected("logprob")),
        chart("KL from the reference", "tokens", [line("nats an answer", "kl")], from_zero=True),
    ]

    def with_median(records: dict[int, dict[str, Any]], name: str) -> list[Series]:
        points = against_tokens(records, name)
        return [Series("each step", points, "raw"), Series("median of 15 steps", running_median(points))]

    bits, final_bits = (against_tokens(run.metrics, name) for name in ("bits_per_byte", "final_bits_per_byte"))
    baseline = run.result.get("baseline_xz_bits_per_byte")
    xz = [Series("xz -9e", [(0.0, baseline), (max(x for x, _ in bits), baseline)], "reference")] if bits and baseline else []
    drawn = [
        chart("Loss by tokens", "tokens", losses(lambda name: against_tokens(run.metrics, name)), log=True),
        chart("Loss by time", unit, losses(against_time), log=True),
        *(of_preferences if told_right[1].points else []),
        chart(
            "Bits per byte on held-out data",
            "tokens",
            [Series("model", bits, "marked"), *complete("model, all text", bits, final_bits), *xz],
        ),
        chart(
            "Learning rate", "tokens", [Series("learning rate", against_tokens(run.metrics, "learning_rate"))], from_zero=True
        ),
        chart("Gradient norm", "tokens", with_median(run.metrics, "grad_norm"), log=True),
        chart("Parameter norm", "tokens", [Series("parameter norm", against_tokens(run.metrics, "param_norm"))]),
        chart("Tokens per second", "tokens", with_median(run.timing, "tokens_per_second"), from_zero=True),
        chart("Model FLOPs utilisation", "tokens", with_median(run.timing, "mfu"), from_zero=True, show=percent),
    ]
    return "".join(drawn) or "<p>No step has been logged yet.</p>"


# --- The page ---------------------------------------------------------------------------------------------------------


def text(value: object) -> str:
    """Escaped for element content and attributes; characters that no document may hold become U+FFFD."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value)))


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested JSON object; lists of scalars stay whole."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(child, dict | list) for child in value):
        for index, child in enumerate(value):
            yield from leaves(child, f"{prefix}[{index}]")
    else:
        yield prefix, value


def table(value: Any, max_rows: int = 200) -> str:
    rows = list(leaves(value))
    cells = []
    for key, leaf in rows[:max_rows]:
        written = leaf if isinstance(leaf, str) else json.dumps(leaf)
        cells.append(f"<tr><th>{text(key)}</th><td>{text(written if len(written) <= 300 else written[:300] + ' …')}</td></tr>")
    more = f"<p>and {len(rows) - max_rows} more</p>" if len(rows) > max_rows else ""
    return f"<table>{''.join(cells)}</table>{more}"


def folded(title: str, content: str, is_open: bool = False) -> str:
    state = ' open="open"' if is_open else ""
    return f"<details{state}><summary>{text(title)}</summary>{content}</details>"


def header(run: Run) -> str:
    last = next(reversed(run.metrics.values()), {})
    done, wanted = last.get("step", 0), run.config.get("steps")
    finished = bool(run.result)
    state = "finished" if finished else "not finished"
    seconds = max((record["seconds"] for record in [*run.timing.values(), *run.events]), default=None)
    evaluations = [record for record in run.metrics.values() if "val_loss" in record or "eval/length" in record]
    numbers = {**(evaluations[-1] if evaluations else {}), **run.result}
    rates = [record["tokens_per_second"] for record in run.timing.values()]
    tiles: list[tuple[str, str, str]] = []
    if "bits_per_byte" in numbers:
        baseline = numbers.get("baseline_xz_bits_per_byte")
        tiles.append(
            ("bits per byte", f"{numbers['bits_per_byte']:.4f}", f"xz -9e: {baseline:.3f}" if baseline else "held out")
        )
    if "val_loss" in numbers:
        tiles.append(("held-out loss", f"{numbers['val_loss']:.4f}", "" if "val_accuracy" in numbers else "nats per token"))
    if "val_accuracy" in numbers:
        tiles.append(("held-out accuracy", f"{numbers['val_accuracy']:.3f}", "preferences told right"))
    if "eval/pass@1" in numbers:
        before = numbers.get("initial_eval/pass@1")
        tiles.append(("pass@1", f"{numbers['eval/pass@1']:.3f}", "held out" if before is None else f"{before:.3f} before"))
    elif "loss" in last and "eval/length" not in numbers:
        tiles.append(("training loss", f"{last['loss']:.4f}", "last step"))
    if numbers.get("eval/failed"):
        tiles.append(("not judged", short(numbers["eval/failed"]), "held-out answers"))
    if "tokens" in last:
        tiles.append(("tokens", short(last["tokens"]), f"{done:,} of {wanted:,} steps" if wanted else f"{done:,} steps"))
    if "parameters" in numbers:
        tiles.append(("parameters", short(numbers["parameters"]), ""))
    if rates:
        utilisations = [record["mfu"] for record in run.timing.values() if "mfu" in record]
        note = f"{percent(statistics.median(utilisations))} MFU" if utilisations else "drawn, of all time"
        tiles.append(("tokens per second", short(statistics.median(rates)), note))
    if seconds is not None:
        tiles.append(("time", duration(seconds), ""))
    shown = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd><small>{text(note)}</small></div>" for k, v, note in tiles)
    badge = f'<span class="badge {"done" if finished else "going"}">{state}</span>'
    return f"<header><h1>{text(run.name)} {badge}</h1><dl>{shown}</dl></header>"


def time_section(run: Run) -> str:
    """Where the seconds went, over all starts of the run."""
    total = sum(run.goodput.values())
    if not total:
        return ""
    parts = [(name, seconds) for name, seconds in run.goodput.items() if seconds > 0.001 * total]
    bar = "".join(
        f'<span class="part{i % 6}" style="flex-grow: {1000 * seconds / total:.1f}" title="{text(name)}"></span>'
        for i, (name, seconds) in enumerate(parts)
    )
    keys = "".join(
        f'<span class="key"><i class="part{i % 6}"></i>{text(name)} {duration(seconds)} ({percent(seconds / total)})</span>'
        for i, (name, seconds) in enumerate(parts)
    )
    return f'<section><h2>Time</h2><div class="bar">{bar}</div><p class="legend">{keys}</p></section>'


def samples_section(run: Run) -> str:
    steps = sorted({sample["step"] for sample in run.samples}, reverse=True)
    blocks = []
    for step in steps:
        texts = "".join(
            f'<pre><span class="prompt">{text(s["prompt"])}</span>{text(s["text"].removeprefix(s["prompt"]))}</pre>'
            for s in run.samples
            if s["step"] == step
        )
        blocks.append(folded(f"step {step:,}", texts, is_open=step == steps[0]))
    return f"<section><h2>Samples</h2>{''.join(blocks)}</section>" if blocks else ""


def incidents_section(run: Run) -> str:
    if not run.incidents:
        return ""

    def outcome(incident: dict[str, Any]) -> str:
        if incident.get("gave_up"):
            return "the run gave up"
        return f"data steps {text(incident['first_skipped'])} to {text(incident['last_skipped'])} were skipped"

    rows = "".join(f"<tr><th>step {text(i['step'])}</th><td>{text(i['reason'])}; {outcome(i)}</td></tr>" for i in run.incidents)
    return f'<section><h2>Incidents</h2><table class="incidents">{rows}</table></section>'


def render(run: Run) -> str:
    """The whole page; it is well-formed XML too."""
    details = "".join(
        folded(title, table(value))
        for title, value in (
            ("Result", run.result),
            ("Config", run.config),
            ("Environment", run.provenance),
            ("Data", run.manifest),
        )
        if value
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{text(run.name)}</title><style>{STYLE}</style></head><body><main>"
        f'{header(run)}<section class="charts">{charts(run)}</section>{incidents_section(run)}{samples_section(run)}'
        f"{time_section(run)}<section><h2>Details</h2>{details}</section></main></body></html>\n"
    )


STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #ffffff; --ink: #1f2328; --soft: #6b7076; --line: #e4e1dc;
  --one: #2f6f4f; --two: #c2571a; --three: #8a8f98; --bad: #b3261e;
  --p0: #2f6f4f; --p1: #c2571a; --p2: #3b6ea8; --p3: #b08900; --p4: #7a5ba6; --p5: #b9bcc2; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1b1f23; --ink: #e6e4e0; --soft: #9aa0a6;
  --line: #2e3338; --one: #6cc299; --two: #f0955a; --three: #7d848c; --bad: #ff8a80;
  --p0: #5fae88; --p1: #e08a52; --p2: #6f9fd8; --p3: #d2ae3f; --p4: #a98bd4; --p5: #565c63; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; font-weight: 650; letter-spacing: -0.01em; margin: 0 0 20px; }
h2 { font-size: 17px; font-weight: 650; margin: 0 0 12px; }
section { margin-top: 36px; }
.badge { font-size: 12px; font-weight: 500; letter-spacing: 0; padding: 3px 10px; border-radius: 99px; vertical-align: 5px;
  border: 1px solid currentColor; color: var(--one); }
.badge.going { color: var(--two); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 1px; margin: 0; overflow: hidden;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; }
dl div { background: var(--card); padding: 14px 16px; }
dt, small, .legend, .label, .tick { color: var(--soft); fill: var(--soft); }
dt { font-size: 12.5px; }
dd { margin: 2px 0 0; font-size: 22px; font-weight: 600; letter-spacing: -0.01em; }
small { font-size: 12px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 18px; }
figure { margin: 0; padding: 16px 16px 8px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 16px; margin-bottom: 8px;
  font-size: 14px; }
figcaption b { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; align-items: center; margin: 0; }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key i { width: 14px; height: 0; border-top: 2.5px solid var(--one); border-radius: 2px; }
.key.raw i { border-top-width: 1.5px; opacity: 0.6; }
.key.marked i { border-color: var(--two); }
.key.complete i { width: 8px; height: 8px; border: 2px solid var(--two); border-radius: 50%; }
.key.reference i { border-top: 2px dashed var(--three); }
svg { display: block; width: 100%; height: auto; font-size: 11.5px; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis, .mark { stroke: var(--three); stroke-width: 1; }
.tick.y { text-anchor: end; }
.tick.x, .label { text-anchor: middle; }
polyline { fill: none; stroke: var(--one); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
polyline.raw { stroke-width: 1; opacity: 0.35; }
polyline.marked { stroke: var(--two); stroke-width: 1.5; }
polyline.reference { stroke: var(--three); stroke-width: 1.5; stroke-dasharray: 5 4; }
g circle { fill: var(--one); }
g.marked circle { fill: var(--two); }
g.complete circle { fill: var(--card); stroke: var(--two); stroke-width: 2; }
.hover { fill: transparent; }
.hover:hover { fill: var(--ink); fill-opacity: 0.25; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 10px 0; padding: 14px 16px; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  max-height: 420px; overflow-y: auto; unicode-bidi: isolate; }
.prompt { font-weight: 700; color: var(--one); }
details { border-top: 1px solid var(--line); padding: 10px 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 550; }
table { border-collapse: collapse; width: 100%; margin: 10px 0;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
th { text-align: left; font-weight: 400; color: var(--soft); padding: 2px 20px 2px 0; vertical-align: top;
  white-space: nowrap; width: 1%; }
td { overflow-wrap: anywhere; vertical-align: top; padding: 2px 0; }
.incidents th { color: var(--bad); }
.bar { display: flex; height: 16px; gap: 2px; margin-bottom: 10px; border-radius: 5px; overflow: hidden; }
.bar span { flex-basis: 0; min-width: 2px; }
.key i[class] { width: 10px; height: 10px; border: 0; }
.part0 { background: var(--p0); } .part1 { background: var(--p1); } .part2 { background: var(--p2); }
.part3 { background: var(--p3); } .part4 { background: var(--p4); } .part5 { background: var(--p5); }
"""
