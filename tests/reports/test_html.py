"""The HTML report: it says what a run has measured, loads nothing, escapes everything, and stays readable and small."""

from __future__ import annotations

import itertools
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from pgp import train
from pgp.datasets.folder import Folder
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation import metrics
from pgp.evaluation.predictions import TOP, Predictions
from pgp.projections.base import NoProjection
from pgp.reports import comparison, groups, html, svg
from pgp.reports.comparison import Entry
from pgp.runs.run import Run

VOID = {"meta", "img", "br", "link", "input"}
INLINE = {"span", "strong", "small", "a", "code", "script", "b"}


class Page(HTMLParser):
    """Elements of a page, its texts, and whether each element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.words.append("" if tag in INLINE else " ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"
        self.words.append("" if tag in INLINE else " ")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, *tags):
        return [(tag, attrs) for tag, attrs in self.elements if tag in tags]

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """Two seeds with projection, and two without."""
    folder = tmp_path_factory.mktemp("html")
    base = tiny.config(dataset=Synthetic(noise=0.5), epochs=1)
    configs = {"orthogonal": base, "none": replace(base, projection=NoProjection.Config())}
    return {
        f"{name} {seed}": train.train(replace(one, seed=seed), folder / f"{name}-{seed}")
        for name, one in configs.items()
        for seed in (1, 2)
    }


def made(folder, names, tasks, columns=("head",), *, record=True, log=True, measured=True, images=3):
    """A run folder as a finished run leaves it, with `images` test images of each class, of which every third is
    predicted as the next class."""
    run = Run.create(folder, tiny.config(name="made"), tiny.described(names, tasks))
    total, count = len(tasks), len(names)
    matrix = torch.full((total, total), 0.75, dtype=torch.float64).where(
        torch.ones(total, total).tril().bool(), torch.nan
    )
    if not measured:
        matrix[-1, 0] = torch.nan
    task_of = torch.zeros(count, dtype=torch.long)
    for number, labels in enumerate(tasks):
        task_of[list(labels)] = number
    labels = torch.arange(count).repeat_interleave(images)
    wrong = torch.arange(len(labels)) % 3 == 2
    first = torch.where(wrong, (labels + 1) % count, labels)
    top = torch.stack([first, *((first + k) % count for k in range(1, TOP))], 1)
    found = Predictions(
        torch.arange(len(labels)).int(),
        labels.short(),
        task_of[labels].short(),
        {column: top.short() for column in columns},
        {column: torch.full((len(labels),), 0.5).half() for column in columns},
        torch.full((total, 4), 0.25),
    )
    if log:
        for t in range(total):
            shares = {column: [0.5] * (t + 1) for column in columns}
            values = dict.fromkeys(columns, 0.125)
            run.log("task", task=t, ranks={}, readouts={}, seconds={"train": 61.0}, memory={"ram": 2_500_000_000},
                    forgetting=values, forgetting_within=values, identified=shares)  # fmt: skip
    state = {"matrices": {column: matrix.clone() for column in columns}}
    run.save(f"task-{total:02d}", state | ({"predictions": found._asdict()} if record else {}))
    run.write_matrices(dict.fromkeys(columns, matrix))
    return run


def test_it_says_what_the_run_has_measured(runs):
    run = runs["orthogonal 1"]
    page = Page(html.render([run]))
    for column, matrix in run.matrices().items():
        assert f"average accuracy {100 * metrics.average_accuracy(matrix):.1f} % forgetting" in page.text
        for statistic in (metrics.average_accuracy, metrics.forgetting, metrics.average_incremental_accuracy):
            assert f" {100 * statistic(matrix):.2f} " in page.text
        for value in matrix[matrix.isfinite()].tolist():
            assert f"{100 * value:.0f}" in page.text
        error = run.events("task")[-1]["calibration"][column]["error"]
        assert f"{column}: calibration error {100 * error:.1f} %, " in page.text
    found = run.predictions()
    by_class = [float((found.top["head"][found.labels == c, 0] == c).double().mean()) for c in range(6)]
    rows = re.findall(r"pattern (\d) (\d) 4 .*?(?:pattern \d)? ?(\d+\.\d) \d", page.text)
    assert [(int(c), float(value)) for c, _, value in rows[-6:]] == [
        (c, pytest.approx(100 * by_class[c], abs=0.06)) for c in sorted(range(6), key=by_class.__getitem__)
    ]


def test_what_the_projection_did_to_each_parameter(runs):
    run = runs["orthogonal 1"]
    text = Page(html.render([run])).text
    assert "Each protected parameter parameter rank of the protected subspace, directions old inputs in the" in text
    ranks = run.events("task")[-1]["ranks"]
    assert ranks
    for name, rank in ranks.items():
        assert re.search(rf"{re.escape(name)} {rank:g} \d", text)


def test_it_loads_nothing_and_runs_no_script(runs):
    text = html.render(list(runs.values()))
    page = Page(text)
    assert not page.all("script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "source")
    policies = [attrs["content"] for _, attrs in page.all("meta") if attrs.get("http-equiv")]
    assert policies == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]
    for _, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("href", "#").startswith("#")
        assert attrs.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert not {"srcset", "xlink:href", "background", "action", "poster"} & attrs.keys()
    assert not re.search(r"https?://|//[a-z]|url\(|@import|@font-face", text)


def test_it_can_be_read_without_seeing_it(runs):
    page = Page(html.render(list(runs.values())))
    levels = [int(tag[1]) for tag, _ in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(attrs.get("scope") in ("col", "row") for _, attrs in page.all("th"))
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") or attrs.get("preserveaspectratio")
               for _, attrs in page.all("svg"))  # fmt: skip
    assert page.all("img")
    assert all(re.match("Test image [0-9]+, of class pattern", attrs["alt"]) for _, attrs in page.all("img"))
    targets = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {attrs["href"][1:] for _, attrs in page.all("a")} == targets
    assert ("html", {"lang": "en"}) in page.elements


def test_runs_are_pooled_and_compared_with_the_first(runs):
    page = Page(html.render(list(runs.values())))
    one, other = (Entry(name, {seed: runs[f"{name} {seed}"] for seed in (1, 2)}) for name in ("orthogonal", "none"))
    for column in ("head", "lda"):
        line = [run.matrices()[column] for run in one.runs.values()]
        mean = sum(map(metrics.average_accuracy, line)) / 2
        assert f"2 {100 * mean:.2f} ± " in page.text
        (difference,) = comparison.differences(Entry("none", other.runs, {"orthogonal": one}), column)
        assert difference.seeds == 2
        values = {seed: metrics.average_accuracy(run.matrices()[column]) for seed, run in other.runs.items()}
        expected = sum(values[s] - metrics.average_accuracy(one.runs[s].matrices()[column]) for s in (1, 2)) / 2
        assert difference.values["average_accuracy"].mean == pytest.approx(expected)
        assert f"{column} 2 {comparison.signed(difference.values['average_accuracy'])} " in page.text
    assert "projection.tag orthogonal none" in page.text
    assert "legacy_eval no no" in page.text
    assert "save_every_steps 0 0" in page.text
    assert "seeds 1, 2" in page.text
    assert 0 < len(page.all("img")) <= html.PICTURES


def test_runs_without_a_common_seed_have_no_differences(runs):
    page = Page(html.render([runs["orthogonal 1"], runs["none 2"]]))
    assert "no seed in common" in page.text


@pytest.mark.parametrize("changes", [{"test_images": 3}, {"evaluate": "2"}, {"dataset": Synthetic(noise=0.6)}], ids=str)
def test_runs_measured_on_other_images_are_not_compared(runs, tmp_path, changes):
    other = train.train(replace(runs["none 1"].config, **changes), tmp_path / "run")
    assert html._comparable(groups.read_groups([runs["orthogonal 1"], other])) == []
    assert len(html._comparable(groups.read_groups([runs["orthogonal 1"], runs["none 1"]]))) == 1


def test_text_of_the_data_is_escaped(tmp_path):
    names = ["<script>alert(1)</script>", '"><img src=http://x>', "a\u202eb", "{{ 7 * 7 }}", "</title>&amp;", "'x'"]
    folder = tmp_path / "<b>run</b>"
    text = html.render([made(folder, names, [[0, 1, 2], [3, 4, 5]])])
    page = Page(text)
    assert not page.all("script", "b", "img")
    for name in (names[0], names[1], "a\\u202eb", names[3], names[4], names[5], str(folder)):
        assert name in page.text
    assert "\u202e" not in text


def test_a_thousand_classes_in_a_hundred_tasks(tmp_path):
    names = [f"class {c}" for c in range(1000)]
    tasks = [list(range(10 * t, 10 * t + 10)) for t in range(100)]
    run = made(tmp_path / "run", names, tasks, columns=("head", "lda"))
    start = time.process_time()
    text = html.render([run])
    assert time.process_time() - start < 20
    assert len(text) < 3_000_000
    page = Page(text)
    assert "The other 980 classes" in page.text
    shown, hidden = text.split("The other 980 classes")
    assert shown.count('<th scope="row" class="long">class ') == 2 * groups.PAIRS + html.LISTED
    assert hidden.count('<th scope="row" class="long">class ') == 980
    cells = re.findall("after task 100, on task [0-9]+: 75.0 %", text)
    assert len(cells) == 2 * 100
    assert "images of task 3 predicted as task 4: 3.3 %" in text  # 1 of 30: the last class, as the next one


def test_what_is_confused_with_what(tmp_path):
    page = Page(html.render([made(tmp_path / "run", ["ant", "bee", "cat", "dog"], [[0, 1], [2, 3]], images=6)]))
    for one, other in (("ant", "bee"), ("bee", "cat"), ("cat", "dog"), ("dog", "ant")):
        assert f"{one} {other} 2 " in page.text
    assert "task 1 2 1 83 17 2 17 83" in page.text
    assert re.search(r"ant 1 6 bee 66\.7 100\.0", page.text)  # accuracy, and among all five
    assert "training 2 min 2 s" in page.text
    assert "2.5 GB" in page.text


def photos(folder, names=("ant", "bee", "cat", "dog")):
    generator = torch.Generator().manual_seed(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(8):
            pixels = torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")
    return folder


def test_pictures_are_left_out_if_the_data_are_gone_or_others(tmp_path):
    data = photos(tmp_path / "photos")
    config = tiny.config(dataset=Folder(data), tasks=2, epochs=1, drift_images=0)
    run = train.train(config, tmp_path / "run")
    page = Page(html.render([run]))
    assert page.all("img")
    assert "No pictures" not in page.text
    data.rename(tmp_path / "elsewhere")
    page = Page(html.render([run]))
    assert not page.all("img")
    assert f"No pictures: the test images are no longer at {data} (" in page.text
    assert "Confused classes" in page.text
    shutil.copytree(tmp_path / "elsewhere", data)
    for path in (data / "ant").iterdir():
        path.unlink()
        path.with_name(f"other {path.name}").write_bytes((data / "bee" / "0.png").read_bytes())
    assert f"no longer at {data} (" in Page(html.render([run])).text


def test_what_older_runs_did_not_record_is_named(tmp_path):
    names, tasks = ["ant", "bee", "cat", "dog"], [[0, 1], [2, 3]]
    page = Page(html.render([made(tmp_path / "old", names, tasks, record=False)]))
    assert page.text.count("no prediction of each test image") == 3  # confusion, classes, prompts
    assert "75.00 0.00" in page.text
    run = made(tmp_path / "without a log", names, tasks)
    run.log_file.path.unlink()
    with pytest.warns(UserWarning, match="is missing"):
        text = Page(html.render([run])).text
    assert "The log does not say" in text or "Little is forgotten" in text
    assert "peak memory of the process not recorded" in text


def test_an_unfinished_run_is_reported_as_far_as_it_came(tmp_path, runs):
    run = Run.open(shutil.copytree(runs["orthogonal 1"].folder, tmp_path / "run"))
    (run.folder / "checkpoints" / "latest").write_text("task-02")
    text = Page(html.render([run])).text
    assert "tasks learned 2 of 3" in text
    for column, matrix in run.matrices().items():
        found = run.predictions()
        top = [(found.top[column][found.tasks == t] == found.labels[found.tasks == t, None]).any(1) for t in (0, 1)]
        mean = sum(float(hits.float().mean()) for hits in top) / 2
        assert re.search(rf"{column} 1 {100 * metrics.average_accuracy(matrix):.2f} .* {100 * mean:.2f} ", text)
    assert "pattern 4" not in text.split("Which classes are hard?")[1].split("Can its confidence")[0]


def test_one_task_has_nothing_to_forget(tmp_path):
    page = Page(html.render([made(tmp_path / "run", ["ant", "bee"], [[0, 1]])]))
    assert "One task is learned so far, so there is nothing to forget." in page.text
    assert "average accuracy 75.0 % forgetting – points" in page.text


def test_accuracies_that_were_not_measured_are_not_zero(tmp_path):
    page = Page(html.render([made(tmp_path / "run", ["ant", "bee", "cat"], [[0], [1, 2]], measured=False)]))
    assert (
        "Forgetting was not measured: that needs the test images of each task, after the task and at the end."
        in page.text
    )
    assert "not measured not measured" in page.text  # in the table
    assert ("td", {"title": "not measured"}) in page.elements
    assert "nan" not in page.text.lower().split()


@pytest.mark.filterwarnings("ignore:the old images")
def test_a_task_that_was_added_without_the_old_images(tmp_path):
    data = photos(tmp_path / "photos")
    run = train.train(tiny.config(dataset=Folder(data), tasks=2, epochs=1, drift_images=0), tmp_path / "run")
    data.rename(tmp_path / "elsewhere")
    run = train.resume(run.folder, add=photos(tmp_path / "more", ("emu", "fox")))
    page = Page(html.render([run]))
    assert "tasks learned 3 of 3" in page.text
    assert "Forgetting was not measured" in page.text
    assert page.elements.count(("td", {"title": "not measured"})) == 2 * 2  # two old tasks, for each readout
    assert re.search("ant 1 0 – – – –", page.text)
    assert re.search(r"emu 3 [1-9] \D*[0-9]+\.[0-9] ", page.text)


def test_domains_share_their_classes(tmp_path):
    config = replace(tiny.config(dataset=Synthetic(domains=2), epochs=1), setting="dil", tasks=None)
    page = Page(html.render([train.train(config, tmp_path / "run")]))
    assert "Confusion between tasks, %" not in page.text
    assert "Which classes are hard?" in page.text


def test_the_published_protocol_is_a_row_without_pictures(tmp_path):
    config = replace(tiny.config(dataset=Synthetic(noise=0.5), epochs=1), legacy_eval=True)
    page = Page(html.render([train.train(config, tmp_path / "run")]))
    assert page.text.count("Not recorded for the published protocol.") == 2
    assert "head/legacy" in page.text


def test_a_report_of_nothing_but_right_answers(tmp_path):
    run = made(tmp_path / "run", ["ant", "bee"], [[0], [1]], images=1)
    assert "No image is predicted as another class." in Page(html.render([run])).text


@pytest.mark.parametrize("count", [1, 5, 16])
def test_labels_of_curves_do_not_overlap(count):
    series = [svg.Series(f"s{i}", "", [(1, 50), (2, 50 + i / 100)]) for i in range(count)]
    chart = svg.line_chart("title", series, "x", "y", y_max=100)
    heights = sorted(float(y) for y in re.findall(r'class="end"[^>]* y="([\d.-]+)"', chart))
    assert len(heights) == count
    assert all(b - a >= svg.GAP - 0.11 for a, b in itertools.pairwise(heights))
    assert heights[0] >= svg.TOP


def test_too_many_curves_have_no_labels():
    series = [svg.Series(f"s{i}", "", [(1, 50), (2, i)]) for i in range(17)]
    assert 'class="end"' not in svg.line_chart("title", series, "x", "y", y_max=100)


def test_the_area_of_a_dot_is_its_weight():
    series = [svg.Series("", "", [(1, 50), (2, 50)], weights=[1.0, 0.25])]
    radii = re.findall(r' r="([\d.]+)"', svg.line_chart("title", series, "x", "y"))
    assert float(radii[0]) ** 2 == pytest.approx(4 * float(radii[1]) ** 2)


def test_a_chart_of_nothing_is_a_chart():
    assert Page(str(svg.line_chart("t", [], "x", "y"))).all("svg")
    assert Page(str(svg.heat_map("t", torch.full((1, 1), torch.nan), "r", "c", lambda *_: ""))).all("svg")


def test_package_data_holds_the_templates():
    folder = Path(html.__file__).parent / "templates"
    assert {path.name for path in folder.iterdir()} == {"report.html.jinja", "report.css"}


@pytest.mark.parametrize("setting", ["cil", "til"])
def test_groups_are_subtracted_only_if_the_same_was_measured(tmp_path, setting):
    one = made(tmp_path / "one", ["ant", "bee", "cat", "dog"], [(0, 1), (2, 3)])
    names = ["ant", "bee", "cat", "dog"] if setting == "til" else ["ant", "bee", "cat", "eel", "fly", "gnu"]
    tasks = [(0, 1), (2, 3)] if setting == "til" else [(0, 1), (2, 3), (4, 5)]
    other = Run.create(
        tmp_path / "other",
        tiny.config(name="made", setting=setting, epochs=7),
        tiny.described(names, tasks, data="0" * 16 if setting == "til" else "1" * 16),
    )
    other.save(f"task-{len(tasks):02d}", {"matrices": {"head": torch.full((len(tasks),) * 2, 0.5).double().tril()}})
    other.write_matrices({"head": torch.full((len(tasks),) * 2, 0.5).double().tril()})
    text = Page(html.render([one, other])).text
    assert "Differences to" not in text
    assert "other data, classes or protocols were measured" in text
