"""scripts/similarity.py: maps against brute force, marks on the right pixel, the sheet and the page."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model
from models.weights import model_from_checkpoint
from scripts import similarity as tool
from scripts.similarity import MARK, Maps, colour, compare, correlation, draw_sheet, grid_points, main, marked, position, similarity
from tests.browser import check_page
from tests.workers import save_model
from utils import checkpoint

SIZE = 64, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks of stride 8, one of stride 32, one label-assisted, and a picture."""
    folder = tmp_path_factory.mktemp("similarity")
    for seed, name in enumerate(("teacher", "student")):
        save_model(folder / f"{name}.pth", seed)
    for name, config in (("coarse", {"model": "fcn", "backbone": "resnet18", "output_stride": 32}), ("assisted", {"model": "pspnet",
                         "backbone": "mobilenetv2", "in_channels": 4})):  # fmt: skip
        model = build_model(num_classes=8, head_width=8, **config)
        checkpoint.save(folder / f"{name}.pth", {"student": model.state_dict(), "step": 0, "metrics": {}, "config": {
            "model": model.config, "teacher": None, "dataset": "shapes", "options": {}}})  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BICUBIC).save(folder / "picture.png")
    return folder


def picture(folder) -> np.ndarray:
    return np.array(Image.open(folder / "picture.png"))


def test_maps_against_brute_force():
    features = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    features[:, 2, 1] = 0
    positions = [(0, 0), (2, 3), (1, 2), (2, 1)]
    found = similarity(features, positions).numpy()
    for number, (row, column) in enumerate(positions):
        a = features[:, row, column].numpy()
        for y in range(3):
            for x in range(4):
                b = features[:, y, x].numpy()
                norm = np.sqrt((a * a).sum() * (b * b).sum())
                assert found[number, y, x] == pytest.approx((a * b).sum() / norm if norm else 0, abs=1e-6)
        assert found[number, row, column] == pytest.approx(1 if number < 3 else 0, abs=1e-6)


def test_a_network_agrees_with_itself_and_is_1_at_the_point(folder):
    points = [(3, 5), (60, 90), (31, 48)]
    files = {"teacher": folder / "teacher.pth", "student": folder / "teacher.pth"}
    for field in ("head", "c4"):
        maps, _ = compare(files, field, picture(folder), points)
        model = model_from_checkpoint(folder / "teacher.pth")[0].eval()
        with torch.no_grad():
            wanted = getattr(model(torch.from_numpy(picture(folder)).permute(2, 0, 1)[None], (field,)), field)[0]
        assert maps[0].values.shape == (3, *wanted.shape[1:]) == (3, 8, 12)
        for number, (row, column) in enumerate(points):
            y, x = row // 8, column // 8
            assert maps[0].values[number, y, x] == pytest.approx(1, abs=1e-6)
            np.testing.assert_allclose(maps[0].values[number], torch.cosine_similarity(wanted, wanted[:, y, x, None, None], 0), atol=1e-5)
        assert tool.mean_agreement(maps) == {"student": pytest.approx(1)}


def test_correlation():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 5, 6)).astype(np.float32)
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-6)
    assert correlation(a, 0.1 * a + 0.5) == pytest.approx(1) and correlation(a, -a) == pytest.approx(-1)
    assert np.isnan(correlation(a, np.full_like(a, 0.3))) and tool.figures({"student": float("nan")}) == "student undefined (flat)"


def test_a_teacher_of_another_stride_is_resized_to_the_student(folder):
    """Its features are, bilinearly and before their similarity, as a distillation resizes them."""
    files = {"teacher": folder / "coarse.pth", "student": folder / "student.pth"}
    maps, reports = compare(files, "c4", picture(folder), [(10, 80)])
    assert [one.values.shape for one in maps] == [(1, 8, 12)] * 2 and reports[0].startswith("teacher: fcn resnet18")
    model = model_from_checkpoint(folder / "coarse.pth")[0].eval()
    with torch.no_grad():
        c4 = model(torch.from_numpy(picture(folder)).permute(2, 0, 1)[None], ("c4",)).c4
    assert c4.shape[-2:] == (2, 3)
    resized = torch.nn.functional.interpolate(c4, (8, 12), mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(maps[0].values[0], torch.cosine_similarity(resized, resized[:, 1, 10, None, None], 0), atol=1e-5)


def test_places_of_pixels():
    for pixel in range(96):
        assert position((0, pixel), SIZE, (8, 12)) == (0, pixel // 8)
    assert position((63, 95), SIZE, (9, 13)) == (8, 12) and position((0, 0), (1, 1), (1, 1)) == (0, 0)
    assert grid_points((60, 90), 3) == [(row, column) for row in (10, 30, 50) for column in (15, 45, 75)]
    assert grid_points((1, 1), 12) == [(0, 0)]


@pytest.mark.parametrize("point", [(20, 70), (0, 0), (63, 95)])
def test_the_mark_is_on_its_pixel(point):
    """The pixel has the colour of marks, and the ring around it is centred there."""
    image = np.full((*SIZE, 3), 100, np.uint8)
    drawn = marked(image, point)
    assert tuple(drawn[point]) == MARK and (image == 100).all()
    rows, columns = np.nonzero((drawn == MARK).all(-1))
    if point == (20, 70):
        assert (rows.min() + rows.max()) / 2 == 20 and (columns.min() + columns.max()) / 2 == 70 and len(rows) > 5
    assert (np.hypot(rows - point[0], columns - point[1]) < 5).all()


def test_the_sheet_shows_every_map_in_its_place(monkeypatch):
    """Two points, a teacher and two students: a column each, colours of the values, the mark on every picture, a figure per student."""
    shown = {}
    monkeypatch.setattr(tool, "sheet", lambda columns, classes, colours, notes: shown.update(columns=columns, classes=classes, notes=notes))
    values = np.array([[[1.0, 0.5], [0.25, 0.0]], [[0.0, 0.25], [0.5, 1.0]]], np.float32)
    maps = [Maps("teacher", values), Maps("student before", 1 - values), Maps("student after", 0.5 + values / 2)]
    image, points = np.full((40, 60, 3), 90, np.uint8), [(5, 10), (35, 50)]
    draw_sheet(maps, image, points)
    assert list(shown["columns"]) == ["picture", "teacher", "student before", "student after"]
    assert shown["classes"] == ["0.00", "0.20", "0.40", "0.60", "0.80", "1.00"]
    assert shown["notes"] == ["point 5,10: correlation with the teacher: student before -1.00, student after 1.00",
                              "point 35,50: correlation with the teacher: student before -1.00, student after 1.00"]  # fmt: skip
    for column, one in zip(list(shown["columns"].values())[1:], maps, strict=True):
        for number, (drawn, point) in enumerate(zip(column, points, strict=True)):
            assert drawn.shape == (40, 60, 3) and tuple(drawn[point]) == MARK
            for y, x in ((18, 2), (18, 57), (22, 2), (22, 57)):
                assert tuple(drawn[y, x]) == tuple(colour(one.values[number], 0.0)[y // 20, x // 30])


def test_colours_grow_with_the_similarity():
    shades = colour(np.linspace(-0.3, 1, 50), -0.3).astype(int)
    assert tuple(shades[0]) == tool.SCALE[0] and tuple(shades[-1]) == tool.SCALE[-1]
    light = shades @ [0.3, 0.59, 0.11]
    assert (np.diff(light) > 0).all(), "brighter is more alike, in grey, too"
    flat = [Maps("a", np.ones((1, 2, 2), np.float32))]
    assert tool.lowest(flat) == 0.9 and tool.lowest([Maps("a", np.full((1, 2, 2), -0.41))]) == -0.5


def arguments(folder, *more, output="out.png"):
    return ["--teacher", str(folder / "teacher.pth"), "--student", str(folder / "student.pth"), "--input", str(folder / "picture.png"),
            "--output", str(folder / output), *more]  # fmt: skip


def test_the_command_writes_a_sheet(folder, capsys):
    main(arguments(folder, "--points", "10,20", "50,90", "--before", str(folder / "coarse.pth"), "--field", "c4"))
    told = capsys.readouterr().out.splitlines()
    assert told[-2].startswith("c4, 8x12 places, mean correlation with the teacher over 2 points: student before ") and told[-1].endswith("out.png")
    with Image.open(folder / "out.png") as page:
        assert page.size == (4 * 246 + 6, 22 + 2 * (160 + 20) + 6 * 3 + 20)


def test_a_picture_of_one_pixel(folder):
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    given = arguments(folder, "--grid", "4", output="pixel_out.png")
    given[given.index(str(folder / "picture.png"))] = str(folder / "pixel.png")
    main(given)
    with Image.open(folder / "pixel_out.png") as page:
        assert page.width == 3 * 246 + 6


def test_what_is_refused(folder, capsys):
    (folder / "empty.png").touch()
    for changes, told in (
        ({"--points": "64,0"}, "--points 64,0: outside of the picture, which has rows 0 to 63 and columns 0 to 95"),
        ({"--points": "5"}, "--points 5: give Y,X, row and column in pixels, for example 120,300"),
        ({"--points": "-1,5"}, "--points -1,5: give Y,X"),
        ({"--grid": "0"}, "--grid 0: 1 to 32 are possible"),
        ({"--output": "out.jpg"}, "--output out.jpg: give a file that ends in .png, for a sheet, or .html"),
        ({"--output": str(folder / "no" / "out.png")}, "out.png: No such file or directory"),
        ({"--teacher": str(folder)}, "a folder; give the path of a checkpoint file"),
        ({"--student": str(folder / "none.pth")}, "none.pth: no such file"),
        ({"--teacher": str(folder / "assisted.pth")}, "assisted.pth: a label-assisted teacher sees the labels"),
        ({"--input": str(folder / "none.png")}, "none.png"),
        ({"--input": str(folder / "empty.png")}, "empty.png"),
        ({"--input": str(folder / "teacher.pth")}, "teacher.pth"),
    ):  # fmt: skip
        given = arguments(folder)
        where = {} if {"--points", "--grid"} & changes.keys() else {"--points": "1,1"}
        for flag, value in (where | changes).items():
            if flag in given:
                given[given.index(flag) + 1] = value
            else:
                given += [f"{flag}={value}"]
        with pytest.raises(SystemExit) as end:
            main(given)
        error = capsys.readouterr().err
        assert end.value.code == 2 and told in error and len(error.splitlines()) == 1, error


def test_too_many_points_for_a_page(folder, monkeypatch, capsys):
    monkeypatch.setattr(tool, "VALUES", 1000)
    with pytest.raises(SystemExit):
        main(arguments(folder, "--grid", "4", output="many.html"))
    assert "16 points of 96 places are too much for a page; at most 10 points are possible" in capsys.readouterr().err
    assert not (folder / "many.html").exists()


# --------------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def page(folder):
    main(arguments(folder, "--grid", "3", "--before", str(folder / "coarse.pth"), "--field", "c4", output="page.html"))
    return folder / "page.html"


def test_the_page_holds_the_maps(folder, page):
    """The PNGs inside, map by map, are the similarities in steps of 1/255; nothing is fetched."""
    text = page.read_text()
    assert not re.findall(r"https?://|@import|url\(", text) and len(text) < 300_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))
    points = grid_points(SIZE, 3)
    maps, _ = compare({name: folder / f"{name}.pth" for name in ("teacher", "coarse", "student")}, "c4", picture(folder), points)
    low = tool.lowest(maps)
    assert data["points"] == [list(point) for point in points] and data["places"] == [8, 12]
    for one, source in zip(maps, data["maps"], strict=True):
        (folder / "atlas.png").write_bytes(base64.b64decode(source.partition(",")[2]))
        shades = np.asarray(Image.open(folder / "atlas.png"))
        assert shades.shape == (24, 36)
        for number, values in enumerate(one.values):
            top, left = number // 3 * 8, number % 3 * 12
            np.testing.assert_allclose(low + shades[top : top + 8, left : left + 12] / 255 * (1 - low), values, atol=(1 - low) / 500)


def test_a_click_shows_the_maps_of_the_nearest_point(folder, page, window):
    shutil.copy(page, folder / "copy.html")
    window.get((folder / "copy.html").as_uri())
    window.set_script_timeout(30)
    window.execute_async_script("const done = arguments[0]; const look = () => document.body.dataset.ready ? done() : setTimeout(look, 20); look();")
    points = grid_points(SIZE, 3)
    maps, _ = compare({name: folder / f"{name}.pth" for name in ("teacher", "coarse", "student")}, "c4", picture(folder), points)
    low, told = tool.lowest(maps), "return document.getElementById('told').textContent"
    assert window.execute_script(told).startswith("point 32,48: "), "the middle"
    click = """const canvas = document.getElementById("picture"), box = canvas.getBoundingClientRect();
        const [y, x] = arguments, size = [canvas.height, canvas.width];
        canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + (x + .5) / size[1] * box.width,
                                                     clientY: box.top + (y + .5) / size[0] * box.height}));"""
    pixel = """const [y, x] = arguments;
        return [...document.querySelectorAll("canvas.map")].map(canvas => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data])"""
    for number, (row, column) in ((0, (2, 1)), (5, (30, 95)), (7, (60, 50))):
        window.execute_script(click, row, column)
        assert window.execute_script(told).startswith(f"point {points[number][0]},{points[number][1]}: correlation with the teacher: student before")
        for y, x in ((4, 92), (60, 4), (36, 20)):
            for one, found in zip(maps, window.execute_script(pixel, y, x), strict=True):
                np.testing.assert_allclose(found[:3], colour(one.values[number][y // 8, x // 8], low), atol=2)
    assert window.execute_script("return [...document.querySelectorAll('figcaption')].map(f => f.textContent)") == [
        "picture: click on it", "teacher", "student before", "student after"]  # fmt: skip
    check_page(window)
