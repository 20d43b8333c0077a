"""Every script starts: launchers and the recipes of scripts/reproduce build the command that their headers promise, and it is legal.

A stub in place of the interpreter prints the command line that a script ends in; the tests then resolve its options and build its
networks and losses in this process, on the meta device. A few scripts run for real.
"""

import csv
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losses import METHODS
from scripts import recipes
from tests.paths import REPOSITORY
from utils import session
from utils.options import train_options

SCRIPTS = sorted(REPOSITORY.glob("scripts/**/*.sh"))
SOURCED = ("distil.sh", "baseline.sh")  # what the recipes end in
RECIPES = [path for path in SCRIPTS if path.parent.name == "reproduce" and path.name not in SOURCED]
LAUNCHERS = {  # flags without which there is no dry run
    "train_baseline.sh": (),
    "train_kd.sh": ("--teacher-model", "deeplabv3", "--teacher-backbone", "resnet18"),  # else the checkpoint says it
}
MODELS = {"DeepLabV3": "deeplabv3", "DeepLabV3+": "deeplabv3plus", "PSPNet": "pspnet", "UPerNet": "upernet", "SegFormer": "segformer"}
BACKBONES = {
    "R18": "resnet18", "R101": "resnet101", "MBV2": "mobilenetv2", "MNv3-Small": "mobilenetv3_small", "MNv3-Large": "mobilenetv3_large",
    "B0": "mit_b0", "B4": "mit_b4",
}  # fmt: skip
DATASETS = {"Cityscapes": "citys", "Pascal VOC": "voc", "CamVid": "camvid", "ADE20K": "ade20k", "COCO-Stuff": "coco_stuff_182"}
ROWS = {"afdcd": "af-dcd", "kd": "kd|pixel kd", "skd": "skd|pixel", "ofd": "overhaul", "feature": "feature"}  # a method in the table
SPLITS = {"val": r"val", "test": r"test \(233\)|.*233-image test list", "the test server": r"test server$"}  # of a header -> of the table


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """An interpreter that prints its arguments, each with a NUL behind it."""
    path = tmp_path_factory.mktemp("stub") / "python"
    path.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    path.chmod(0o755)
    return path


def bash(*command, cwd, **variables) -> subprocess.CompletedProcess:
    """bash with these variables and no other ones that a script could read."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.run(["bash", *map(str, command)], cwd=cwd, env=environment | variables, capture_output=True, text=True)


def command_of(stub, *command, cwd, **variables) -> list[str]:
    """The arguments that the script gives to the interpreter."""
    done = bash(*command, cwd=cwd, **{"PYTHON": str(stub), "GPUS": "1"} | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def options_of(arguments: list[str]):
    """The options of a command line that a stub recorded, torchrun's part left out."""
    program = next(index for index, argument in enumerate(arguments) if argument.endswith(".py"))
    distil = Path(arguments[program]).name == "train_kd.py"
    return train_options(arguments[program + 1 :], distil=distil, description="")


@pytest.fixture(scope="module")
def recipe(stub, tmp_path_factory):
    """path -> options of a recipe's dry run, which is started from another folder and leaves nothing there."""

    @functools.cache
    def resolve(path):
        folder = tmp_path_factory.mktemp("elsewhere")
        options = options_of(command_of(stub, path, "--dry-run", cwd=folder))
        assert not list(folder.iterdir())
        return options

    return resolve


def header(path: Path) -> str:
    """The comment at the top, without the #."""
    lines = path.read_text().splitlines()[1:]
    return "\n".join(line[1:].removeprefix(" ") for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def commands(path: Path) -> list[str]:
    """The lines of the header to paste, continued ones joined, that start a training."""
    return re.findall(r"^  (.*bash scripts/(?:train|reproduce).*)", re.sub(r"\\\n\s+", "", header(path)), re.M)


def numbers(text: str) -> dict:
    """What a header's first sentence says: 'Af-DCD on CamVid: DeepLabV3-R101 -> PSPNet-R18, 360x360 crops, batch 16, 40k iterations, lr 0.02'.
    Without an arrow it is a network that is trained alone."""
    found = re.match(
        rf".+? on (?P<dataset>{'|'.join(DATASETS)})[^:]*: ((?P<teacher>\S+) -> )?(?P<student>\S+), (?P<height>\d+)x(?P<width>\d+) crops,\s"
        r"batch (?P<batch>\d+), (?P<iterations>\d+k?) iterations(, lr (?P<lr>[\d.e-]+), weight decay (?P<decay>[\d.e-]+))?\.\n",
        text,
    )
    assert found, f"unusual first sentence: {text[:150]}"
    said = found.groupdict()
    return said | {"iterations": said["iterations"].replace("k", "000")}


def network(name: str) -> tuple[str, str]:
    model, backbone = name.split("-", 1)
    return MODELS[model], BACKBONES[backbone]


def has_teacher(options) -> bool:
    """Whether the options are train_kd.py's."""
    return hasattr(options, "method")


# ------------------------------------------------------------------------------------------------------------------ all scripts


@named(SCRIPTS)
def test_parses(path):
    done = bash("-n", path, cwd=REPOSITORY)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert max(map(len, path.read_text().splitlines())) <= 140


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # pip puts it beside python


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install -r requirements-dev.txt")
def test_shellcheck(tmp_path):
    """Every script with what it sources; and the negative control, a script that goes on after a cd that failed."""
    check = [SHELLCHECK, "--external-sources", "--source-path=SCRIPTDIR", "--shell=bash", "--severity=warning"]
    done = subprocess.run([*check, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / "wrong.sh").write_text('cd "$1"\nrm -r build\n')
    done = subprocess.run([*check, tmp_path / "wrong.sh"], capture_output=True, text=True)
    assert done.returncode == 1 and "SC2164" in done.stdout


@named(SCRIPTS)
def test_is_executable_where_it_has_a_shebang(path):
    assert not path.read_text().startswith("#!") or os.access(path, os.X_OK), f"chmod +x {path.relative_to(REPOSITORY)}"


@named([*RECIPES, *(REPOSITORY / "scripts" / name for name in LAUNCHERS)])
def test_commands_in_the_header_are_legal(path, stub, tmp_path):
    """They run as they are pasted, and the options that come of it are legal."""
    (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    assert any(command.split(".sh")[0].endswith(path.stem) for command in commands(path)), "no command of its own to paste"
    for command in commands(path):
        options_of(command_of(stub, "-c", command, cwd=tmp_path))


@named(RECIPES)
def test_variables_in_the_header_are_read(path):
    text = "".join(line for line in path.read_text().splitlines(True) if not line.startswith("#"))
    sourced = [name for name in SOURCED if f'/{name}"' in text]
    assert len(sourced) == 1
    text += "".join((REPOSITORY / "scripts" / name).read_text() for name in ("environment.sh", f"reproduce/{sourced[0]}"))
    names = re.findall(r"\b[A-Z][A-Z_]+(?==)|(?<![/\w])[A-Z]+_[A-Z_]+\b", header(path))
    assert not [name for name in names if not re.search(rf"\${{?{name}\b", text)]


# ---------------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def one_of_each_model():
    """Networks are built once: a recipe's dry run does not change them."""
    patch = pytest.MonkeyPatch()
    for name in ("build_model", "count_macs"):
        patch.setattr(session, name, functools.cache(getattr(session, name)))
    yield
    patch.undo()


@named(RECIPES)
def test_dry_run(path, recipe, one_of_each_model, tmp_path, monkeypatch):
    """Networks and losses are built: terms are not counted twice, memories fit their limit. Nothing is read or written."""
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        session.train(recipe(path), torch.device("cpu"))
    assert not list(tmp_path.iterdir())


@named(RECIPES)
def test_header_says_what_runs(path, recipe):
    options, said = recipe(path), numbers(header(path))
    assert DATASETS[said["dataset"]] == options.dataset
    assert (options.student_model, options.student_backbone.removesuffix("_vanilla")) == network(said["student"])
    assert path.stem.split("_")[0] in ("student", "teacher", "lad") or said["teacher"]
    if said["teacher"]:
        assert (options.teacher_model, options.teacher_backbone.removesuffix("_vanilla")) == network(said["teacher"])
    else:
        assert not has_teacher(options) and options.label_assisted == path.stem.startswith("lad_")
    assert options.crop_size == (int(said["height"]), int(said["width"]))
    assert options.batch_size == int(said["batch"])
    assert options.max_iterations == int(said["iterations"])
    assert options.lr == float(said["lr"] or 0.02)
    assert options.weight_decay == float(said["decay"] or 1e-4)
    assert options.save_dir.startswith("runs/reproduce/") and options.resume


@named(RECIPES)
def test_header_tells_the_published_figure(path):
    text = " ".join(header(path).split())
    assert re.search(r"Published: mIoU \d|no published figure", text)
    assert "Not run by this project" in text or "Run by this project" in text


@functools.cache
def published() -> tuple[dict, ...]:
    with open(REPOSITORY / "scripts/published_results.csv", newline="") as file:
        return tuple(csv.DictReader(file))


def called(name: str, model: str, backbone: str) -> bool:
    """Whether the table's "DeepLabV3-R18 (random-init backbone)" is this network."""
    models = {value: key for key, value in MODELS.items()} | {"upernet_lite": "UPerNet"}
    backbones = {value: key for key, value in BACKBONES.items()}
    return name.split(" ")[0].lower() == f"{models[model]}-{backbones[backbone.removesuffix('_vanilla')]}".lower()


def width(row: dict, name: str) -> int | None:
    """--head-width of a network in a row: the source says of CIRKDv2 that its DeepLabV3 on ResNets have 512 channels."""
    return 512 if row["codebase"] == "CIRKD v2" and name.startswith("DeepLabV3-R") else None


def trained_so(row: dict, options) -> bool:
    """Whether a row's settings are those of the options. What it gives in words ("120 epochs", "mmseg default") or not at all is not compared."""
    weight_decay = re.search(r"wd *([\d.e-]+)", row["lr"])
    stated = {
        "crop_size": (row["crop"], lambda text: tuple(map(int, text.split("x")))), "batch_size": (row["batch"].split(" ")[0], int),
        "max_iterations": ("" if "epochs" in row["iterations"] else row["iterations"], int), "lr": (row["lr"].split(" ")[0], float),
        "weight_decay": (weight_decay[1] if weight_decay else "", float),
        "optimizer": ("1adamw" if "AdamW" in row["lr"] else "1sgd" if "SGD" in row["lr"] else "", lambda text: text[1:]),
    }  # fmt: skip
    return all(getattr(options, name) == value(text) for name, (text, value) in stated.items() if text[:1].isdigit())


def on_record(recipe: str, options, miou: str, split: str, alone: str | None = None, teacher: str | None = None) -> bool:
    """Whether the table of published results has this figure of this network on this split, from a training with these options.

    The first word of the recipe's name says what `miou` is: a method's, and `alone` and `teacher` ("" for none) have to stand beside it,
    where they are given; a student's without a teacher; or a teacher's, of which the table has no settings.
    """
    method = recipe.split("_")[0]
    dataset = next(name for name, own in DATASETS.items() if own == options.dataset).removeprefix("Pascal ")
    network = options.student_model, options.student_backbone

    def agrees(row):
        if not row["dataset"].startswith(dataset) or not re.match(SPLITS[split], row["split"]):
            return False
        if method == "teacher":
            return row["teacher_miou"] == miou and called(row["teacher"], *network) and options.student_head_width == width(row, row["teacher"])
        if not called(row["student"], *network) or not trained_so(row, options) or options.student_head_width != width(row, row["student"]):
            return False
        if method == "student":
            return row["student_baseline_miou"] == miou
        if not re.match(rf"({ROWS.get(method, method)})\b", row["method"].lower()):
            return False
        beside = {"student_baseline_miou": alone, "teacher_miou": teacher}
        same = "same network" in row["teacher"] and network == (options.teacher_model, options.teacher_backbone)  # LAD
        return row["distilled_miou"] == miou and all(row[key] == value for key, value in beside.items() if value is not None) and (
            same or called(row["teacher"], options.teacher_model, options.teacher_backbone)
        )  # fmt: skip

    return any(map(agrees, published()))


@named(RECIPES)
def test_published_figure_is_on_record_with_these_settings(path, recipe):
    text, options = " ".join(header(path).split()), recipe(path)
    found = re.search(r"Published: mIoU ([\d.]+)(?: \([^()]+\))? on (val|test|the test server)(?: \(([^()]+)\))?\.(?= |$)", text)
    if found is None:
        assert "no published figure" in text
        pytest.skip("no published figure")
    miou, split, beside = found.groups()
    if not has_teacher(options):
        assert beside is None and on_record(path.stem, options, miou, split)
        return
    alone, teacher = (re.search(pattern, beside) for pattern in (r"alone ([\d.]+)", r"teacher ([\d.]+)"))
    own = re.search(r"(\S+) alone", beside)
    assert own[1] in (numbers(header(path))["student"], "student"), "the student alone is another network"
    assert on_record(path.stem, options, miou, split, alone[1] if alone else "", teacher[1] if teacher else "")


VARIABLE = r'[A-Z]+(?:_[A-Z]+)*=(?:"[^"]*"|[\w.-]+)'


def other_figures(path: Path) -> list[tuple[dict[str, str], str, str | None, str | None, str | None]]:
    """What a header says of further rows of the same recipe: (variables, mIoU, split or None for that of the first figure, student alone,
    teacher), from 'MODEL=pspnet: 65.42 on the test server (62.78 alone)' and 'On the test server: 73.45 (72.36, teacher 77.46)'."""
    text, found = " ".join(header(path).split()), []
    pattern = rf"({VARIABLE}(?: {VARIABLE})*): (\d+\.\d+)(?: on (the test server))?(?: \(([\d.]+) alone\))?"
    for variables, miou, split, alone in re.findall(pattern, text):
        pairs = re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', variables)
        found.append(({name: quoted or plain for name, quoted, plain in pairs}, miou, split or None, alone or None, None))
    for miou, beside in re.findall(r"On the test server: (\d+\.\d+)(?: \(([^()]+)\))?", text):
        alone, teacher = re.match(r"([\d.]+)", beside), re.search(r"teacher ([\d.]+)", beside)
        found.append(({}, miou, "the test server", alone and alone[1], teacher and teacher[1]))
    return found


@named([path for path in RECIPES if other_figures(path)])
def test_other_figures_are_on_record_with_their_variables(path, stub, tmp_path):
    """The script runs with the variables, and a row of the table has the figure with what comes of them."""
    first = re.search(r"Published: mIoU .*? on (val|test|the test server)\b", " ".join(header(path).split()))[1]
    for variables, miou, split, alone, teacher in other_figures(path):
        options = options_of(command_of(stub, path, "--dry-run", cwd=tmp_path, **variables))
        assert on_record(path.stem, options, miou, split or first, alone, teacher), (variables, miou)
        folders = {options_of(command_of(stub, path, "--dry-run", cwd=tmp_path, **chosen)).save_dir for chosen in ({}, variables)}
        assert len(folders) == 2 or not {"MODEL", "BACKBONE"} & set(variables), "two networks in one folder"


@named(RECIPES)
def test_every_figure_is_in_the_table(path, recipe):
    """Whatever a header says in passing: no number between 20 and 90 with decimals is anything but a figure of this data set's rows."""
    dataset = next(name for name, own in DATASETS.items() if own == recipe(path).dataset).removeprefix("Pascal ")
    number = r"(?<![\d.])[2-8]\d\.\d{1,3}(?![\d.]*\d)"
    known = {figure for row in published() if row["dataset"].startswith(dataset) for cell in row.values() for figure in re.findall(number, cell)}
    assert not set(re.findall(number, header(path))) - known


def test_table_of_recipes_is_current():
    found = recipes.recipes()
    assert (recipes.HERE / "README.md").read_text(encoding="utf-8") == recipes.page(found), "run: python -m scripts.recipes"
    assert {recipe.name for recipe in found} == {path.stem for path in RECIPES}
    (row,) = (recipe for recipe in found if recipe.name == "student_voc_deeplabv3plus")  # its first sentence has two lines
    assert row[1:] == ("The student of AICSD alone", "Pascal VOC (augmented)", "DeepLabV3+-R18",
                       "513x513 crops, batch 6, 29280 iterations, lr 0.007, weight decay 5e-4", "67.50 on val")  # fmt: skip


def test_a_header_without_its_first_sentence_is_refused(tmp_path):
    (tmp_path / "kd_x.sh").write_text("#!/usr/bin/env bash\n# KD of something.\n\nMETHOD=kd\n")
    with pytest.raises(ValueError, match="kd_x.sh: its first sentence is not 'METHOD on DATA SET: NETWORKS, SETTING.'"):
        recipes.read(tmp_path / "kd_x.sh")


def test_wrong_figures_are_not_on_record(recipe):
    """The negative control of the two tests above: another figure, split, network, data set or setting."""
    alone, distilled = "student_citys_deeplabv3_resnet18", "cirkd_citys_deeplabv3_resnet18"
    options = recipe(REPOSITORY / f"scripts/reproduce/{alone}.sh")
    assert on_record(alone, options, "74.21", "val") and on_record(alone, options, "73.45", "the test server")
    assert not any(on_record(alone, options, miou, "val") for miou in ("74.12", "73.45", "75.42"))
    changes = {"student_model": "pspnet", "student_backbone": "mobilenetv2", "dataset": "voc", "crop_size": (512, 512), "batch_size": 8,
               "max_iterations": 80000, "lr": 0.01, "weight_decay": 2e-4, "optimizer": "adamw", "student_head_width": 512}  # fmt: skip
    for name, value in changes.items():
        assert not on_record(alone, type(options)(**vars(options) | {name: value}), "74.21", "val"), name
    options = recipe(REPOSITORY / f"scripts/reproduce/{distilled}.sh")
    assert on_record(distilled, options, "76.38", "val", "74.21", "78.07")
    assert not on_record(distilled, options, "74.21", "val") and not on_record(alone.replace("student", "ifvd"), options, "76.38", "val")
    assert not on_record(distilled, options, "76.38", "val", "74.12") and not on_record(distilled, options, "76.38", "val", None, "77.46")
    assert not on_record(distilled, type(options)(**vars(options) | {"teacher_model": "pspnet"}), "76.38", "val")


PROMISES = {  # recipe: options of the training, options of methods
    "afdcd_camvid_pspnet_resnet18": ({"lr_floor": 0}, {"afdcd.fd_weight": 8e-6, "afdcd.contrast_weight": 1e-2, "afdcd.kd_weight": 1}),
    "aicsd_voc_deeplabv3plus": (
        {"student_normalization": "imagenet", "student_model": "deeplabv3plus"}, {"aicsd.ics_weight": 9500, "aicsd.upsample": True},
    ),
    "cirkd_citys_segformer_b0": ({"optimizer": "adamw", "lr": 2e-4}, {"cirkd.pixel_queue": 2000, "cirkd.memory_pixel_weight": 0.1}),
    "cirkd_voc_deeplabv3_resnet18": ({"student_head_after_dropout": True}, {"cirkd.memory_pixel_weight": 0.01, "cirkd.released_queue": True}),
    "cirkdv2_citys_deeplabv3_resnet18": ({"student_head_width": 512}, {"cirkdv2.fitnet_weight": 1, "cirkdv2.channel_mse_weight": 100}),
    "cirkdv2_citys_mobilenetv3_small": ({"student_head_width": None}, {"cirkdv2.fitnet_weight": 10, "cirkdv2.memory_pixel_weight": 0.1}),
    "cirkdv2_citys_segformer_b0": ({"optimizer": "adamw"}, {"cirkdv2.pixel_queue": 2000, "cirkdv2.memory_channel_weight": 0.1}),
    "cirkdv2_voc_mobilenetv3_large": ({}, {"cirkdv2.fitnet_weight": 10, "cirkdv2.memory_region_weight": 0.01}),
    "cwd_citys_deeplabv3_resnet18": (
        {"loss_norm": "local", "aux_weight": 0.4},
        {"cwd.logits_weight": 0, "cwd.head_weight": 50, "skd.kd_weight": 1, "skd.pairwise_weight": 0, "skd.adversarial_weight": 1e-3,
         "skd.critic_weight": 0.1},
    ),
    "cwd_citys_pspnet_resnet18_original": ({"lr": 0.01}, {"cwd.logits_weight": 3, "cwd.logits_temperature": 4, "cwd.head_weight": 0}),
    "cwd_citys_segformer_b0": ({}, {"cwd.logits_weight": 0.3, "cwd.head_weight": 5, "skd.kd_weight": 1, "skd.adversarial_weight": 1e-3}),
    "cwd_voc_resnet18": ({}, {"cwd.logits_weight": 0, "cwd.head_weight": 50, "skd.kd_weight": 1, "skd.adversarial_weight": 1e-3}),
    "dist_citys_deeplabv3_resnet18": ({"weight_decay": 5e-4, "lr_floor": 1e-4}, {"dist.aux_weight": 0.4}),
    "ifvd_citys_pspnet_resnet18_original": ({}, {"ifvd.weight": 200, "ifvd.adversarial_weight": 0, "skd.objective": "wgan-gp"}),
    "lad_voc_resnet18_student": ({"lr": 0.001, "aux_weight": 0.02}, {"cwd.logits_weight": 3, "cwd.logits_temperature": 4}),
    "lad_voc_resnet18_teacher": ({"label_assisted": True, "aux_weight": 0.4}, {}),
    "maskd_citys_deeplabv3_mobilenetv2": ({"weight_decay": 2e-4, "lr_floor": 1e-4}, {"maskd.logits_weight": 1}),
    "mgd_citys_deeplabv3_resnet18": ({}, {"mgd.weight": 2e-5, "cwd.logits_weight": 3}),
    "skd_camvid_resnet18": ({}, {"skd.form": "cirkd", "skd.pairwise_weight": 10, "skd.adversarial_weight": 1e-3}),
    "skd_citys_pspnet_resnet18_original": ({"weight_decay": 5e-4}, {"skd.kd_weight": 80, "skd.pairwise_weight": 0.5, "skd.penalty": 10}),
    "student_citys_deeplabv3_resnet18": (
        {"loss_norm": "local", "aux_weight": 0.4, "lr_floor": 0, "student_normalization": "caffe-bgr", "student_head_width": None,
         "student_pretrained_base": "resnet18-imagenet.pth"}, {},
    ),
    "student_citys_deeplabv3_resnet18_cirkdv2": ({"student_head_width": 512, "lr": 0.01}, {}),
    "student_citys_segformer_b0": ({"optimizer": "adamw", "weight_decay": 1e-4, "student_pretrained_base": "mit_b0.pth"}, {}),
    "student_voc_deeplabv3plus": ({"student_normalization": "imagenet", "student_backbone": "resnet18_vanilla", "head_lr_factor": 10}, {}),
    "teacher_citys_deeplabv3_resnet101": ({"student_head_width": None, "batch_size": 8, "label_assisted": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMISES)
def test_promised_values(name, recipe):
    options = recipe(REPOSITORY / "scripts/reproduce" / f"{name}.sh")
    training, methods = PROMISES[name]
    assert {key: getattr(options, key) for key in training} == training
    assert {key: getattr(options.methods[key.split(".")[0]], key.split(".")[1]) for key in methods} == methods
    # a published value that a method may change its mind about stands in the script
    assert all(options.sources[key] == "command line" for key, value in methods.items() if value)


def test_every_method_has_a_recipe(recipe):
    used = {name for path in RECIPES for name in recipe(path).methods}
    assert not set(METHODS) - used


@named([path for path in RECIPES if not re.match("student|teacher", path.stem)])
def test_the_student_alone_has_a_recipe(path, recipe):
    """The figure that a header quotes of the student alone stands in a student_*.sh of the same network and data set."""
    beside = re.search(r"Published: [^()]+\(?[^()]*\)?[^()]+\(\S+ alone ([\d.]+),", " ".join(header(path).split()))
    if beside is None:
        pytest.skip("no figure of the student alone")
    options = recipe(path)
    pattern = f"student_{path.stem.split('_')[1]}"  # the data set's first word
    texts = [" ".join(header(other).split()) for other in RECIPES if other.stem.startswith(pattern) and same_student(recipe(other), options)]
    assert any(re.search(rf"(?<![\d.]){re.escape(beside[1])}(?!\d)", text) for text in texts)


def same_student(one, other) -> bool:
    return (one.student_model, one.student_backbone, one.dataset) == (other.student_model, other.student_backbone, other.dataset)


# ---------------------------------------------------------------------------------------------------------------------- launching


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_dry_run(name, stub, one_of_each_model, tmp_path, monkeypatch):
    options = options_of(command_of(stub, REPOSITORY / "scripts" / name, "--dry-run", *LAUNCHERS[name], cwd=tmp_path))
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        session.train(options, torch.device("cpu"))
    assert not list(tmp_path.iterdir())


REAL = {
    "train_baseline.sh": ("network: deeplabv3-resnet18", {}),
    "eval.sh": ("missing.pth", {"CHECKPOINT": "missing.pth"}),
    "reproduce/cwd_citys_deeplabv3_resnet18.sh": ("50 cwd/head + 1 skd/kd + 0.001 skd/adversarial + 0.1 skd/critic", {}),
}


@pytest.mark.parametrize("name", REAL)
def test_dry_run_for_real(name, tmp_path):
    shown, variables = REAL[name]
    variables |= {"PYTHON": sys.executable, "GPUS": "1", "OMP_NUM_THREADS": "1"}
    done = bash(REPOSITORY / "scripts" / name, "--dry-run", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shown in done.stdout
    assert not list(tmp_path.iterdir())


def test_torchrun_on_several_gpus(stub, tmp_path):
    arguments = command_of(stub, REPOSITORY / "scripts/train_baseline.sh", "--amp", "bf16", cwd=tmp_path, GPUS="4")
    program = str(REPOSITORY / "train_baseline.py")
    assert arguments[:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", program]
    assert arguments[-2:] == ["--amp", "bf16"]


def test_torchrun_on_several_nodes(stub, tmp_path):
    path = REPOSITORY / "scripts/train_kd.sh"
    arguments = command_of(stub, path, cwd=tmp_path, GPUS="8", NNODES="2", NODE_RANK="1", MASTER_ADDR="first", METHOD="kd")
    program = str(REPOSITORY / "train_kd.py")
    assert arguments[:13] == ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "1", "--master-addr", "first",
                              "--master-port", "29500", "--nproc-per-node", "8", program]  # fmt: skip
    one_each = command_of(stub, path, cwd=tmp_path, GPUS="1", NNODES="2", NODE_RANK="0", MASTER_ADDR="first", MASTER_PORT="1234")
    assert one_each[8:12] == ["--master-port", "1234", "--nproc-per-node", "1"]  # one process per node is still two


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_a_node_says_what_it_lacks(missing, stub, tmp_path):
    variables = {"PYTHON": str(stub), "GPUS": "1", "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "first"}
    del variables[missing]
    done = bash(REPOSITORY / "scripts/train_baseline.sh", cwd=tmp_path, **variables)
    assert done.returncode and f"set {missing}" in done.stderr


@pytest.mark.parametrize("script", ["train_kd.sh", "reproduce/kd_citys_deeplabv3_resnet18.sh"])
def test_paths_with_spaces(script, stub, tmp_path):
    """The repository's, the data's, the teacher's and the run's; flags given to the script come last and win."""
    copy = tmp_path / "my repository"
    shutil.copytree(REPOSITORY / "scripts", copy / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    paths = {"DATA": "/my data/a set", "TEACHER": "my runs/best.pth", "SAVE_DIR": "my runs/kd run"}
    arguments = command_of(stub, copy / "scripts" / script, "--seed", "3", "--lr", "0.5", cwd=tmp_path, DATASET="camvid", **paths)
    assert arguments[0] == str(copy / "train_kd.py")
    options = options_of(arguments)
    assert [options.data, options.teacher_checkpoint, options.save_dir] == list(paths.values())
    assert (options.seed, options.lr) == (3, 0.5)


def test_several_methods(stub, tmp_path):
    arguments = command_of(stub, REPOSITORY / "scripts/train_kd.sh", cwd=tmp_path, METHOD="kd cwd", DATASET="camvid", DATA="/data/camvid")
    assert arguments[1:4] == ["--method", "kd", "cwd"]
    assert options_of(arguments).save_dir == "runs/camvid/deeplabv3-mobilenetv2-kd+cwd"


def test_variables_of_a_recipe(stub, tmp_path):
    variables = {"FD_WEIGHT": "4e-6", "CROP": "400 800", "BATCH": "4", "STUDENT": "student.pth", "HEAD_WIDTH": "64", "LOSS_NORM": "global"}
    options = options_of(command_of(stub, REPOSITORY / "scripts/reproduce/afdcd_citys_resnet18.sh", "--dry-run", cwd=tmp_path, **variables))
    assert (options.crop_size, options.batch_size, options.student_pretrained, options.student_head_width) == ((400, 800), 4, "student.pth", 64)
    assert (options.methods["afdcd"].fd_weight, options.loss_norm) == (4e-6, "global")


@pytest.mark.slow
def test_quickstart(tmp_path):
    """In a copy of the repository, in a folder with a space; the second run finds everything done."""
    copy = tmp_path / "my copy"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache"))
    variables = {"PYTHON": sys.executable, "TEACHER_STEPS": "2", "STUDENT_STEPS": "1", "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    first = bash(copy / "scripts/quickstart.sh", cwd=tmp_path, **variables)
    assert first.returncode == 0, first.stdout + first.stderr
    output = copy / "runs/quickstart"
    table = (output / "summary.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:6]] == ["| teacher", "| student", "| student + KD", "| student + Af-DCD"]
    assert (output / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["my copy"]

    written = (output / "teacher/last.pth").stat().st_mtime_ns
    second = bash(copy / "scripts/quickstart.sh", cwd=tmp_path, **variables)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("done already") == 4
    assert (output / "teacher/last.pth").stat().st_mtime_ns == written
