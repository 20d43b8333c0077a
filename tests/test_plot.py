"""scripts/charts.py and scripts/plot.py: what the charts show of hand-made run folders, and the page in a real browser."""

import json
import re
from pathlib import Path

import pytest

from scripts import charts
from scripts.charts import Axes, ticks
from scripts.plot import grouped, main, page, read_run, thinned
from tests.browser import check_page


def run_folder(folder: Path, seed: int = 0, steps: int = 5, scale: float = 1.0, **options) -> Path:
    """A run as plot reads it: rows of the log every 10 steps, validations every 20."""
    folder.mkdir(parents=True)
    given = {"lr": 0.02, "save_dir": str(folder), "methods": {"kd": {"temperature": 4.0}}, **options, "seed": seed}
    (folder / "args.json").write_text(json.dumps({"options": given, "model": {"model": "pspnet"}, "teacher": {"file": "t.pth", "sha256": "ab"}}))
    rows = []
    for step in range(10, 10 * steps + 1, 10):
        rows.append({"step": step, "loss": scale * 100 / step, "task/ce": scale * 50 / step, "kd/logits": 1.0, "gradient_norm": 2.0,
                     "lr": 0.02 - 0.0001 * step, "seconds": 1.0, "images_per_second": None})  # fmt: skip
        if step % 20 == 0:
            rows.append({"step": step, "val/mIoU": scale * step, "val/aAcc": 90.0, "val_iou/road": 80.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lines(text: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{caption: {title of a line: its points as they are drawn}} of a page."""
    found = {}
    for svg, caption in re.findall(r"<figure>(<svg.*?</svg>)<figcaption>(.*?)</figcaption>", text):
        found[caption] = {title: [tuple(map(float, point.split(","))) for point in points.split()]
                          for points, title in re.findall(r'<polyline points="([^"]*)"[^>]*><title>(.*?)</title>', svg)}  # fmt: skip
    return found


MIOU, LOSS, LR = "mIoU of the validations", "loss, all terms with their weights", "learning rate"


def test_every_run_is_a_line_that_ends_where_its_rows_end(tmp_path):
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", steps=4, scale=2.0, lr=0.01)
    found = lines(page([read_run("a", first), read_run("b", second)]))
    assert list(found) == [MIOU, LOSS, "task/ce, without its weight", "kd/logits, without its weight", LR]
    assert all(list(curves) == ["a", "b"] for curves in found.values())
    assert {title: len(points) for title, points in found[MIOU].items()} == {"a": 2, "b": 2}
    assert {title: len(points) for title, points in found[LOSS].items()} == {"a": 5, "b": 4}
    axes = Axes([0, 50], [2, 20], "steps", "loss")
    for title, step, value in (("a", 50, 2), ("b", 40, 5)):
        assert found[LOSS][title][-1] == pytest.approx((axes.x(step), axes.y(value)), abs=0.06)
    assert found[LOSS]["b"][0] == pytest.approx((axes.x(10), axes.y(20)), abs=0.06)
    axes = Axes([0, 50], [20, 80], "steps", "mIoU")
    assert found[MIOU]["b"] == [pytest.approx((axes.x(step), axes.y(2 * step)), abs=0.06) for step in (20, 40)]


def test_runs_that_differ_by_their_seed_alone_are_one_line(tmp_path):
    """Means of 1 and 2 times and 3 times the values, at the steps that all have; another setting, or the same seed again, stays apart."""
    seeds = [read_run(f"kd/seed{seed}", run_folder(tmp_path / f"kd/seed{seed}", seed, steps=5 - (seed == 2), scale=seed + 1)) for seed in range(3)]
    other = read_run("hot", run_folder(tmp_path / "hot", 3, methods={"kd": {"temperature": 1.0}}))
    groups = grouped([seeds[0], other, *seeds[1:]])
    assert [(group.title, len(group.runs)) for group in groups] == [("kd (3 seeds)", 3), ("hot", 1)]
    mean, low, high = groups[0].line("val/mIoU")
    assert (mean, low, high) == ([(20, 40), (40, 80)], [(20, 20), (40, 40)], [(20, 60), (40, 120)])
    assert [step for step, _ in groups[0].line("loss")[0]] == [10, 20, 30, 40]
    text = page([*seeds, other])
    assert {caption: list(curves) for caption, curves in lines(text).items()}[MIOU] == ["kd (3 seeds)", "hot"]
    assert text.count("<polygon") == 5 and "from the lowest to the highest" in text
    assert re.findall(r"<td>(.*?)</td>", text)[:6] == ["kd (3 seeds)", "50", "80.00", "80.00", "40", "5"]
    again = read_run("again", run_folder(tmp_path / "again", 0))
    assert [group.title for group in grouped([*seeds, again])] == ["kd/seed0", "kd/seed1", "kd/seed2", "again"]


def test_a_run_that_goes_on(tmp_path):
    """Before its first validation, and while it writes a row."""
    folder = run_folder(tmp_path / "a", steps=1)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "lo')
    text = page([read_run("a", folder)])
    assert list(lines(text)) == [LOSS, "task/ce, without its weight", "kd/logits, without its weight", LR]
    assert re.findall(r"<td>(.*?)</td>", text) == ["a", "10", "-", "-", "-", "10"]


def test_long_lines_are_averaged_and_end_where_they_end():
    points = [(float(step), float(step % 2)) for step in range(1, 2001)]
    found = thinned(points)
    assert len(found) == 501 and found[-1] == points[-1] and found[0] == (2.5, 0.5) and all(value == 0.5 for _, value in found[:-2])
    assert thinned(points[:500]) == points[:500]


def test_what_is_refused(tmp_path, capsys):
    good = run_folder(tmp_path / "good")
    (run_folder(tmp_path / "empty") / "metrics.jsonl").write_text("")
    (run_folder(tmp_path / "torn") / "metrics.jsonl").write_text('{"step"\n{"step": 1, "loss": 2}\n')
    for name, row in (("list", "[1]"), ("stepless", '{"loss": 1}'), ("word", '{"step": 1, "loss": "a"}'), ("nested", "[" * 200_000)):
        (run_folder(tmp_path / name) / "metrics.jsonl").write_text(row + '\n{"step": 1, "loss": 2}\n')
    (run_folder(tmp_path / "bare") / "args.json").write_text("{}")
    (run_folder(tmp_path / "deep") / "args.json").write_text("[" * 200_000)
    (tmp_path / "other" / "good").parent.mkdir()
    run_folder(tmp_path / "other" / "good", lr=0.5)
    (tmp_path / "nothing").mkdir()
    out = ["--output", str(tmp_path / "c.html")]
    for arguments, told in (
        ([str(tmp_path / "none"), *out], "none: no such folder; give the folder of a run, its --save-dir"),
        ([str(good / "args.json"), *out], "args.json: is a file; give the folder of a run"),
        ([str(tmp_path / "nothing"), *out], "nothing/args.json: No such file or directory; give the folder of a run"),
        ([str(tmp_path / "empty"), *out], "empty: has no rows yet; wait for the first log line"),
        ([str(tmp_path / "torn"), *out], "metrics.jsonl, line 1: no row of a table"),
        *(([str(tmp_path / name), *out], "metrics.jsonl, line 1: no row of a table") for name in ("list", "stepless", "word", "nested")),
        ([str(tmp_path / "bare"), *out], "bare: its args.json is of no training"),
        ([str(tmp_path / "deep"), *out], "args.json: damaged (maximum recursion depth exceeded"),
        ([f"A={tmp_path / 'lr=1' / 'none'}", *out], "lr=1/none: no such folder"),
        ([str(good), str(good) + "/", *out], "is given twice; drop one"),
        ([f"x={good}", f"x={tmp_path / 'other' / 'good'}", *out], "two runs are called 'x'; give TITLE=FOLDER"),
        ([str(good), "--output", str(tmp_path / "c.png")], "c.png: is a page; give a file that ends in .html"),
        ([str(good), "--output", str(tmp_path / "no" / "c.html")], "c.html: No such file or directory"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2 and told in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "c.html").exists()


# ---------------------------------------------------------------------------------------------------------------------- charts


def test_a_single_value_has_a_place_on_the_axes():
    for value in (0.0, 3.0, 1e20):
        axes = Axes([0, 1], [value], "steps", "loss")
        assert axes.y(value) == pytest.approx((axes.y(axes.y0) + axes.y(axes.y1)) / 2)


def test_ticks_are_round_and_inside():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100] and ticks(-0.4, 0.44) == pytest.approx([-0.4, -0.2, 0, 0.2, 0.4])
    for low, high in ((0, 1e-3), (29.98, 30.03), (-7, 2000), (5, 5)):
        marks = ticks(low, high)
        assert len(marks) <= 7 and all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_axes_turn_values_into_places():
    axes = Axes([0.0, 100.0], [10.0, 20.0], "x", "y")
    assert axes.x(0) < axes.x(100) and axes.y(10) > axes.y(20), "up is more"
    assert axes.x(50) == pytest.approx((axes.x(0) + axes.x(100)) / 2)
    single = Axes([3.0], [5.0], "x", "y")
    assert single.x(3.0) == pytest.approx((single.left + charts.WIDTH - charts.GAP) / 2)


LARGE = [([0.0, 160000.0], [0.0, 12000.0]), ([0.0, 1.0], [-123456.0, 0.0]), ([119000.0, 120000.0], [0.00011, 0.00018]), ([0.0, 9.9], [1e6, 9e6]),
         ([1e7, 9e7], [99.0, 101.0])]  # fmt: skip


@pytest.mark.parametrize("xs, ys", LARGE)
def test_large_numbers_have_room(xs, ys):
    """At 0.64 em per character the labels end within the chart, right of the upright title, and do not touch each other."""
    svg = Axes(xs, ys, "x", "y").svg([])
    labels = [(float(x), anchor, text) for x, anchor, text in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)">([^<]*)<', svg)]
    upright = [x - charts.text_width(text) for x, anchor, text in labels if anchor == "end"]
    assert len(upright) >= 3 and min(upright) >= charts.TITLE - 0.1
    spans = [(x - charts.text_width(text) / 2, x + charts.text_width(text) / 2) for x, anchor, text in labels if anchor == "middle" and text != "x"]
    assert spans and spans[0][0] >= 0 and spans[-1][1] <= charts.WIDTH
    assert all(right < left for (_, right), (left, _) in zip(spans, spans[1:], strict=False))


def test_large_numbers_in_a_browser(tmp_path, window):
    path = tmp_path / "axes.html"
    path.write_text(charts.document("Axes", [Axes(xs, ys, "steps", "a title").svg([]) for xs, ys in LARGE]))
    window.get(path.as_uri())
    assert window.execute_script("return document.querySelectorAll('svg').length") == len(LARGE)
    check_page(window)


def test_the_page_in_a_browser(tmp_path, window, capsys):
    """From the command line: every line has the colour of its name, the page needs no other file, and nothing is cut off."""
    folders = [run_folder(tmp_path / name, seed, scale=scale, lr=lr) for name, seed, scale, lr in
               (("kd/seed0", 0, 300.0, 0.1), ("kd/seed1", 1, 310.0, 0.1), ("a < b", 0, 100.0, 0.2))]  # fmt: skip
    main([f"none={folders[2]}", *map(str, folders[:2]), "--output", str(tmp_path / "curves.html")])
    assert capsys.readouterr().out == f"3 runs: {tmp_path / 'curves.html'}\n"
    text = (tmp_path / "curves.html").read_text()
    assert not re.findall(r"https?://|@import|url\(", text) and set(re.findall(r'(?:src|href)="(.{5})', text)) == {"data:"}
    window.get((tmp_path / "curves.html").as_uri())
    colours = window.execute_script("return [...document.querySelectorAll('.legend span')].map(s => [s.textContent, s.firstChild.style.background])")
    assert [name for name, _ in colours] == ["none", f"{tmp_path / 'kd'} (2 seeds)"]
    drawn = window.execute_script("return [...document.querySelectorAll('svg')].map(s => [...s.querySelectorAll('polyline')].map(p => "
                                  "[p.textContent, getComputedStyle(p).stroke]))")  # fmt: skip
    assert len(drawn) == 5 and all(chart == colours for chart in drawn)
    check_page(window)
