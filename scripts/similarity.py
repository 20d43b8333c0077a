"""What a student's features have learned of its teacher's: maps of cosine similarity to single points of a picture.

    python -m scripts.similarity --teacher runs/teacher/student_best.pth --student runs/afdcd/student_best.pth \\
        --before runs/student/student_best.pth --input street.png --points 200,310 90,40 --output similarity.png
    python -m scripts.similarity --teacher ... --student ... --input street.png --grid 12 --output similarity.html

For every point (row, column in pixels) a row: the picture with the point, then, network by network, how similar the feature there is to
that at every other place. A figure says how well a student's map follows the teacher's: their correlation over all places (1: the same but
for scale and offset). --before takes another student to compare with, such as one that was trained without the teacher.

FILE.png is a sheet; FILE.html is a page on which a click on the picture shows the maps of the nearest point of the grid.
"""

import argparse
import base64
import io
import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dataset.reading import read_image
from losses.functional import resize_like
from models.output import AUXILIARY, FIELDS
from models.weights import model_from_checkpoint
from scripts.charts import document, html_table
from utils.distill import is_label_assisted
from utils.log import harmless
from utils.run import write_text, writing
from utils.visualize import sheet

FEATURES = tuple(name for name in FIELDS if name not in ("logits", *AUXILIARY))
SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis: dark to bright, for all eyes
MARK = (255, 0, 80)
LARGEST = 32  # side of a grid
VALUES = 4_000_000  # of a network's maps on a page, which then has some megabytes


@dataclass(frozen=True)
class Maps:
    """Similarities of one network: (points, h, w) in [-1, 1]; the points' own positions are those of the grid of features."""

    title: str
    values: np.ndarray


def similarity(features: Tensor, positions: list[tuple[int, int]]) -> Tensor:
    """Cosine similarity of the features (C, h, w) at positions (row, column) to those everywhere: (number of positions, h, w).

    A feature of zeros, which a ReLU may leave, is similar to nothing: 0.
    """
    unit = torch.nn.functional.normalize(features.double().flatten(1), dim=0)
    chosen = unit[:, [row * features.shape[2] + column for row, column in positions]]
    return (chosen.T @ unit).clamp(-1, 1).unflatten(1, features.shape[1:]).float()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's of two maps over all places; nan where one of them is flat."""
    a, b = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (a, b))
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 1e-9 else float("nan")


def position(point: tuple[int, int], picture: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The place on a grid of features that holds a pixel; all are (row, column) or (height, width)."""
    return tuple(min(int((pixel + 0.5) * cells / size), cells - 1) for pixel, size, cells in zip(point, picture, grid, strict=True))


def grid_points(picture: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """The middles of count x count equal parts of a picture, in pixels, row by row."""
    rows, columns = ([int((k + 0.5) * size / count) for k in range(count)] for size in picture)
    return [(row, column) for row in dict.fromkeys(rows) for column in dict.fromkeys(columns)]  # a tiny picture has fewer


@torch.no_grad()
def features_of(path: str, field: str, image: np.ndarray) -> tuple[Tensor, str]:
    """(the feature (1, C, h, w) of a picture, the network's report) of a checkpoint.

    Raises:
        ValueError: see `model_from_checkpoint`; a network that sees labels, too; one without this feature.
    """
    model, found = model_from_checkpoint(path)
    if is_label_assisted(model):
        raise ValueError(f"{path}: a label-assisted teacher sees the labels, which a picture alone does not have; give another network")
    if field not in model.channels:
        have = ", ".join(name for name in FEATURES if name in model.channels)
        raise ValueError(f"--field {field}: {path} has none; possible: {have}")
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    return getattr(model.eval()(pixels, (field,)), field).float(), found


def compare(files: dict[str, str], field: str, image: np.ndarray, points: list[tuple[int, int]]) -> tuple[list[Maps], list[str]]:
    """(maps of every network, their reports). `files`: {title: checkpoint}, the student last; its grid is everybody's, to which other
    features are resized, as a distillation does with the teacher's."""
    found = {title: features_of(path, field, image) for title, path in files.items()}
    features = {title: feature for title, (feature, _) in found.items()}
    reference = list(features.values())[-1]
    places = [position(point, image.shape[:2], reference.shape[-2:]) for point in points]
    maps = [Maps(title, similarity(resize_like(feature, reference)[0], places).numpy()) for title, feature in features.items()]
    return maps, [f"{title}: {report.splitlines()[0]}" for title, (_, report) in found.items()]


def agreement(maps: list[Maps], point: int) -> dict[str, float]:
    """{title: correlation with the teacher's map} of the students at one point."""
    return {other.title: correlation(maps[0].values[point], other.values[point]) for other in maps[1:]}


def figures(values: dict[str, float]) -> str:
    return ", ".join(f"{title} {value:.2f}" for title, value in values.items()).replace("nan", "undefined (flat)")


def mean_agreement(maps: list[Maps]) -> dict[str, float]:
    """{title: mean of the correlations that are defined}."""
    table = [agreement(maps, point) for point in range(len(maps[0].values))]
    return {other.title: float(np.mean([row[other.title] for row in table if not np.isnan(row[other.title])] or [np.nan])) for other in maps[1:]}


# ------------------------------------------------------------------------------------------------------------------- pictures


def lowest(maps: list[Maps]) -> float:
    """The lower end of the colours: the lowest similarity on any map, rounded down to tenths; 1 is the upper end."""
    return min(float(np.floor(10 * min(m.values.min() for m in maps)) / 10), 0.9)


def colour(values: np.ndarray, low: float) -> np.ndarray:
    """Similarities from `low` to 1 as colours, uint8 (..., 3)."""
    place = (values - low) / (1 - low)
    knots = np.linspace(0, 1, len(SCALE))
    return np.stack([np.interp(place, knots, channel) for channel in zip(*SCALE, strict=True)], -1).round().astype(np.uint8)


def marked(picture: np.ndarray, point: tuple[int, int]) -> np.ndarray:
    """A copy of the picture with a ring around the pixel (row, column), and the pixel itself, in the colour of marks."""
    drawn = Image.fromarray(picture)
    draw, (row, column) = ImageDraw.Draw(drawn), point
    radius = max(2, round(max(picture.shape[:2]) / 50))
    for size, ink in ((radius + 1, (255, 255, 255)), (radius, MARK)):
        draw.ellipse((column - size, row - size, column + size, row + size), outline=ink, width=max(1, radius // 3))
    draw.point((column, row), MARK)
    return np.asarray(drawn)


def enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of colours at the size (height, width) of the picture, every place a block."""
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.NEAREST))


def draw_sheet(maps: list[Maps], image: np.ndarray, points: list[tuple[int, int]]) -> Image.Image:
    """A row per point: the picture, the maps, and the agreement below."""
    low, size = lowest(maps), image.shape[:2]
    columns = {"picture": [marked(image, point) for point in points]}
    for one in maps:
        columns[one.title] = [marked(enlarged(colour(values, low), size), point) for point, values in zip(points, one.values, strict=True)]
    notes = [f"point {row},{column}: correlation with the teacher: {figures(agreement(maps, number))}"
             for number, (row, column) in enumerate(points)]  # fmt: skip
    steps = np.linspace(low, 1, 6)
    return sheet(columns, [f"{step:.2f}" for step in steps], colour(steps, low), notes=notes)


# ------------------------------------------------------------------------------------------------------------------------ page


STYLE = """<style>
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
canvas { width: 100%; image-rendering: pixelated; display: block; } .maps figure { max-width: none; } #picture { cursor: crosshair; }
.scale { height: .8rem; max-width: 20rem; background: linear-gradient(to right, COLOURS); }
</style>"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent), picture = document.getElementById("picture");
const load = source => new Promise(done => { const image = new Image(); image.onload = () => done(image); image.src = source; });
const ring = (canvas, row, column) => {
  const draw = canvas.getContext("2d"), y = (row + .5) / data.size[0] * canvas.height, x = (column + .5) / data.size[1] * canvas.width;
  for (const [ink, width] of [["white", 5], ["rgb(255, 0, 80)", 2]]) {
    draw.beginPath(); draw.arc(x, y, canvas.width / 50, 0, 7); draw.strokeStyle = ink; draw.lineWidth = width * canvas.width / 600; draw.stroke();
  }
};
(async () => {
  const photo = await load(data.picture), shades = await Promise.all(data.maps.map(load));
  const [h, w] = data.places, canvases = [...document.querySelectorAll("canvas.map")];
  const show = number => {
    const [row, column] = data.points[number];
    picture.getContext("2d").drawImage(photo, 0, 0);
    ring(picture, row, column);
    canvases.forEach((canvas, which) => {
      const small = new OffscreenCanvas(w, h), draw = small.getContext("2d");
      draw.drawImage(shades[which], -(number % data.across) * w, -Math.floor(number / data.across) * h);
      const pixels = draw.getImageData(0, 0, w, h);
      for (let k = 0; k < pixels.data.length; k += 4) pixels.data.set(data.colours[pixels.data[k]], k);
      draw.putImageData(pixels, 0, 0);
      const large = canvas.getContext("2d");
      large.imageSmoothingEnabled = false;
      large.drawImage(small, 0, 0, canvas.width, canvas.height);
      ring(canvas, row, column);
    });
    document.getElementById("told").textContent = data.told[number];
  };
  const distance = (y, x, [row, column]) => (y - row) ** 2 + (x - column) ** 2;
  const nearest = (y, x) => data.points.reduce((best, point, k) => distance(y, x, point) < distance(y, x, data.points[best]) ? k : best, 0);
  picture.addEventListener("click", event => {
    const box = picture.getBoundingClientRect();
    const y = (event.clientY - box.top) / box.height * data.size[0] - .5, x = (event.clientX - box.left) / box.width * data.size[1] - .5;
    show(nearest(y, x));
  });
  show(nearest(data.size[0] / 2, data.size[1] / 2));
  document.body.dataset.ready = "yes";
})();
"""


def picture_url(picture: Image.Image, kind: str, **options) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def atlas(shades: np.ndarray, across: int) -> np.ndarray:
    """Maps (number, h, w) as one picture, `across` of them in a row."""
    number, height, width = shades.shape
    down = -(-number // across)
    full = np.concatenate([shades, np.zeros((down * across - number, height, width), shades.dtype)])
    return full.reshape(down, across, height, width).swapaxes(1, 2).reshape(down * height, across * width)


def draw_page(maps: list[Maps], image: np.ndarray, points: list[tuple[int, int]], reports: list[str]) -> str:
    """The page: the maps of every point, in steps of 1/255 of the scale, beside and below each other in a grey PNG per network.

    Raises:
        ValueError: too many points for a page that opens at once.
    """
    low, (height, width), count = lowest(maps), image.shape[:2], maps[0].values.size
    if count > VALUES:
        raise ValueError(f"{len(points)} points of {count // len(points)} places are too much for a page; "
                         f"at most {VALUES * len(points) // count} points are possible")  # fmt: skip
    across = math.isqrt(len(points) - 1) + 1
    shades = [atlas(((one.values - low) / (1 - low) * 255).round().clip(0, 255).astype(np.uint8), across) for one in maps]
    told = [f"point {row},{column}: correlation with the teacher: {figures(agreement(maps, number))}" for number, (row, column) in enumerate(points)]
    data = {
        "across": across, "size": [height, width], "places": maps[0].values.shape[1:], "points": points, "told": told,
        "colours": colour(np.linspace(low, 1, 256), low).tolist(), "picture": picture_url(Image.fromarray(image), "JPEG", quality=88),
        "maps": [picture_url(Image.fromarray(shade), "PNG") for shade in shades],
    }  # fmt: skip
    canvas = f'<canvas width="{width}" height="{height}" '
    frames = [f'<figure>{canvas}id="picture"></canvas><figcaption>picture: click on it</figcaption></figure>']
    frames += [f'<figure>{canvas}class="map"></canvas><figcaption>{escape(one.title)}</figcaption></figure>' for one in maps]
    gradient = ", ".join(f"rgb{ink}" for ink in SCALE)
    means = [[title, f"{value:.3f}"] for title, value in mean_agreement(maps).items()]
    return document("Similarity of features", [
        STYLE.replace("COLOURS", gradient), "<h1>Similarity of features</h1>", f'<div class="maps">{"".join(frames)}</div>',
        '<p id="told"></p>', f'<div class="scale"></div><p>cosine similarity to the point: {low:g} (left) to 1 (right)</p>',
        html_table(["student", f"correlation with the teacher, mean of {len(points)} points"], means),
        "<ul>" + "".join(f"<li>{escape(report)}</li>" for report in reports) + "</ul>",
        f'<script type="application/json" id="data">{json.dumps(data)}</script>',
    ], SCRIPT)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------ main


def parse_point(text: str, picture: tuple[int, int]) -> tuple[int, int]:
    """"Y,X" -> (row, column), which must be in the picture."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--points {text}: give Y,X, row and column in pixels, for example 120,300")
    row, column = map(int, parts)
    if row >= picture[0] or column >= picture[1]:
        raise ValueError(f"--points {text}: outside of the picture, which has rows 0 to {picture[0] - 1} and columns 0 to {picture[1] - 1}")
    return row, column


def run(options) -> str:
    """What is written, and a line of text about it."""
    output = options.output
    if output.suffix not in (".png", ".html") or output.is_dir():
        raise ValueError(f"--output {output}: give a file that ends in .png, for a sheet, or .html, for a page to click on")
    if options.grid is not None and not 1 <= options.grid <= LARGEST:
        raise ValueError(f"--grid {options.grid}: 1 to {LARGEST} are possible")
    image = read_image(options.input)
    size = image.shape[:2]
    points = [parse_point(text, size) for text in options.points] if options.points else grid_points(size, options.grid)
    files = {"teacher": options.teacher, "student before": options.before, "student after": options.student}
    if options.before is None:
        files = {"teacher": options.teacher, "student": options.student}
    maps, reports = compare(files, options.field, image, points)
    if output.suffix == ".html":
        write_text(output, draw_page(maps, image, points, reports))
    else:
        with writing(output):
            draw_sheet(maps, image, points).save(output)
    height, width = maps[0].values.shape[1:]
    return "\n".join([*reports, f"{options.field}, {height}x{width} places, mean correlation with the teacher over {len(points)} points: "
                                f"{figures(mean_agreement(maps))}", str(output)])  # fmt: skip


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.similarity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--teacher", required=True, metavar="FILE", help="checkpoint of the teacher: this project's or a published one")
    add("--student", required=True, metavar="FILE", help="checkpoint of the distilled student")
    add("--before", metavar="FILE", help="checkpoint of a student to compare with, such as one that was trained alone")
    add("--input", required=True, metavar="PICTURE", help="the picture")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--points", nargs="+", metavar="Y,X", help="row and column of points, in pixels")
    where.add_argument("--grid", type=int, metavar="N", help=f"N x N evenly spaced points, at most {LARGEST} x {LARGEST}")
    add("--field", default="head", choices=FEATURES, help="which feature: head, in front of the classifier, or a stage (default: head)")
    add("--output", type=Path, required=True, metavar="FILE", help="FILE.png: a sheet; FILE.html: a page to click on")
    options = parser.parse_args(argv)
    try:
        print(run(options))
    except ValueError as error:
        parser.exit(2, harmless(f"{parser.prog}: error: {error}\n"))


if __name__ == "__main__":
    main()
