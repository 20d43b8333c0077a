"""--tensorboard: what the event files hold is what metrics.jsonl holds, across stops and deaths, and never changes or ends a training."""

import io
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import Batch, get_spec, shapes
from tests.faults import small_disk
from tests.test_engine import batches, fit, prepared, rows, scores, stop_at
from tests.test_resume import differences
from tests.workers import RUN, TINY, train
from utils import board
from utils.board import Board
from utils.log import logger
from utils.metrics import Stopped
from utils.options import train_options
from utils.session import train as train_here

pytest.importorskip("tensorboard", reason="tensorboard is not installed (requirements-dev.txt)")

SHAPES = get_spec("shapes")


def read_board(folder: Path) -> tuple[dict, dict]:
    """({(step, tag): value}, {(step, tag): picture}) as TensorBoard shows them; a point that is there twice fails."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars, pictures = {}, {}
    for kind in ("train", "val"):
        events = EventAccumulator(str(folder / "tensorboard" / kind), {"scalars": 0, "images": 0}).Reload()
        for name, found, read in (("scalars", scalars, events.Scalars), ("images", pictures, events.Images)):
            for tag in events.Tags()[name]:
                for event in read(tag):
                    assert (event.step, tag) not in found, f"{tag} of step {event.step} is there twice"
                    assert tag.startswith(("val", "predictions")) == (kind == "val")
                    found[event.step, tag] = event.value if name == "scalars" else np.array(Image.open(io.BytesIO(event.encoded_image_string)))
    return scalars, pictures


def written(folder: Path) -> dict:
    """{(step, name): value} of metrics.jsonl, in float32 as event files are."""
    return {(row["step"], name): float(np.float32(value)) for row in rows(folder) for name, value in row.items()
            if name != "step" and value is not None}  # fmt: skip


def test_the_board_holds_what_the_metrics_hold(tmp_path):
    training, teacher, run = prepared(tmp_path, "--tensorboard", "--log-interval", "2", "--val-interval", "5")
    assert fit(training, teacher, batches(), run, scores)
    scalars, _ = read_board(tmp_path)
    assert scalars == written(tmp_path)
    for step in (2, 4, 6, 8, 10):
        assert {(step, name) for name in ("loss", "task/ce", "lr", "gradient_norm")} <= scalars.keys()
    for step in (5, 10):
        assert {(step, name) for name in ("val/mIoU", "val/aAcc", "val/mAcc", *(f"val_iou/{name}" for name in SHAPES.classes))} <= scalars.keys()


def test_without_the_flag_there_is_none(tmp_path):
    training, teacher, run = prepared(tmp_path)
    assert fit(training, teacher, batches(), run, scores)
    assert run.board is None and not (tmp_path / "tensorboard").exists()


def test_classes_that_are_absent_are_left_out(tmp_path):
    shown = Board(tmp_path / "tensorboard", 0, 0, SHAPES, [])
    shown.add(5, {"val/mIoU": 25.0, "val_iou/a": None, "val_iou/b": 50.0})
    assert read_board(tmp_path)[0] == {(5, "val/mIoU"): 25.0, (5, "val_iou/b"): 50.0}


def test_a_resume_leaves_no_row_twice_and_none_of_the_future(tmp_path):
    """Dies after step 9 with rows up to 8, goes on from step 5; then stopped in a validation and dead before its save, as in
    test_faults_run: what is left agrees with metrics.jsonl at every start."""
    class Killed(Exception):
        pass

    def kill(_):
        raise Killed

    def stopped(*_):
        raise Stopped

    flags = ("--tensorboard", "--log-interval", "1", "--val-interval", "5", "--save-interval", "100")
    training, teacher, run = prepared(tmp_path, *flags)

    def killed():
        for number, batch in enumerate(batches()):
            if number == 9:
                raise Killed
            yield batch

    with pytest.raises(Killed):
        fit(training, teacher, killed(), run, scores)
    assert max(step for step, _ in read_board(tmp_path)[0]) == 9
    training, teacher, run = prepared(tmp_path, *flags, "--resume")
    scalars, _ = read_board(tmp_path)
    assert scalars == written(tmp_path) and max(step for step, _ in scalars) == 5, "before the first new row, too"
    assert not fit(training, teacher, batches(5), run, stopped)
    training, teacher, run = prepared(tmp_path, *flags, "--resume")
    assert (training.step, training.validated) == (10, 5)
    run.save_last = kill
    with pytest.raises(Killed):
        fit(training, teacher, batches(10), run, scores)
    assert (10, "val/mIoU") in read_board(tmp_path)[0]
    training, teacher, run = prepared(tmp_path, *flags, "--resume")
    scalars, _ = read_board(tmp_path)
    assert (10, "val/mIoU") not in scalars and (10, "loss") in scalars and scalars == written(tmp_path)
    assert fit(training, teacher, batches(10), run, scores)
    scalars, _ = read_board(tmp_path)
    assert scalars == written(tmp_path) and len(list((tmp_path / "tensorboard" / "val").iterdir())) == 4


def test_a_resume_may_begin_or_leave_out_the_board(tmp_path):
    """The flag is none of the run's settings; a failed first start leaves nothing either."""
    shown = Board(tmp_path / "tensorboard", 0, 0, SHAPES, [])
    shown.add(7, {"loss": 1.0})
    flags = ("--log-interval", "1")
    training, teacher, run = prepared(tmp_path, *flags, "--tensorboard")
    assert read_board(tmp_path)[0] == {}
    assert not fit(training, teacher, stop_at(3, batches()), run, scores)
    training, teacher, run = prepared(tmp_path, *flags, "--resume")
    assert not fit(training, teacher, stop_at(2, batches(training.step)), run, scores)
    training, teacher, run = prepared(tmp_path, *flags, "--resume", "--tensorboard")
    assert fit(training, teacher, batches(training.step), run, scores)
    found = read_board(tmp_path)[0]
    missing = {step for step, name in written(tmp_path).keys() - found.keys()}
    assert found.items() <= written(tmp_path).items() and missing and max(missing) < 10


def test_pictures_are_the_same_ones_at_every_validation(tmp_path):
    """Evenly spaced ones, found in batches of any size, with label and prediction in the data set's colours."""
    names = [f"picture {number}" for number in range(10)]
    shown = Board(tmp_path / "tensorboard", 0, 0, SHAPES, names)
    assert list(shown.seen) == ["picture 0", "picture 3", "picture 6", "picture 9"]
    for step, labels in ((5, 1), (10, 2)):
        for chosen in (names[:4], names[4:]):
            image = torch.full((len(chosen), 3, 24, 32), 0, dtype=torch.uint8)
            for row, name in enumerate(chosen):
                image[row] = 25 * int(name.split()[1])
            target = torch.full((len(chosen), 24, 32), 3, dtype=torch.uint8)
            shown(Batch(image, target, chosen), torch.full_like(target, labels))
        shown.add(step, {"val/mIoU": 1.0})
    _, pictures = read_board(tmp_path)
    assert pictures.keys() == {(5, "predictions"), (10, "predictions")}
    palette = SHAPES.palette().astype(float)
    for (step, _), page in pictures.items():
        for row, value in enumerate((0, 75, 150, 225)):
            y = 22 + row * (180 + 6) + 90  # of the middle of the row on the sheet, whose pictures are 240x180
            middle = [page[y, 6 + column * 246 + 120].astype(float) for column in range(3)]
            for found, labels in zip(middle, (None, 3, 1 if step == 5 else 2), strict=True):
                wanted = [value] * 3 if labels is None else 0.45 * value + 0.55 * palette[labels]
                np.testing.assert_allclose(found, wanted, atol=6)  # JPEG


def test_the_training_does_not_know_of_the_board(tmp_path, monkeypatch):
    """The same weights, optimizer, scores and rows, bit for bit, with dropout and the pictures of two validations."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 40, "val": 5, "test": 2})
    given = [*TINY, *RUN, "--max-iterations", "4", "--val-interval", "2", "--workers", "0", "--ema", "0.9"]
    folders = [tmp_path / name for name in ("without", "with")]
    for folder, flags in zip(folders, ([], ["--tensorboard"]), strict=True):
        options = train_options([*given, "--save-dir", str(folder / "run"), *flags], distil=False, description="")
        train_here(options, torch.device("cpu"))
    assert differences(*folders) == []
    scalars, pictures = read_board(folders[1] / "run")
    assert scalars == written(folders[1] / "run") and {step for step, _ in pictures} == {2, 4}


def test_rank_0_alone_writes(tmp_path):
    started = train(tmp_path, "--max-iterations", "1", "--save-dir", "run", "--workers", "0", "--tensorboard", world=2)
    assert started.wait() == [0, 0], started.text
    scalars, pictures = read_board(tmp_path / "run")
    assert scalars == written(tmp_path / "run") and len(pictures) == 1
    for kind in ("train", "val"):
        (path,) = (tmp_path / "run" / "tensorboard" / kind).iterdir()
        assert path.name.endswith(f".{started.processes[0].pid}")


# ------------------------------------------------------------------------------------------------------------------------ faults


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("WARNING", "segkd"):
        yield lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def trains_to_the_end(folder: Path, change=None) -> list[dict]:
    training, teacher, run = prepared(folder, "--tensorboard", "--log-interval", "1", "--val-interval", "5")
    if change:
        change(run.board)
    assert fit(training, teacher, batches(), run, scores)
    clock = {"seconds", "images_per_second"}
    return [{key: value for key, value in row.items() if key not in clock} for row in rows(folder)]


def test_a_full_disk_under_the_board_costs_one_warning(tmp_path, warnings, capfd):
    """A real file system of 64 KiB that is full after some rows, under the event files alone."""
    good = trains_to_the_end(tmp_path / "good")
    with small_disk(tmp_path / "full" / "tensorboard", 64) as disk:
        (disk / "other").write_bytes(bytes(52 << 10))
        found = trains_to_the_end(tmp_path / "full", lambda shown: shown.add(0, {f"a tag with a long name {k}": 0.0 for k in range(300)}))
    assert found == good, "rows and weights are the same"
    assert warnings() == [f"{tmp_path / 'full' / 'tensorboard'}: cannot be written ([Errno 28] No space left on device); "
                          "going on without TensorBoard"]  # fmt: skip
    told = capfd.readouterr().err
    assert "Traceback" not in told and "Exception" not in told


def test_a_file_in_the_place_of_the_folder(tmp_path, warnings):
    (tmp_path / "tensorboard").touch()
    assert len(trains_to_the_end(tmp_path)) == 12
    assert len(warnings()) == 1 and "cannot be written" in warnings()[0]


def test_whatever_the_board_does_the_training_goes_on(tmp_path, warnings, monkeypatch):
    """A fault of the package or of our own, in pictures and in rows."""
    def fail(*_, **__):
        raise RuntimeError("sheet")

    monkeypatch.setattr(board, "sheet", fail)

    def see(shown):
        shown.seen = {"picture": (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8))}

    assert len(trains_to_the_end(tmp_path, see)) == 12
    assert warnings() == [f"{tmp_path / 'tensorboard'}: cannot be written (sheet); going on without TensorBoard"]
    assert {step for step, _ in read_board(tmp_path)[0]} == {1, 2, 3, 4, 5}


def test_without_the_package_one_line_before_any_work(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("utils.session.build_student", lambda *_: pytest.fail("work before the message"))
    start = partial(train_options, distil=False, description="")
    with pytest.raises(ValueError, match="^--tensorboard needs the package tensorboard .*: python -m pip install tensorboard; or drop the flag$"):
        train_here(start(["--tensorboard", "--save-dir", str(tmp_path / "run")]), torch.device("cpu"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(pytest.fail.Exception, match="work before"):
        train_here(start(["--save-dir", str(tmp_path / "run")]), torch.device("cpu"))


def test_the_settings_of_a_run_with_a_board_are_told(tmp_path):
    prepared(tmp_path, "--tensorboard")
    assert json.loads((tmp_path / "args.json").read_text())["options"]["tensorboard"] is True
