"""The report draws the numbers that are in the files, and nothing that a sample says can get out of its box."""

import html.parser
import itertools
import json
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import report
from tests.experiments.fake_run import HOSTILE, STEPS, TOKENS_PER_STEP, loss, write_run


def parse(path) -> ElementTree.Element:
    content = path.read_text()
    assert content.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(content.split("\n", 1)[1])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_run(directory)
    report.write_report(directory)
    return directory


@pytest.fixture(scope="module")
def page(run_dir):
    return parse(run_dir / "report.html")


def figures(page) -> dict[str, ElementTree.Element]:
    return {figure.findtext("figcaption/b"): figure for figure in page.iter("figure")}


def number(label: str) -> float:
    value, unit = re.fullmatch(r"([-\d.e]+)([kMGT%]?)", label).groups()
    return float(value) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "%": 0.01}[unit]


def axis_map(figure, kind: str, log: bool):
    """Pixel -> value, from two tick labels: as a reader of the chart would do it."""
    marks = [tick for tick in figure.iter("text") if tick.get("class") == f"tick {kind}"]
    (p0, v0), (p1, v1) = [(float(tick.get(kind)), number(tick.text)) for tick in (marks[0], marks[-1])]
    if log:
        v0, v1 = math.log(v0), math.log(v1)
    value = lambda pixel: v0 + (pixel - p0) * (v1 - v0) / (p1 - p0)  # noqa: E731
    return (lambda pixel: math.exp(value(pixel))) if log else value


def polyline(figure, name: str) -> list[tuple[float, float]]:
    (line,) = [line for line in figure.iter("polyline") if line.get("data-name") == name]
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def records(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("title", "line", "file", "key", "log"),
    [
        ("Loss by tokens", "training", "metrics.jsonl", "loss", True),
        ("Loss by tokens", "held out", "metrics.jsonl", "val_loss", True),
        ("Bits per byte on held-out data", "model", "metrics.jsonl", "bits_per_byte", False),
        ("Learning rate", "learning rate", "metrics.jsonl", "learning_rate", False),
        ("Gradient norm", "each step", "metrics.jsonl", "grad_norm", True),
        ("Parameter norm", "parameter norm", "metrics.jsonl", "param_norm", False),
        ("Tokens per second", "each step", "timing.jsonl", "tokens_per_second", False),
        ("Model FLOPs utilisation", "each step", "timing.jsonl", "mfu", False),
    ],
)
def test_lines_reproduce_the_data(run_dir, page, title, line, file, key, log):
    figure = figures(page)[title]
    x_of, y_of = axis_map(figure, "x", False), axis_map(figure, "y", log)
    data = {record["step"]: record[key] for record in records(run_dir, file) if key in record}
    drawn = {round(x_of(x) / TOKENS_PER_STEP): y_of(y) for x, y in polyline(figure, line)}
    span = max(data.values()) - min(data.values())
    assert len(drawn) >= min(len(data), 500)
    assert {min(data), max(data)} <= drawn.keys()
    for step, value in drawn.items():
        assert value == pytest.approx(data[step], abs=0.005 * span)
    assert max(drawn.values()) == pytest.approx(max(data.values()), abs=0.005 * span)
    assert min(drawn.values()) == pytest.approx(min(data.values()), abs=0.005 * span)


def test_loss_by_time_is_against_the_clock_of_the_run(run_dir, page):
    figure = figures(page)["Loss by time"]
    assert [label.text for label in figure.iter("text")][-1] == "minutes"
    seconds = {record["step"]: record["seconds"] for record in records(run_dir, "timing.jsonl") if "step" in record}
    x_of, y_of = axis_map(figure, "x", False), axis_map(figure, "y", True)
    drawn = [(60 * x_of(x), y_of(y)) for x, y in polyline(figure, "held out")]
    expected = [(seconds[step], loss(step) + 0.05) for step in range(100, STEPS + 1, 100)]
    for (x, y), (second, value) in zip(drawn, expected, strict=True):
        assert x == pytest.approx(second, abs=1)
        assert y == pytest.approx(value, rel=0.005)


@pytest.mark.parametrize(
    ("title", "line", "key", "log"),
    [
        ("Loss by tokens", "all held-out text", "final_val_loss", True),
        ("Bits per byte on held-out data", "model, all text", "final_bits_per_byte", False),
    ],
)
def test_the_complete_evaluation_stands_apart_from_the_curve(run_dir, page, title, line, key, log):
    figure = figures(page)[title]
    ((x, y),) = polyline(figure, line)
    final = records(run_dir, "metrics.jsonl")[-1]
    assert axis_map(figure, "x", False)(x) == pytest.approx(STEPS * TOKENS_PER_STEP, rel=0.001)
    assert axis_map(figure, "y", log)(y) == pytest.approx(final[key], rel=0.002)
    assert final[key] != final[key.removeprefix("final_")]


def test_where_the_curve_is_complete_nothing_is_drawn_twice(run_dir, tmp_path):
    *before, final = records(run_dir, "metrics.jsonl")
    final |= {"final_val_loss": final["val_loss"], "final_bits_per_byte": final["bits_per_byte"]}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (*before, final)))
    page = parse(report.write_report(tmp_path))
    assert not [line for line in page.iter("polyline") if line.get("class") == "complete"]
    assert len(polyline(figures(page)["Loss by tokens"], "held out")) == STEPS // 100


def test_nothing_is_loaded_and_nothing_runs(run_dir):
    class Parser(html.parser.HTMLParser):
        tags, names = set(), set()

        def handle_starttag(self, tag, attrs):
            self.tags.add(tag)
            self.names |= {name for name, _ in attrs}

    content = (run_dir / "report.html").read_text()
    Parser().feed(content)
    assert Parser.tags.isdisjoint({"script", "img", "link", "iframe", "object", "embed", "base", "image", "use"})
    assert Parser.names.isdisjoint({"src", "href", "xlink:href", "srcset", "action", "onload", "onclick"})
    assert "url(" not in content
    assert "@import" not in content
    assert "http" not in content.replace("http://example.org/x.png", "")


def test_hostile_text_is_shown_as_text(page):
    shown = ["".join(block.itertext()) for block in page.iter("pre")]
    harmless = re.sub("[\x00\x1b\ud800]", "\ufffd", HOSTILE)
    assert sum(harmless in block for block in shown) == 3
    assert page.findtext("head/title") == "quickstart <tiny>"


def test_numbers_of_the_header(page, run_dir):
    tiles = {tile.findtext("dt"): tile for tile in page.iter("div") if tile.find("dt") is not None}
    result = json.loads((run_dir / "result.json").read_text())
    assert tiles["bits per byte"].findtext("dd") == f"{result['bits_per_byte']:.4f}"
    assert tiles["bits per byte"].findtext("small") == "xz -9e: 2.150"
    assert tiles["tokens"].findtext("small") == "1,200 of 1,200 steps"
    assert "finished" in [badge.text for badge in page.iter("span")]


def test_incidents_are_told(page):
    (table,) = [table for table in page.iter("table") if table.get("class") == "incidents"]
    rows = ["".join(row.itertext()) for row in table.iter("tr")]
    assert rows == [
        "step 701loss is nan; data steps 600 to 700 were skipped",
        "step 702loss is inf; the run gave up",
    ]


@pytest.mark.parametrize("values", [[-0.002, -0.01], [-3.0, -3.0], [-1.0, 2.0], [0.5, 2.0], [0.0, 0.0]])
def test_an_axis_that_holds_zero_holds_all_values_as_well(values):
    """Those of a learned reward may all be negative."""
    line = report.Series("mean", list(enumerate(values)))
    _, axis = report.axes([line], log=False, from_zero=True)
    assert axis.low < axis.high
    assert all(axis.low <= value <= axis.high for value in (0, *values))
    assert "polyline" in report.chart("Reward", "steps", [line], from_zero=True)


@pytest.mark.parametrize("last_step", [1, 2, 30])
def test_a_run_in_progress(tmp_path, last_step):
    write_run(tmp_path, last_step)
    page = parse(report.write_report(tmp_path))
    assert "not finished" in [badge.text for badge in page.iter("span")]
    assert len(figures(page)) == 8


FILES = ("metrics", "timing", "samples", "incidents", "config", "result", "provenance", "data_manifest")


@pytest.mark.parametrize("kept", [(), *[(name,) for name in FILES], *itertools.combinations(FILES, len(FILES) - 1)])
def test_any_file_may_be_missing(run_dir, tmp_path, kept):
    for path in run_dir.glob("*.json*"):
        if path.name.split(".")[0] in kept:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    page = parse(report.write_report(tmp_path))
    assert page.findtext("head/title") == ("quickstart <tiny>" if "config" in kept else tmp_path.name)
    assert ("metrics" in kept) == ("Learning rate" in figures(page))


def test_torn_lines_not_finite_values_and_repeated_steps(tmp_path):
    write_run(tmp_path, 40)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "tokens": 335872, "loss": NaN, "grad_norm": Infinity}\n{"step": 42, "lo')
    repeated = {"step": 40, "seconds": 99.0, "step_seconds": 1.0, "tokens_per_second": 8192.0, "mfu": 0.1}
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write(json.dumps(repeated) + "\n")
    page = parse(report.write_report(tmp_path))
    assert len(polyline(figures(page)["Loss by tokens"], "training")) == 40
    figure = figures(page)["Tokens per second"]
    drawn = polyline(figure, "each step")
    assert len(drawn) == 40
    assert axis_map(figure, "y", False)(drawn[-1][1]) == pytest.approx(8192, rel=0.01)


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12))
def test_ticks_are_few_round_and_inside(low, extent):
    high = low + extent
    if high - low < 1e-9 * abs(low):
        return
    values = report.ticks(low, high)
    assert 2 <= len(values) <= 9
    assert all(low - 1e-6 * extent <= value <= high + 1e-6 * extent for value in values)


@given(st.floats(1e-9, 1e9), st.floats(0.02, 9))
def test_log_ticks_are_few_and_inside(low, decades):
    values = report.log_ticks(low, low * 10**decades)
    assert 2 <= len(values) <= 12
    assert all(low * (1 - 1e-9) <= value <= low * 10**decades * (1 + 1e-9) for value in values)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thinning_keeps_the_ends_and_the_extremes(values):
    points = list(enumerate(values))
    thinned = report.thin(points, limit=100)
    assert len(thinned) <= 105
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]
    assert {min(values), max(values)} <= {y for _, y in thinned}
    assert set(thinned) <= set(points)


def test_smoothing_keeps_a_straight_line_and_removes_noise():
    line = [(float(i), 3.0 * i) for i in range(500)]
    assert [y for _, y in report.smooth(line)] == pytest.approx([y for _, y in line])
    noisy = [(float(i), (-1.0) ** i) for i in range(500)]
    assert max(abs(y) for _, y in report.smooth(noisy)[10:-10]) < 0.2
    assert report.smooth([*line[:250], (250.0, math.nan), *line[251:]])[-1] == pytest.approx(line[-1])
