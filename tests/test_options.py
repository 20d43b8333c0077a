"""The command line: where every value comes from, and that every mistake is told in one line."""

import builtins
import dataclasses
import io
import re
import sys
from functools import partial

import pytest
import torch

from dataset import SPECS
from losses import METHODS, resolve
from tests.workers import script, start
from utils.options import eval_options, hyphenated, option_table, predict_options, train_options

READERS = {
    "train_baseline.py": partial(train_options, distil=False, description="about"),
    "train_kd.py": partial(train_options, distil=True, description="about"),
    "eval.py": partial(eval_options, description="about"),
    "scripts/predict.py": partial(predict_options, description="about"),
}


def baseline(*arguments):
    return train_options(["--save-dir", "run", *arguments], distil=False, description="")


def distil(*arguments):
    return train_options(["--save-dir", "run", "--teacher-checkpoint", "t.pth", *arguments], distil=True, description="")


def refused(capsys, reader, *arguments) -> str:
    """The message of a refused command line: one line, exit status 2."""
    with pytest.raises(SystemExit) as end:
        reader(*arguments)
    shown = capsys.readouterr()
    assert end.value.code == 2 and shown.out == ""
    assert shown.err.count("\n") == 1 and shown.err.endswith("\n"), shown.err
    return shown.err.strip()


# --------------------------------------------------------------------------------------------------------------- precedence


def test_precedence_and_sources():
    """--lr: command line > data set > default; likewise a method's option, and one whose default depends on another option."""
    options = baseline()
    assert (options.lr, options.sources["lr"]) == (SPECS["shapes"].recipe.lr, "data set shapes")
    assert (options.max_iterations, options.batch_size, options.crop_size) == (
        SPECS["shapes"].recipe.max_iterations, SPECS["shapes"].recipe.batch_size, SPECS["shapes"].crop)  # fmt: skip
    assert (options.momentum, options.seed, options.sources["seed"]) == (0.9, 0, "default")
    other = baseline("--dataset", "citys", "--data", "d", "--lr", "0.5", "--seed", "3")
    assert (other.lr, other.sources["lr"], other.seed) == (0.5, "command line", 3)
    assert (other.max_iterations, other.crop_size, other.sources["crop_size"]) == (40_000, (512, 1024), "data set citys")
    assert baseline("--dataset", "coco_stuff_164k", "--data", "d").max_iterations == 80_000


def test_precedence_of_a_method():
    def contrast(*arguments):
        options = distil("--method", "afdcd", *arguments)
        return options.methods["afdcd"].contrast_weight, options.sources["afdcd.contrast_weight"]

    camvid = ("--dataset", "camvid", "--data", "d")
    assert contrast(*camvid) == (1e-2, "data set camvid")
    assert contrast(*camvid, "--afdcd-normalise", "mean") == (0.16, "data set camvid")
    assert contrast(*camvid, "--afdcd-contrast-weight", "7") == (7.0, "command line")
    assert contrast()[1] == "data set shapes", "which normalises by the mean, whose table has an entry for it"
    assert contrast("--afdcd-normalise", "released") == (5e-3, "default")
    _, sources = resolve(METHODS["kd"], "shapes", {"temperature": 4.0})
    assert sources == {"weight": "default", "temperature": "command line", "mask_ignored": "default"}


def test_table_shows_every_value_with_its_source():
    text = option_table(distil("--method", "kd", "--lr", "0.5", "--kd-weight", "2", "--crop-size", "64", "96", "--resume"))
    rows = {line.split()[0]: re.split(" {2,}", line.strip())[1:] for line in text.splitlines()}
    assert rows["lr"] == ["0.5", "command line"] and rows["kd.weight"] == ["2", "command line"] and rows["kd.temperature"] == ["1", "default"]
    assert rows["crop_size"] == ["64 96", "command line"] and rows["resume"] == ["true", "command line"]
    assert rows["momentum"] == ["0.9", "data set shapes"]
    assert "None" not in text


def test_spellings():
    assert hyphenated("--max_iterations=my_file") == "--max-iterations=my_file" and hyphenated("my_file") == "my_file"
    assert baseline("--max_iterations", "7").max_iterations == baseline("--max-iterations=7").max_iterations == 7
    assert baseline("--model", "pspnet").student_model == baseline("--student-model", "pspnet").student_model == "pspnet"
    assert distil("--method", "kd", "--kd_mask_ignored").methods["kd"].mask_ignored


def test_booleans():
    assert baseline().channels_last is None and not baseline().resume and not baseline().ema
    assert baseline("--no-channels-last").channels_last is False and baseline("--channels-last").channels_last and baseline("--resume").resume
    assert distil("--method", "kd", "--no-kd-mask-ignored").methods["kd"].mask_ignored is False
    assert baseline().student_aux is None and baseline("--aux").student_aux and baseline("--no-aux").student_aux is False


def test_crop_size(capsys):
    assert baseline("--crop-size", "64").crop_size == (64, 64) and baseline("--crop-size", "64", "96").crop_size == (64, 96)
    message = refused(capsys, baseline, "--crop-size", "64", "96", "128")
    assert message == "train_baseline.py: error: --crop-size 64 96 128: give one number, or height and width"


def test_validation_interval():
    assert baseline("--max-iterations", "250").val_interval == 25 and baseline("--max-iterations", "3").val_interval == 1
    assert baseline("--val-interval", "7").val_interval == 7
    minutes = baseline("--max-minutes", "1.5", "--val-interval", "7")
    assert minutes.max_iterations is None and minutes.max_minutes == 1.5
    assert baseline("--max-minutes", "1.5").val_interval is None, "the engine validates as every tenth of the time is spent"


def test_plain_values_survive_a_checkpoint():
    plain = distil("--method", "kd", "afdcd", "--kd-weight", "0.5", "--afdcd-kd-weight", "0").plain()
    torch.save(plain, buffer := io.BytesIO())
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == plain
    assert plain["methods"]["kd"]["weight"] == 0.5 and "spec" not in plain and "sources" not in plain


# ------------------------------------------------------------------------------------------------------------------ refusals

DISTIL = ("--method", "kd")
REFUSED = {  # script, arguments, message
    "misspelt": ("train_baseline.py", ["--max-iteration", "5"], "unknown option --max-iteration; did you mean --max-iterations?"),
    "abbreviated": ("train_baseline.py", ["--batch", "4"], "unknown option --batch; did you mean --batch-size?"),
    "nothing like it": ("train_baseline.py", ["--zzzzzzzz", "5"], "unknown option --zzzzzzzz; --help lists all"),
    "nothing like it of a method": ("train_kd.py", ["--method", "kd", "cwd", "--zzzzzzzz"], "--zzzzzzzz; --method kd cwd --help lists all"),
    "nothing like it of no method": ("train_kd.py", ["--method", "a\nb", "--zzzzzzzz"], "--zzzzzzzz; --method NAME --help lists all"),
    "position": ("train_baseline.py", ["camvid"], "unexpected argument 'camvid'"),
    "no value": ("train_baseline.py", ["--lr"], "argument --lr: expected one argument"),
    "no number": ("train_baseline.py", ["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    "no whole number": ("train_baseline.py", ["--batch-size", "2.5"], "argument --batch-size: invalid int value: '2.5'"),
    "choice": ("train_baseline.py", ["--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
    "value for a flag": ("train_baseline.py", ["--resume=yes"], "argument --resume/--no-resume: ignored explicit argument 'yes'"),
    "too small": ("train_baseline.py", ["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    "negative": ("train_baseline.py", ["--lr", "-1"], "--lr -1.0: must be at least 0"),
    "one of two": ("train_baseline.py", ["--crop-size", "64", "0"], "--crop-size 0: must be at least 32"),
    "accumulate": ("train_baseline.py", ["--save-dir", "x", "--batch-size", "2", "--accumulate", "3"],
                   "--batch-size 2: must be a multiple of --accumulate 3"),
    "data of nothing": ("train_baseline.py", ["--save-dir", "x", "--data", "camvid"], "--data camvid: shapes has no files"),
    "data of a drawn checkpoint": ("eval.py", ["--checkpoint", "c", "--dataset", "shapes", "--data", "x"], "--data x: shapes has no files"),
    "not a number": ("train_baseline.py", ["--lr", "nan"], "--lr nan: must be at least 0"),
    "infinite": ("train_baseline.py", ["--max-minutes", "inf"], "--max-minutes inf: must be at least 0.001 and finite"),
    "dropout": ("train_baseline.py", ["--dropout", "1"], "--dropout 1.0: must be at least 0 and below 1"),
    "average": ("train_baseline.py", ["--ema", "1"], "--ema 1.0: must be at least 0 and below 1"),
    "data set": ("train_baseline.py", ["--dataset", "camvit"], "unknown data set 'camvit', possible: shapes, camvid"),
    "data set meant": ("train_baseline.py", ["--dataset", "camvit"], "did you mean camvid?"),
    "no data": ("train_baseline.py", ["--dataset", "voc"], "--data is missing: the folder of voc; http"),
    "both lengths": ("train_baseline.py", ["--max-iterations", "5", "--max-minutes", "1"], "--max-iterations and --max-minutes: give one of them"),
    "held out twice": ("train_baseline.py", ["--holdout", "0.2", "--select-holdout", "0.1"], "--holdout and --select-holdout: give one of them"),
    "all held out for the selection": ("train_baseline.py", ["--select-holdout", "1"], "--select-holdout 1.0: must be at least 0 and below 1"),
    "all held out": ("train_baseline.py", ["--holdout", "1"], "--holdout 1.0: must be at least 0 and below 1"),
    "no folder": ("train_baseline.py", [], "--save-dir is missing: the folder for log, metrics and checkpoints of this run"),
    "method's flag": ("train_baseline.py", ["--kd-weight", "1"], "unknown option --kd-weight"),
    "no method": ("train_kd.py", [], "--method is missing"),
    "method misspelt": ("train_kd.py", ["--method", "afdc"], "--method afdc: did you mean afdcd? possible are "),
    "method's misspelling first": ("train_kd.py", ["--metod", "kd"], "unknown option --metod; did you mean --method?"),
    "method twice": ("train_kd.py", ["--method", "kd", "kd"], "--method kd kd: names a method twice"),
    "other method's flag": ("train_kd.py", [*DISTIL, "--afdcd-tau", "1"], "--afdcd-tau belongs to afdcd, which is not in --method kd; add it"),
    "bare network": ("train_kd.py", [*DISTIL, "--backbone", "resnet18"], "unknown option --backbone; did you mean --student-backbone?"),
    "method's choice": ("train_kd.py", ["--method", "afdcd", "--afdcd-mask", "all"], "argument --afdcd-mask: invalid choice: 'all'"),
    "no checkpoint": ("eval.py", [], "--checkpoint is missing"),
    "momentum of adamw": ("train_baseline.py", ["--optimizer", "adamw", "--momentum", "0.5"], "--momentum 0.5: belongs to --optimizer sgd, "),
    "warm-up": ("train_baseline.py", ["--warmup-iterations", "9", "--max-iterations", "8"], "--warmup-iterations 9: must be at most "),
    "floor": ("train_baseline.py", ["--lr", "0.01", "--lr-floor", "0.1"], "--lr-floor 0.1: must be at most --lr, 0.01"),
    "seed": ("train_baseline.py", ["--seed", str(2**63)], "must be at least 0 and at most 9223372036854775807"),
    "scales": ("eval.py", ["--checkpoint", "c", "--dataset", "shapes", "--scales", "1000"], "--scales 1000.0: must be at least 0.05 and at most 10"),
    "another project's name": ("train_kd.py", ["--teacher-pretrained", "x"], "--teacher-pretrained; did you mean --teacher-checkpoint?"),
    "another project's weight": ("train_kd.py", ["--lambda_kd", "1"], "unknown option --lambda-kd; did you mean --kd-weight?"),
    "another project's weight of a method": ("train_kd.py", ["--method", "cirkd", "--lambda_kd", "1"], "; did you mean --cirkd-kd-weight?"),
    "another project's weight of the second method": ("train_kd.py", ["--method", "kd", "ifvd", "--lambda-adv", "1"],
                                                      "; did you mean --ifvd-adversarial-weight?"),
    "another project's rank": ("train_kd.py", ["--local_rank", "1"], "unknown option --local-rank; drop it: torchrun tells every process its rank"),
    "a name of another script": ("train_baseline.py", ["--lambda-kd", "1"], "unknown option --lambda-kd; "),
    "option of a term without weight": ("train_kd.py", ["--method", "cwd", "--cwd-head-temperature", "2"],
                                        "--cwd-head-temperature 2: nothing reads it with --cwd-head-weight 0; give that another value, or drop"),
    "option of terms without weight": ("train_kd.py", "--method afdcd --afdcd-fd-weight 0 --afdcd-contrast-weight 0 --afdcd-mask none".split(),
                                       "nothing reads it with --afdcd-fd-weight 0 and --afdcd-contrast-weight 0; give one another value, or drop"),
    "option of another option": ("train_kd.py", ["--method", "afdcd", "--afdcd-mask-ratio", "0.5", "--afdcd-mask", "centre"],
                                 "--afdcd-mask-ratio 0.5: belongs to --afdcd-mask random, --afdcd-mask is centre; add it, or drop the flag"),
    "switch that nothing reads": ("train_kd.py", "--method cirkd --cirkd-memory-pixel-weight 0 --no-cirkd-released-queue".split(),
                                  "--no-cirkd-released-queue: nothing reads it with --cirkd-memory-pixel-weight 0"),
    "option of several values": ("train_kd.py", "--method afdcd --afdcd-groups 8 --afdcd-negatives spatial".split(),
                                 "--afdcd-groups 8: belongs to --afdcd-negatives released or omni or channel, --afdcd-negatives is spatial"),
    "checkpoint gone": ("eval.py", ["--checkpoint", "gone.pth"], "gone.pth: no such file"),
    "scale": ("eval.py", ["--checkpoint", "c", "--dataset", "shapes", "--scales", "1", "0"], "--scales 0.0: must be at least 0.05"),
    "window": ("eval.py", ["--checkpoint", "c", "--dataset", "shapes", "--window", "1", "2", "3"], "--window 1 2 3: give one number, or height"),
    "stride": ("eval.py", ["--checkpoint", "c", "--dataset", "shapes", "--mode", "slide", "--window", "9", "--stride", "9", "10"],
               "--stride 9 10: must be at most the"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, capsys):
    name, arguments, message = REFUSED[case]
    complete = ["--save-dir", "run"] if name != "eval.py" and case != "no folder" else []
    found = refused(capsys, READERS[name], [*complete, *arguments])
    assert found.startswith(f"{name}: error: ") and message in found, found


@pytest.mark.parametrize("command", [["eval.py"], ["train_kd.py", "--method", "ked"], ["train_baseline.py", "--lr", "x"]])
def test_scripts_end_with_status_2_and_one_line(command, tmp_path):
    started = script(tmp_path, *command)
    assert started.wait() == [2] and started.text.count("\n") == 1
    assert started.text.startswith(f"{command[0]}: error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["console.txt"]


# ---------------------------------------------------------------------------------------------------------------------- help


def help_of(capsys, name: str, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        READERS[name]([*arguments, "--help"])
    shown = capsys.readouterr()
    assert end.value.code == 0 and not shown.err
    return shown.out


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def flags_of(*methods) -> set[str]:
    return {METHODS[name].flag(field.name) for name in methods for field in dataclasses.fields(METHODS[name].Options)}


@pytest.mark.parametrize("name", READERS)
def test_help_lists_every_option(name, capsys):
    text = help_of(capsys, name, *(["--method", *METHODS] if name == "train_kd.py" else []))
    flags = flags_in(text)
    known = {
        "train_baseline.py": baseline, "train_kd.py": partial(distil, "--method", "kd"),
        "eval.py": lambda: eval_options(["--checkpoint", "c", "--dataset", "shapes"], description=""),
        "scripts/predict.py": lambda: predict_options("--checkpoint c --dataset shapes --input i --output o".split(), description=""),
    }[name]()  # fmt: skip
    wanted = {f"--{key.replace('_', '-')}" for key in known.sources if "." not in key}
    if name == "train_kd.py":
        wanted |= flags_of(*METHODS)
    assert wanted <= flags, wanted - flags
    for nonsense in ("None", "SUPPRESS", "<class", "%(", "nan", "==", "Options", "{}", "object at"):
        assert nonsense not in text, re.findall(f".*{re.escape(nonsense)}.*", text)
    usage, _, rest = text.partition("\n\n")
    entries = re.findall(r"^  (--\S.*(?:\n {5,}\S.*)*)", rest, re.M)
    assert len(entries) >= len(wanted)
    required = {"--method", "--checkpoint", "--input"} | ({"--output"} if name == "scripts/predict.py" else set())
    for entry in (" ".join(entry.split()) for entry in entries):
        assert "(default: " in entry or entry.split()[0] in required or entry.startswith("--help"), entry


def test_help_shows_the_real_defaults(capsys):
    text = " ".join(help_of(capsys, "train_kd.py", "--method", "afdcd", "kd").split())
    assert "--afdcd-tau X temperature of the contrast (default: 0.07)" in text
    assert "--kd-temperature X softmax temperature T (default: 1)" in text
    assert "--save-interval N steps between saves of last.pth (default: 500)" in text
    assert "learning rate at the start (default: the data set's)" in text
    assert re.search(r"--afdcd-contrast-weight X .{0,120}camvid 0\.01.{0,300}with normalise mean: 0\.08", text)


def test_help_shows_the_flags_of_the_methods_named(capsys):
    """Without --method the general ones alone and all methods by name; --method may stand on either side of --help, and be written with =."""
    general = help_of(capsys, "train_kd.py")
    assert flags_in(general) & flags_of(*METHODS) == set() and len(general.splitlines()) < 250
    assert {"--method", "--teacher-checkpoint", "--student-backbone", "--lr", "--save-dir"} <= flags_in(general)
    for text, named in ((general, ()), (help_of(capsys, "train_kd.py", "--method", "cirkd", "kd"), ("cirkd", "kd"))):
        assert flags_in(text) - flags_in(general) >= flags_of(*named) == flags_in(text) & flags_of(*METHODS)
        assert re.findall(r"^(\w+): \S.*:$", text, re.M) == [*named], "a group per method named"
        last = " ".join(text.partition("\nmethods:\n")[2].split())
        assert last == f"{', '.join(METHODS)}. train_kd.py --method NAME --help shows the flags of the methods named."
    for arguments, named in ((["--help", "--method", "cirkd", "kd"], ("cirkd", "kd")), (["--method=cirkd", "-h"], ("cirkd",))):
        with pytest.raises(SystemExit):
            READERS["train_kd.py"](arguments)
        assert flags_in(capsys.readouterr().out) & flags_of(*METHODS) == flags_of(*named)


@pytest.mark.parametrize(("name", "line"), [
    ("train_kd.py", "train_kd.py --method METHOD [METHOD ...] [options]"), ("train_baseline.py", "train_baseline.py [options]"),
    ("eval.py", "eval.py --checkpoint NAME [options]"),
    ("scripts/predict.py", "python -m scripts.predict --checkpoint NAME --input NAME --output NAME [options]"),
])  # fmt: skip
def test_usage_is_one_line_with_what_is_required(name, line, capsys):
    assert help_of(capsys, name).startswith(f"usage: {line}\n\n")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--method", "afdc", "--help"], "--method afdc: did you mean afdcd? possible are "), (["-h", "--method", "kd", "kd"], "names a method twice"),
    (["--method", "--help"], "argument --method: expected at least one argument"),
])  # fmt: skip
def test_help_of_no_method_is_refused(arguments, message, capsys):
    assert message in refused(capsys, READERS["train_kd.py"], arguments)


# ------------------------------------------------------------------------------------------------------------------- dry run


def record_files():
    """Print every file that is opened from here on and is no program or library."""
    library = tuple({sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/etc", "/usr"})

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(library):
            if not arguments[0].endswith((".py", ".pyc")):
                builtins.print(f"OPENED {arguments[0]} {arguments[1]}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "socket.connect"):
            builtins.print(f"OPENED {event} {arguments}")

    sys.addaudithook(hook)


DRY = {
    "train_baseline.py": ["--backbone", "mobilenetv2", "--dataset", "citys", "--save-dir", "run", "--pretrained-base", "gone.pth"],
    "train_kd.py": ["--method", "kd", "--teacher-model", "pspnet", "--teacher-backbone", "resnet18", "--student-backbone", "mobilenetv2",
                    "--dataset", "voc", "--save-dir", "run", "--teacher-checkpoint", "gone.pth"],
    "eval.py": ["--checkpoint", "gone.pth", "--dataset", "ade20k", "--output", "out"],
}  # fmt: skip


@pytest.mark.parametrize("name", DRY)
def test_dry_run_reads_no_file_and_writes_nothing(name, tmp_path):
    started = script(tmp_path, name, *DRY[name], "--dry-run", "--device", "cpu", change=record_files)
    assert started.wait() == [0], started.text
    assert "OPENED" not in started.text
    assert [p.name for p in tmp_path.iterdir()] == ["console.txt"]
    assert re.search(r"crop_size|window", started.text) and "data set " in started.text and "command line" in started.text
    if name != "eval.py":
        assert "loss: 1 task/ce" in started.text and "M parameters" in started.text
    if name == "train_kd.py":
        assert "teacher: pspnet-resnet18" in started.text and "1 kd/kd" in started.text


def read_a_file(folder):
    record_files()
    (folder / "some.txt").read_text()


def test_the_recorder_of_files_works(tmp_path):
    (tmp_path / "some.txt").write_text("x")
    started = start(partial(read_a_file, tmp_path), tmp_path / "console.txt")
    assert started.wait() == [0] and f"OPENED {tmp_path / 'some.txt'} r" in started.text
