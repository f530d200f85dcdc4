"""Figures can be read: no name is covered or cut off, axes have units, and colours differ for the colour-blind."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from pgp.reports import comparison, drift, figures, style
from pgp.reports.tables import ResultRow

pytestmark = pytest.mark.looks_at_figures

ALIKE = "projection.energy 0.9500, apply_to update, space union, keys preserved, run number "
NAMES = {
    "one": ["demo"],
    "two": ["projection orthogonal", "projection none"],
    "odd": [f"{ALIKE}1", f"{ALIKE}2", "$x^2$ _a^{b} & <i> カスタム画像", "הקרנה אורתוגונלית עם אנרגיה 0.95"],
    "many": [f"energy {number / 12:.2f}" for number in range(12)],
}
READOUTS = ("head", "lda+query+linear")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written."""
    out = []
    arrange = style.arrange

    def arranged(figure):
        arrange(figure)
        out.append(figure)

    monkeypatch.setattr(style, "arrange", arranged)
    return out


def matrix(tasks, seed, loss):
    """An accuracy matrix (T, T) in which old tasks lose accuracy."""
    draws = torch.Generator().manual_seed(seed)
    age = torch.arange(tasks).view(-1, 1) - torch.arange(tasks)
    values = 0.95 - loss * (1 - torch.exp(-age / 3)) + 0.02 * torch.rand(tasks, tasks, generator=draws)
    return values.double().where(age >= 0, torch.nan)


def rows(kind, tasks, seeds=2, task_names=()):
    names = list(task_names) or [""] * tasks
    out = []
    for number, label in enumerate(NAMES[kind]):
        for column, loss in zip(READOUTS, (0.3 + 0.04 * number, 0.05), strict=True):
            images = torch.arange(1.0, 16.0)
            confidence = (torch.arange(15) + 0.5) / 15
            bins = torch.stack((images, images * confidence, images * confidence * (1 - loss)), 1).double()
            matrices = [matrix(tasks, 9 * number + seed, loss) for seed in range(seeds)]
            out.append(ResultRow(label, column, matrices, names, [], [bins] * seeds))
    return out


def history(label, tasks, spaces, prompts=10, seeds=2):
    runs = []
    for seed in range(seeds):
        draws = random.Random(seed)
        energies = {space: draws.random() for space in spaces}
        events = {}
        for task in range(tasks):
            old = [draws.random() for _ in range(task)]
            drift_of = {"features": old, "logits": old, "responses": dict.fromkeys(spaces, old), "changed": old}
            drift_of |= dict.fromkeys(("held", "gradients", "updates", "leak", "removed"), energies)
            drift_of["usage"] = [draws.random() for _ in range(prompts)]
            lost, found = {"head": 0.3 * (task > 0)}, {"head": [0.8] * (task + 1)}
            about = {"forgetting": lost, "forgetting_within": lost, "identified": found}
            events[task] = {"ranks": dict.fromkeys(spaces, 7), "drift": drift_of, **about}
        runs.append(events)
    return drift.DriftHistory(label, runs)


@dataclass
class Finished:
    own: dict[str, torch.Tensor]

    def matrices(self):
        return self.own


def entry(label, number, tasks=5, baselines=None):
    runs = {seed: Finished({READOUTS[0]: matrix(tasks, seed, 0.1 + 0.05 * number)}) for seed in range(3)}
    return comparison.Entry(label, runs, baselines or {})


def boxes(figure):
    """Every text that is drawn, with its box in pixels."""
    renderer = figure.canvas.get_renderer()
    ticks = {}
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                ticks |= dict.fromkeys((tick.label1, tick.label2), low - 1e-9 <= tick.get_loc() <= high + 1e-9)
    seen = [text for text in figure.findobj(Text) if text.get_visible() and ticks.get(text, True)]
    return [(text.get_text(), Text.get_window_extent(text, renderer)) for text in seen if text.get_text().strip()]


def check(figure):
    """Check that no text is cut off or covers another one, and that every axis has a label and few ticks."""
    found = boxes(figure)
    for text, box in found:
        assert "\\n" not in text
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
    for (one, first), (other, second) in itertools.combinations(found, 2):
        shared = Bbox.intersection(first, second)
        assert shared is None or min(shared.width, shared.height) < 2.5, (one, other)
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            low, high = sorted(limits)
            assert sum(low <= tick <= high for tick in axis.get_ticklocs()) <= style.NAMED
        assert axes.lines or axes.patches or axes.images or axes.collections, "an empty panel"
    assert all(math.isfinite(size) and size < 40 for size in figure.get_size_inches())


def panel(figure, ylabel):
    return next(axes for axes in figure.axes if ylabel in (axes.get_ylabel(), axes.get_title(loc="left")))


def named(axes, gid="right"):
    return [text.get_text() for text in axes.texts if text.get_gid() == gid]


@pytest.mark.parametrize(
    ("kind", "tasks"),
    [("one", 1), ("one", 2), ("two", 2), ("two", 5), ("two", 20), ("two", 100), ("odd", 2), ("odd", 5), ("many", 100)],
)
def test_accuracy(tmp_path, drawn, kind, tasks):
    table = rows(kind, tasks)
    figures.draw_accuracy(table, tmp_path / "accuracy.png")
    (figure,) = drawn
    check(figure)
    averages = panel(figure, "average accuracy (%)")
    assert averages.get_xlabel() == "tasks learned"
    assert len(averages.lines) == len(table)
    values = [float(100 * torch.stack(row.matrices)[:, -1].nanmean()) for row in table]
    if kind in ("one", "two"):
        assert figure.legends == []
        for text, row, value in zip(named(averages), table, values, strict=True):
            assert row.column in text.replace("\n", "")
            assert text.endswith(f": {value:.1f} %")
    else:
        (legend,) = [part for sub in figure.subfigs for part in sub.legends]
        assert len(legend.get_texts()) == len(NAMES[kind]) + len(READOUTS)
    matrices = [axes for axes in figure.axes if axes.images]
    assert len(matrices) == (len(table) if tasks > 1 else 0)
    assert any(axes.get_ylabel() == "accuracy (%)" for axes in figure.axes) == (tasks > figures.NUMBERED)
    notes = " ".join(text for text, _ in boxes(figure)).replace("\n", " ")
    assert "bands: ± 1 standard deviation" in notes
    assert ("Colour: run." in notes) == (len(NAMES[kind]) > 1)
    assert "line style: readout." in notes.lower()


def test_two_tasks_are_a_slope_with_its_values(tmp_path, drawn):
    table = rows("two", 2, seeds=1)
    figures.draw_accuracy(table, tmp_path / "accuracy.png")
    averages = panel(drawn[0], "average accuracy (%)")
    assert named(averages, "left") == [f"{100 * float(row.matrices[0][0, 0]):.1f} %" for row in table]
    assert list(averages.get_yticks()) == []
    assert averages.get_window_extent().width / style.DPI < 2.5


def test_a_task_that_was_not_measured_is_grey(tmp_path, drawn):
    (row, *_) = rows("one", 3, seeds=1)
    row.matrices[0][2, 0] = torch.nan
    figures.draw_accuracy([row], tmp_path / "accuracy.png")
    (figure,) = drawn
    (axes,) = [axes for axes in figure.axes if axes.images]
    grey, shown = (image.get_array() for image in axes.images)
    assert shown.shape == (3, 3)
    assert (~np.ma.getmaskarray(grey)).nonzero() == (2, 0)
    assert any("grey: not measured" in text for text, _ in boxes(figure))


def test_a_run_of_one_task_among_others_is_a_line(tmp_path, drawn):
    table = [*rows("one", 5), rows("one", 1)[0]._replace(label="joint")]
    figures.draw_accuracy(table, tmp_path / "accuracy.png")
    check(drawn[0])
    assert any(
        "joint, head (one task): " in text.replace("\n", " ") for text in named(panel(drawn[0], "average accuracy (%)"))
    )


def test_tasks_with_names_alike(tmp_path, drawn):
    names = [f"photos of the harbour from the year {2000 + task}" for task in range(5)]
    figures.draw_accuracy(rows("one", 5, task_names=names), tmp_path / "accuracy.png")
    check(drawn[0])
    axes = next(axes for axes in drawn[0].axes if axes.images)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label[-4:] for label in labels] == ["2000", "2001", "2002", "2003", "2004"]


@pytest.mark.parametrize("tasks", [2, 5])
def test_online_accuracy(tmp_path, drawn, tasks):
    streams = [{500 * look: 0.8 - 0.5 / look + 0.02 * seed for look in range(1, 30)} for seed in range(2)]
    figures.draw_accuracy([row._replace(online=streams) for row in rows("one", tasks)], tmp_path / "accuracy.png")
    check(drawn[0])
    axes = panel(drawn[0], "online accuracy (%)")
    assert axes.get_xlabel() == "images so far"
    assert len(axes.lines) == 2
    end = 100 * sum(stream[500 * 29] for stream in streams) / 2
    assert named(axes) == [f"{end:.1f} %"]


@pytest.mark.parametrize("kind", NAMES)
def test_calibration(tmp_path, drawn, kind):
    table = rows(kind, 3)
    figures.draw_calibration([*table, table[0]._replace(label="silent", calibration=[])], tmp_path / "c.png")
    (figure,) = drawn
    check(figure)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("confidence (%)", "accuracy (%)")
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()] + named(axes, "point")
    assert len(texts) == len(table)
    for text in axes.texts if kind in ("one", "two") else []:
        box = Text.get_window_extent(text, figure.canvas.get_renderer())
        assert not any(box.count_contains(line.get_transform().transform(line.get_xydata())) for line in axes.lines)
    assert all(text.replace("\n", " ").rpartition(": error ")[2].endswith(" %") for text in texts)


@pytest.mark.parametrize(
    ("kind", "tasks"), [("one", 2), ("two", 2), ("two", 5), ("two", 100), ("odd", 2), ("odd", 20), ("many", 20)]
)
def test_drift(tmp_path, drawn, kind, tasks):
    table = [history(name, tasks, ["prompts", "keys"]) for name in NAMES[kind]]
    drift.draw_drift(table, tmp_path / "drift.png")
    (figure,) = drawn
    check(figure)
    titles = {axes.get_title(loc="left").replace("\n", " "): axes for axes in figure.axes}
    over_tasks = [axes for title, axes in titles.items() if title in dict(drift.PANELS.values())]
    for axes in over_tasks:
        assert axes.get_xlabel() == "tasks learned"
        assert axes.get_ylabel().endswith((" (%)", " (points)"))
        unit = " points" if "points" in axes.get_ylabel() else " %"
        assert all(text.endswith(unit) for text in named(axes))
        assert bool(named(axes)) == (kind in ("one", "two"))
    if tasks > 2:
        assert len(over_tasks) == len(drift.PANELS)
        assert titles["forgetting"].get_ylim() == titles["forgetting if the task is given"].get_ylim()
        assert list(titles["forgetting"].lines[0].get_xdata()) == list(range(2, tasks + 1))
    else:
        summary = figure.axes[0]
        assert summary.get_xlabel() == "%, forgetting in points"
        headings = [label.get_text() for label in summary.get_yticklabels()]
        assert headings == [title for title, _ in drift.PANELS.values()]
        assert len(summary.texts) == len(headings) * len(table)
        assert all(text.get_text().endswith((" %", " points")) for text in summary.texts)
    assert {axes.get_xlabel() for title, axes in titles.items() if "subspace" in title} == {"directions", "energy (%)"}


def test_many_parameters_and_prompts(tmp_path, drawn):
    spaces = [f"prompts.blocks.{layer}.attention.keys" for layer in range(130)]
    table = [history(name, 5, spaces, prompts=300) for name in NAMES["two"]]
    drift.draw_drift(table, tmp_path / "drift.png")
    check(drawn[0])


def test_what_no_run_measured_has_no_panel(tmp_path, drawn):
    silent = history("head", 5, [], prompts=0)
    for events in silent.runs:
        for event in events.values():
            del event["drift"]["changed"], event["drift"]["usage"]
    drift.draw_drift([silent], tmp_path / "drift.png")
    (figure,) = drawn
    check(figure)
    titles = {axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes}
    absent = {"change of old protected responses", "old images that select other prompts"}
    assert titles == {title for title, _ in drift.PANELS.values()} - absent


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("has_baselines", [True, False])
def test_comparison(tmp_path, drawn, kind, has_baselines):
    names = ("unprojected", "random", "reduced-lr") if has_baselines else ()
    baselines = {name: entry(name, 5 + number) for number, name in enumerate(names)}
    if has_baselines:
        baselines["joint"] = entry("joint", 0, tasks=1)
    points = [entry(name, number, baselines=baselines) for number, name in enumerate(NAMES[kind])]
    comparison.draw_comparison([*points, *baselines.values()], tmp_path / "sweep.png")
    (figure,) = drawn
    check(figure)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("forgetting (points)", "average accuracy (%)")
    entries = len(points) + len(baselines)
    texts = named(axes, "point") + named(axes, "right")
    in_legend = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert len(texts) == (entries if entries <= style.DIRECT else 0)
    assert len(in_legend) == (0 if texts else entries)
    if entries <= comparison.FEW:
        assert all(text.endswith(" points") for text in texts)


def test_a_comparison_without_forgetting(tmp_path, drawn):
    """As after `--evaluate last`: only the last row of the matrix was measured, and of some runs nothing."""
    base, better, unmeasured = (entry(name, number) for number, name in enumerate(("base", "better", "unmeasured")))
    for one in (base, better, unmeasured):
        for run in one.runs.values():
            (values,) = run.own.values()
            values[:-1] = math.nan
    unmeasured.runs[0].own[READOUTS[0]][-1, 0] = math.nan
    better = comparison.Entry("better", better.runs, {"base": base})
    comparison.draw_comparison([better, base, unmeasured], tmp_path / "sweep.png")
    (figure,) = drawn
    check(figure)
    assert len(named(figure.axes[0], "right")) == 2
    assert "Dotted: forgetting was not measured." in " ".join(text for text, _ in boxes(figure)).replace("\n", " ")
    rows = {row[0]: row[3:] for row in comparison.table([better, base, unmeasured])}
    (difference,) = comparison.differences(better, READOUTS[0])
    assert difference.values["forgetting"] is None
    assert rows["minus base"] == (comparison.signed(difference.values["average_accuracy"]), "")
    assert rows["better"][1] == "not measured"
    assert rows["unmeasured"] == ("not measured", "not measured")


def test_names_never_begin_a_formula_and_are_not_left_out(tmp_path, drawn):
    odd = ["$\\frac{1}{2}$", "_hidden", "a$b", "c$"]
    table = [row._replace(label=name) for name in odd for row in rows("one", 3)[:1]]
    figures.draw_accuracy(table, tmp_path / "a.png")
    figures.draw_accuracy(
        [row._replace(column=f"{row.label} {i}") for row in table for i in range(3)], tmp_path / "b.png"
    )
    for figure in drawn:
        check(figure)
        texts = " ".join(text for text, _ in boxes(figure))
        assert all(name in texts for name in odd)
        assert not any(text.get_parse_math() for text in figure.findobj(Text))


def lab(colour, *, deuteranopia):
    """CIE Lab of a colour, as it is or as people without the cone for green see it (Machado et al., 2009)."""
    seen = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if deuteranopia:
        linear = np.clip(seen @ linear, 0, 1)
    x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deuteranopia", [False, True])
def test_colours_differ(deuteranopia):
    seen = [lab(colour, deuteranopia=deuteranopia) for colour in (*style.COLOURS, style.INK, "white")]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 15
    bad = [lab(colour, deuteranopia=True) for colour in ("#b05000", "#5c7a00")]  # the formula does see a confusion
    assert np.linalg.norm(bad[0] - bad[1]) < 15


def test_looks_are_told_apart_by_colour_or_marker():
    looks = [style.look(number) for number in range(36)]
    assert len({(own.colour, own.marker) for own in looks}) == 36
    assert len({str(style.look(0, dash).dash) for dash in range(5)}) == 5


def test_settings_of_matplotlib_do_not_change_a_figure_and_are_not_changed(tmp_path, drawn):
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        figures.draw_accuracy(rows("one", 3), tmp_path / "a.png")
        assert dict(matplotlib.rcParams) == before
    check(drawn[0])
    assert drawn[0].axes[0].get_facecolor() == (1, 1, 1, 1)


def test_names_are_short_and_stay_different():
    assert style.short_names(["energy 0.9", "joint"]) == ["energy 0.9", "joint"]
    short = style.short_names([f"{ALIKE}{number}" for number in range(3)])
    assert short == [f"…preserved, run number {number}" for number in range(3)]
    middle = [f"{'a' * 90}{number}{'b' * 90}" for number in range(3)]
    assert len(set(style.short_names(middle))) == 3
    assert style.short_names(["x" * 300])[0].count("\n") < style.LINES
    assert style.short_names(["same", "same"]) == ["same", "same"]
    assert style.short_names([]) == []


def test_characters_without_a_glyph_become_escapes(monkeypatch):
    monkeypatch.setattr(style, "FONTS", ("cmr10",))
    style._installed.cache_clear()
    style._has_glyph.cache_clear()
    assert style.readable("a Ж") == r"a \u0416"
    monkeypatch.setattr(style, "FONTS", ("cmr10", "DejaVu Sans", "a typeface that nobody has"))
    style._installed.cache_clear()
    style._has_glyph.cache_clear()
    assert style.readable("a Ж\n") == "a Ж\\n"
    monkeypatch.undo()
    style._installed.cache_clear()
    style._has_glyph.cache_clear()


@pytest.mark.parametrize("seed", range(20))
def test_spread_boxes_do_not_overlap_and_keep_their_order(seed):
    draws = random.Random(seed)
    count = draws.randrange(1, 9)
    centers = [draws.uniform(0, 10) for _ in range(count)]
    heights = [draws.uniform(0.2, 1.2) for _ in range(count)]
    out = style.spread(centers, heights, 0, 10)
    order = sorted(range(count), key=lambda i: centers[i])
    for below, above in itertools.pairwise(order):
        assert out[above] - out[below] >= (heights[above] + heights[below]) / 2 - 1e-9
    assert all(y - h / 2 >= -1e-9 and y + h / 2 <= 10 + 1e-9 for y, h in zip(out, heights, strict=True))
    far = [20.0 * i for i in range(count)]
    assert style.spread(far, heights, -100, 300) == pytest.approx(far)
