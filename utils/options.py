"""Command line options: one spelling, true booleans, no abbreviations, and every value with its source.

Precedence: command line, then the data set's recipe (`dataset/specs.py`), then the default. A method's flags come from its
`Options` dataclass (`losses/base.py`); flags of a method that is not selected are refused.
"""

import argparse
import dataclasses
import difflib
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

from dataset import SPECS, Spec, get_spec
from dataset.cache import FOLDER, KINDS
from dataset.classes import voc_colour
from losses import METHODS, resolve
from losses.base import BOUNDS, check_bounds
from models import BACKBONES, MODELS, NORMALIZATIONS
from models.weights import read_state
from utils.log import harmless

SYNONYMS = {  # what other codebases call it; {} is a method that was given
    "--steps": "--max-iterations", "--epochs": "--max-iterations", "--learning-rate": "--lr", "--output-dir": "--save-dir", "--log-dir": "--save-dir",
    "--root": "--data", "--teacher-pretrained": "--teacher-checkpoint", "--pretrained": "--checkpoint", "--save-pred": "--save-predictions",
    "--model": "--student-model", "--backbone": "--student-backbone", "--aux": "--student-aux", "--no-cuda": "--device",
    "--lambda-kd": "--{}-kd-weight --kd-weight", "--lambda-fd": "--afdcd-fd-weight", "--lambda-ctr": "--afdcd-contrast-weight",
    "--lambda-minibatch-pixel": "--cirkd-minibatch-pixel-weight", "--lambda-memory-pixel": "--cirkd-memory-pixel-weight",
    "--lambda-memory-region": "--cirkd-memory-region-weight", "--lambda-cwd-fea": "--cwd-head-weight", "--lambda-cwd-logit": "--cwd-logits-weight",
    "--lambda-skd": "--skd-pairwise-weight", "--lambda-adv": "--{}-adversarial-weight", "--lambda-d": "--{}-critic-weight",
    "--lambda-ifv": "--ifvd-weight", "--lambda-fitnet": "--fitnet-weight", "--lambda-at": "--at-weight", "--lambda-psd": "--dsd-psd-weight",
    "--lambda-csd": "--dsd-csd-weight",
}  # fmt: skip
NEEDLESS = {  # what they need and this one does not
    "--gpu-id": "set CUDA_VISIBLE_DEVICES", "--gpus": "give torchrun --nproc-per-node", "--local-rank": "torchrun tells every process its rank",
    "--ignore-label": "pixels of value 255 are ignored", "--num-classes": "the data set has them", "--nclass": "the data set has them",
    "--skip-val": "--val-interval says how often is validated",
}  # fmt: skip
COMPILE = ("off", "default", "reduce-overhead", "max-autotune")
EXPORTS = {"onnx": ".onnx", "torch.export": ".pt2", "torchscript": ".pt"}  # kinds of exported files, and how they usually end
METAVARS = {int: "N", float: "X", str: "NAME"}


class Options(SimpleNamespace):
    """The resolved values as attributes, `sources` {name: where the value came from} and `methods` {name: its Options}."""

    sources: dict[str, str]
    methods: dict[str, object]

    def plain(self) -> dict:
        """All values as plain python values, the methods' under `methods`."""
        values = {name: value for name, value in vars(self).items() if name not in ("sources", "methods", "spec")}
        return values | {"methods": {name: dataclasses.asdict(options) for name, options in self.methods.items()}}


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors and "did you mean"; remembers defaults and data-set values instead of filling them in."""

    def __init__(self, script: str, description: str):
        super().__init__(
            prog=script, usage="%(prog)s [options]", description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.defaults, self.recipe, self.bounds, self.required = {}, {}, {}, []

    def add(self, group, name, default, help, *, recipe=None, aliases=(), **kwargs):
        """One option. `recipe`: attribute of a data set's spec that gives its default; bounds as in `losses.base.option`."""
        dest = kwargs.pop("dest", name.replace("-", "_"))
        self.defaults[dest] = default
        self.bounds[dest] = f"--{name}", {bound: kwargs.pop(bound) for bound in BOUNDS if bound in kwargs}
        if recipe:
            self.recipe[dest] = recipe
        if isinstance(default, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        elif not {"type", "choices", "action"} & kwargs.keys() and default is not None:
            kwargs["type"] = type(default)
        shown = "the data set's" if recipe else plain_value(default)
        if "action" not in kwargs and "choices" not in kwargs:
            kwargs.setdefault("metavar", METAVARS[kwargs["type"]])
        if kwargs.pop("required", False):  # checked after unknown flags, which may be its misspelling
            self.required.append((dest, name))
            value = kwargs["metavar"] + (f" [{kwargs['metavar']} ...]" if "nargs" in kwargs else "")
            self.usage = self.usage.replace("[options]", f"--{name} {value} [options]")
        else:
            help += f" (default: {shown})"
        group.add_argument(f"--{name}", *(f"--{a}" for a in aliases), dest=dest, help=help.replace("%", "%%"), **kwargs)

    def add_methods(self, shown) -> None:
        """The flags of every distillation method; --help shows the groups of those in `shown`, and says how to see the others."""
        for name, method in METHODS.items():
            self._add_method(name, method, name in shown)
        text = f"{', '.join(METHODS)}. {self.prog} --method NAME --help shows the flags of the methods named."
        self.add_argument_group("methods", textwrap.fill(text, 76, break_on_hyphens=False))

    def _add_method(self, name, method, shown: bool) -> None:
        group = self.add_argument_group(*((f"{name}: {method.title}", f"{method.paper} {method.url}".strip()) if shown else ()))
        for field in dataclasses.fields(method.Options):
            meta, kwargs = field.metadata, {}
            if isinstance(field.default, bool):
                kwargs["action"] = argparse.BooleanOptionalAction
            elif isinstance(field.default, tuple):
                kwargs |= {"type": type(field.default[0]), "nargs": "+", "choices": meta["choices"]}
            else:
                kwargs |= {"type": type(field.default), "choices": meta["choices"]}
            if "type" in kwargs and not meta["choices"]:
                kwargs["metavar"] = METAVARS[kwargs["type"]]
            help = describe_default(meta, field.default).replace("%", "%%") if shown else argparse.SUPPRESS
            group.add_argument(method.flag(field.name), dest=f"{name}.{field.name}", help=help, **kwargs)

    def parse(self, argv) -> dict:
        """The values given on the command line alone."""
        argv = [hyphenated(token) for token in argv]
        given, unknown = self.parse_known_args(argv)
        for token in unknown:
            if not token.startswith("--"):
                self.error(f"unexpected argument {token!r}")
            flag = token.split("=")[0]
            self.error(f"unknown option {flag}; {self.instead(flag, getattr(given, 'method', ()))}")
        for dest, name in self.required:
            if not hasattr(given, dest):
                self.error(f"--{name} is missing")
        return vars(given)

    def instead(self, flag: str, methods) -> str:
        """What to do in place of an option that there is not."""
        if flag in NEEDLESS:
            return f"drop it: {NEEDLESS[flag]}"
        known = self._option_string_actions
        meant = [name.format(method) for name in SYNONYMS.get(flag, "").split() for method in methods or ("",)]
        close = [name for name in meant if name in known] or difflib.get_close_matches(flag, known, 1)
        if close:
            return f"did you mean {close[0]}?"
        named = " ".join(name for name in methods if name in METHODS) or "NAME"
        return f"--method {named} --help lists all" if "method" in self.defaults else "--help lists all"

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _methods_to_show(parser: _Parser, argv) -> list[str]:
    """The methods in --method, before or behind --help; with --help a wrong name is refused, and every other fault left to the parser."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", nargs="*", default=[])
    methods = first.parse_known_args(argv)[0].method
    if {"-h", "--help"} & set(argv):
        fail_in_one_line(parser, lambda: _check_methods(methods))
    return methods


def hyphenated(token: str) -> str:
    """--max_iterations=5 -> --max-iterations=5: the underscores of older codebases are accepted."""
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value


def describe_default(meta, default) -> str:
    """An option's help line with its default and the data sets' own values."""
    tables = [("", {"default": default, **meta["per_dataset"]})]
    if meta["when"]:
        other, value, table = meta["when"]
        tables.append((f"with {other.replace('_', '-')} {value}: ", table))
    shown = []
    for prefix, table in tables:
        own = [f"{name} {plain_value(value)}" for name, value in table.items() if name != "default"]
        shown.append(prefix + ", ".join([str(plain_value(table["default"])), *own]))
    return f"{meta['help']} (default: {'; '.join(shown)})"


def plain_value(value):
    """A value as it is typed on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else value


def _add_data(parser, default="shapes"):
    group = parser.add_argument_group("data")
    parser.add(group, "dataset", default, f"data set: {', '.join(SPECS)}", type=str)
    parser.add(group, "data", None, "folder of the data set; none is needed for shapes", type=str)
    parser.add(group, "workers", 2, "loader processes per rank, 0 loads in the training process", minimum=0)
    return group


def _add_cache(parser, group):
    parser.add(group, "cache", "none", "keep decoded pictures, 4 bytes per pixel: in memory, once per node (ram), or in files (disk)", choices=KINDS)
    parser.add(group, "cache-dir", None, f"folder of --cache disk; none: {FOLDER} in the folder of the data set", type=str)


def _add_device(parser):
    group = parser.add_argument_group("machine")
    parser.add(group, "device", "auto", "auto takes a GPU when there is one", choices=("auto", "cpu", "cuda"))
    parser.add(group, "amp", "off", "autocast of the forward passes", choices=("off", "bf16", "fp16"))
    parser.add(group, "tf32", "convolutions", "what a GPU computes in TF32, with 10 bits, where it says float32: convolutions, as torch does unless "
               "told, products of matrices too (all), or nothing (off)", choices=("off", "convolutions", "all"))  # fmt: skip
    parser.add(group, "channels-last", None, "activations as NHWC, the same function; none: wherever that is faster, which is everywhere but for "
               "a network that trains in float32 on a CPU with AVX2 and no AVX-512", action=argparse.BooleanOptionalAction)  # fmt: skip
    parser.add(group, "dist-timeout", 1800.0, "seconds a rank waits for the others before it gives up", minimum=1)
    return group


def _add_network(parser, prefix, who):
    """Options of the network to train; in train_baseline.py without prefix, with the prefixed spelling as an alias."""
    group = parser.add_argument_group(who)

    def add(name, default, help, **kwargs):
        aliases = () if prefix else (f"student-{name}",)
        parser.add(group, prefix + name, default, help, aliases=aliases, dest=f"student_{name.replace('-', '_')}", **kwargs)

    add("model", "deeplabv3", f"{', '.join(MODELS)}")
    add("backbone", "resnet18", f"{', '.join(BACKBONES)}")
    add("head-width", None, "channels of the head; none takes the published width of the pair", type=int, minimum=1)
    add("dropout", None, "rate of every dropout layer; none: as published, 0.01 with --label-assisted", type=float, minimum=0, below=1)
    add("aux", None, "auxiliary heads, for training alone; none: as published", action=argparse.BooleanOptionalAction)
    add("pretrained", None, "checkpoint of a network to start from, or of its backbone alone; the input normalisation follows it", type=str)
    add("pretrained-base", "none", "backbone weights to start from: imagenet (torchvision's), a file, or none")
    add("normalization", "imagenet", "input normalisation; caffe-bgr is the CIRKD line's", choices=tuple(NORMALIZATIONS))
    add("head-after-dropout", False, "take the feature `head` after dropout, as the released CIRKD code does")


def _add_teacher(parser):
    group = parser.add_argument_group("teacher")
    parser.add(group, "teacher-checkpoint", None, "checkpoint of the teacher: this project's or a published one", type=str)
    parser.add(group, "teacher-model", None, "checked against the checkpoint, which says it itself; or PACKAGE.MODULE:FUNCTION, which imports "
               "that module, runs its code and takes the network that the function returns (models/foreign.py)", type=str)  # fmt: skip
    parser.add(group, "teacher-layers", None, "which layers of such a network are the features that methods read: c4=backbone.layer4 "
               "head=classifier.3 ...", type=str, nargs="+", metavar="FIELD=LAYER")  # fmt: skip
    parser.add(group, "teacher-backbone", None, "checked against the checkpoint, which says it itself", type=str)
    parser.add(group, "teacher-normalization", None, "input normalisation, where the checkpoint's own is wrong; of a network of "
               "your own imagenet unless given", choices=tuple(NORMALIZATIONS))  # fmt: skip


def _add_training(parser):
    group = parser.add_argument_group("training")
    add = parser.add
    add(group, "crop-size", None, "training crop: one number or height width", recipe="crop", type=int, nargs="+", minimum=32)
    add(group, "batch-size", None, "images per step on all ranks together", recipe="recipe.batch_size", type=int, minimum=1)
    add(group, "accumulate", 1, "micro-batches per step", minimum=1)
    add(group, "max-iterations", None, "length of the training in steps", recipe="recipe.max_iterations", type=int, minimum=1)
    add(group, "max-minutes", None, "length in minutes of training time instead, without validation, checkpoints and the first five steps of a "
        "process", type=float, minimum=1e-3)  # fmt: skip
    add(group, "optimizer", None, "sgd or adamw", recipe="recipe.optimizer", choices=("sgd", "adamw"))
    add(group, "lr", None, "learning rate at the start", recipe="recipe.lr", type=float, minimum=0)
    add(group, "lr-power", None, "power of the polynomial schedule", recipe="recipe.power", type=float, minimum=0)
    add(group, "lr-floor", 0.0, "smallest learning rate of the schedule", minimum=0)
    add(group, "head-lr-factor", 1.0, "learning rate of all layers outside the network's backbone, those of methods too, relative to --lr, which the "
        "log shows; 10 in the DeepLabV3+ line", above=0)  # fmt: skip
    add(group, "warmup-iterations", 0, "steps in which the learning rate rises linearly to its schedule", minimum=0)
    add(group, "momentum", None, "momentum of sgd", recipe="recipe.momentum", type=float, minimum=0)
    add(group, "weight-decay", None, "weight decay of all parameters", recipe="recipe.weight_decay", type=float, minimum=0)
    add(group, "aux-weight", 0.4, "weight of the auxiliary cross-entropy, 0 for none", minimum=0)
    add(group, "detail-weight", 1.0, "weight of the loss of a detail head, which stdc has; 0 for none", minimum=0)
    add(group, "task-loss", "ce", "cross-entropy, or that of the hard pixels alone, chosen per rank: what STDC and DDRNet are published with",
        choices=("ce", "ohem"))  # fmt: skip
    add(group, "loss-norm", "global", "cross-entropy over the labelled pixels of all ranks (exact), or a mean per rank (published codes)",
        choices=("global", "local"))  # fmt: skip
    add(group, "holdout", 0.0, "share of the training pictures, the same ones for every seed, to select and report on instead of training on them; "
        "0 selects and reports on the data set's own splits", minimum=0, below=1)  # fmt: skip
    add(group, "select-holdout", 0.0, "the same, to select on alone: for a data set whose reported split would choose the best checkpoint",
        minimum=0, below=1)  # fmt: skip
    add(group, "ema", 0.0, "decay of an exponential moving average of the weights, which is then evaluated; 0 for none", minimum=0, below=1)
    add(group, "seed", 0, "seed of initial weights, data order, augmentation and masks", minimum=0, maximum=2**63 - 1)
    add(group, "deterministic", False, "use deterministic GPU kernels only (slower)")

    group = parser.add_argument_group("run")
    add(group, "save-dir", None, "folder of this run: log, metrics, checkpoints", type=str)
    add(group, "resume", False, "go on with the run in --save-dir where there is one")
    add(group, "log-interval", 10, "steps between log lines", minimum=1)
    add(group, "val-interval", None, "steps between validations; none: a tenth of the training", type=int, minimum=1)
    add(group, "save-interval", 500, "steps between saves of last.pth", minimum=1)
    add(group, "tensorboard", False, "write curves and pictures of every validation to SAVE_DIR/tensorboard (package tensorboard)")
    add(group, "dry-run", False, "build the networks and losses, print every option with its source, and stop; reads no data, and no "
        "checkpoint of a teacher whose model and backbone are given")  # fmt: skip


# what may differ between a run and its continuation
COSMETIC = {
    "data", "workers", "cache", "cache_dir", "device", "dist_timeout", "resume", "save_dir", "log_interval", "save_interval", "dry_run",
    "teacher_checkpoint", "tensorboard",
}  # fmt: skip


def train_options(argv=None, *, distil: bool, description: str) -> Options:
    """The options of train_baseline.py (`distil` False) and train_kd.py."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser("train_kd.py" if distil else "train_baseline.py", description)
    if distil:
        group = parser.add_argument_group("distillation")
        parser.add(group, "method", None, "one or more of the methods named at the end", type=str, nargs="+", metavar="METHOD", required=True)
        _add_teacher(parser)
    else:
        group = parser.add_argument_group("teacher")
        parser.add(group, "label-assisted", False, "train a teacher that sees the noised labels as a fourth input channel (losses/lad.py)")
    _add_network(parser, "student-" if distil else "", "student" if distil else "network")
    _add_cache(parser, _add_data(parser))
    _add_training(parser)
    parser.add(_add_device(parser), "compile", "off", "compile the networks by torch.compile in this mode: minutes at the start, other dropout "
               "masks; reduce-overhead and max-autotune record CUDA graphs, for small batches", choices=COMPILE)  # fmt: skip
    if distil:
        parser.add_methods(_methods_to_show(parser, argv))
    given = parser.parse(argv)
    options = fail_in_one_line(parser, lambda: _resolve(parser, given))
    if distil:
        options.label_assisted = False
    return options


def eval_options(argv=None, *, description: str) -> Options:
    """The options of eval.py."""
    parser = _Parser("eval.py", description)
    _add_checkpoint(parser, "split to evaluate; none: the one the data set reports")
    group, add = _add_inference(parser), parser.add
    add(group, "limit", None, "evaluate the first N pictures alone", type=int, minimum=1)
    _add_device(parser)
    group = parser.add_argument_group("output")
    add(group, "output", None, "folder of report.json and pictures; none: eval/<checkpoint>/<split> beside it", type=str)
    add(group, "save-predictions", False, "write label pictures (palette PNG) of every image")
    add(group, "save-overlays", 0, "write overlays of the first N images", minimum=0)
    add(group, "dry-run", False, "print every option with its source, and stop; reads no files (of the data set `folder`: its classes.txt)")
    return _resolve_checkpoint(parser, sys.argv[1:] if argv is None else argv)


def submit_options(argv=None, *, description: str) -> Options:
    """The options of scripts/submit.py."""
    parser = _Parser("python -m scripts.submit", description)
    _add_checkpoint(parser, "split to predict; none: the one that the server scores")
    _add_inference(parser)
    _add_device(parser)
    group = parser.add_argument_group("output")
    parser.add(group, "output", None, "new or empty folder of the label pictures and their archive", type=str, required=True)
    return _resolve_checkpoint(parser, sys.argv[1:] if argv is None else argv)


def predict_options(argv=None, *, description: str) -> Options:
    """The options of scripts/predict.py; `spec` names the classes and their colours."""
    parser = _Parser("python -m scripts.predict", description)
    group, add = _add_weights(parser), parser.add
    add(group, "dataset", None, f"data set whose classes the checkpoint has; none: it says so itself. {', '.join(SPECS)}", type=str)
    add(group, "data", None, "folder with the classes.txt of --dataset folder", type=str)
    group = parser.add_argument_group("pictures")
    add(group, "input", None, "a picture, a folder of pictures with its subfolders, or a video", type=str, required=True)
    add(group, "batch-size", 1, "pictures of equal size that are predicted at once", minimum=1)
    add(group, "workers", 2, "threads per rank that read pictures ahead (one reads a video), 0 for none", minimum=0)
    _add_inference(parser)
    _add_device(parser)
    group = parser.add_argument_group("output")
    add(group, "output", None, "new or empty folder of the label pictures, overlays, legend and report", type=str, required=True)
    add(group, "overlays", True, "write the pictures with the classes' colours laid over them, of a video a video")
    given = parser.parse(sys.argv[1:] if argv is None else argv)
    return fail_in_one_line(parser, lambda: _resolve(parser, given, classes_of(given)))


def export_options(argv=None, *, description: str) -> Options:
    """The options of scripts/export.py; `spec` and `dataset` are None where no data set is needed and none was given."""
    parser = _Parser("python -m scripts.export", description)
    _add_weights(parser)
    group, add = parser.add_argument_group("file"), parser.add
    add(group, "output", None, "the file to write; FILE.json comes beside it", type=str, required=True)
    add(group, "format", "onnx", "kind of file", choices=tuple(EXPORTS))
    add(group, "scores", False, "a second output: the class scores at the model's stride, float32")
    add(group, "size", None, "one number, or height and width, that all pictures have; none: any size. --check and --quantize take the upper "
        "left part of larger pictures", type=int, nargs="+", minimum=32)  # fmt: skip
    add(group, "quantize", None, "convolutions in int8, of onnx alone", choices=("int8",))
    add(group, "calibration", 64, "training pictures that --quantize finds the range of activations on", minimum=1)
    group = parser.add_argument_group("check")
    add(group, "check", False, "compare the file with PyTorch on pictures of --data")
    add(group, "dataset", None, f"data set: {', '.join(SPECS)}; none: the one that the checkpoint names", type=str)
    add(group, "data", None, "folder of the data set, for --check, --quantize and --dataset folder", type=str)
    add(group, "split", None, "split to check on; none: the one the data set reports", type=str)
    add(group, "limit", None, "check on the first N pictures alone", type=int, minimum=1)
    given = parser.parse(sys.argv[1:] if argv is None else argv)
    return fail_in_one_line(parser, lambda: _resolve_export(parser, given))


def _resolve_export(parser, given: dict) -> Options:
    check, quantize = given.get("check"), given.get("quantize")
    kind = given.get("format", parser.defaults["format"])
    folder = given.get("dataset") == "folder"  # whose classes.txt names the classes
    for name, reader in (("split", check), ("limit", check), ("data", check or quantize or folder), ("calibration", quantize)):
        if name in given and not reader:
            readers = {"calibration": "--quantize int8", "data": "--check, --quantize int8 or --dataset folder"}.get(name, "--check")
            raise ValueError(f"--{name} {given[name]} is read by {readers} alone; add it, or drop the flag")
    meant = next((name for name, ending in EXPORTS.items() if given["output"].endswith(ending)), kind)
    if meant != kind:
        raise ValueError(f"--output {given['output']}: ends like a file of --format {meant}, --format is {kind}; change one of them")
    if quantize and kind != "onnx":
        raise ValueError(f"--quantize {quantize} makes files of --format onnx, --format is {kind}; choose onnx, or drop the flag")
    if "size" in given and kind == "torchscript":
        raise ValueError("--size: a file of torchscript takes pictures of any size; drop the flag")
    if "dataset" not in given and (check or quantize):
        given["dataset"] = dataset_of(given["checkpoint"])
    options = _resolve(parser, given)
    if "dataset" not in given:
        options.spec = options.dataset = None
    elif (check or quantize) and options.spec.source and options.data is None:
        raise ValueError(f"--data is missing: the folder of {options.dataset}; {options.spec.source}")
    options.device, options.dist_timeout = "cpu", 1800.0  # networks are traced there
    return options


def profile_options(argv=None, *, description: str) -> Options:
    """The options of scripts/profile.py; `models` are (model, backbone, head width or None), `sizes` (height, width)."""
    parser = _Parser("python -m scripts.profile", description)
    group, add = parser.add_argument_group("networks"), parser.add
    add(group, "models", (), "networks with random weights: MODEL:BACKBONE, or MODEL:BACKBONE:HEAD-WIDTH", type=str, nargs="+")
    add(group, "checkpoints", (), "networks in files: this project's or published ones", type=str, nargs="+")
    add(group, "num-classes", 19, "classes of --models", minimum=2)
    add(group, "fold", True, "fold BatchNorms into convolutions, as scripts.export does")
    group = parser.add_argument_group("measurement")
    add(group, "sizes", ("512x1024",), "pictures, HEIGHTxWIDTH", type=str, nargs="+")
    add(group, "batch-size", 1, "pictures per pass", minimum=1)
    add(group, "until", "labels", "time to the label map of the picture's size, or to the class scores at the model's stride",
        choices=("labels", "logits"))  # fmt: skip
    add(group, "repeats", 30, "timed passes of every network at every size", minimum=1)
    add(group, "warmup", 3, "passes before them", minimum=0)
    add(group, "output", None, "folder of profile.json and profile.md; none: the console alone", type=str)
    _add_device(parser)
    given = parser.parse(sys.argv[1:] if argv is None else argv)
    return fail_in_one_line(parser, lambda: _resolve_profile(parser, given))


def _resolve_profile(parser, given: dict) -> Options:
    options = _resolve(parser, given)
    del options.spec, options.dataset
    if not options.models and not options.checkpoints:
        raise ValueError("nothing to profile: give --models MODEL:BACKBONE ..., or --checkpoints FILE ...")
    if "num_classes" in given and not options.models:
        raise ValueError(f"--num-classes {options.num_classes} is read by --models alone, checkpoints say it themselves; drop the flag")
    options.models, options.sizes = [_network(text) for text in options.models], [_height_width(text) for text in options.sizes]
    for name, values in (("models", options.models), ("checkpoints", options.checkpoints), ("sizes", options.sizes)):
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {' '.join(given[name])}: names one twice")
    return options


def _network(text: str) -> tuple[str, str, int | None]:
    """deeplabv3:resnet18:64 -> ("deeplabv3", "resnet18", 64)"""
    model, backbone, width = (*text.split(":"), "")[:3] if text.count(":") in (1, 2) else ("", "", "")
    if not model or not backbone or not (width == "" and text.count(":") == 1 or width.isdecimal() and int(width)):
        raise ValueError(f"--models {text}: give MODEL:BACKBONE or MODEL:BACKBONE:HEAD-WIDTH, for example deeplabv3:resnet18")
    return model, backbone, int(width) if width else None


def _height_width(text: str) -> tuple[int, int]:
    """512x1024 -> (512, 1024)"""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) >= 32 and int(width) >= 32):
        raise ValueError(f"--sizes {text}: give HEIGHTxWIDTH, both at least 32, for example 512x1024")
    return int(height), int(width)


def _add_weights(parser):
    """A checkpoint; returns the group."""
    group = parser.add_argument_group("checkpoint")
    parser.add(group, "checkpoint", None, "checkpoint: this project's or a published one", type=str, required=True)
    parser.add(group, "normalization", None, "input normalisation, where the checkpoint's own is wrong", choices=tuple(NORMALIZATIONS))
    return group


def _add_checkpoint(parser, split_help):
    """A checkpoint and the pictures it is used on."""
    parser.add(_add_weights(parser), "split", None, split_help, type=str)
    _add_data(parser, default=None)


def _add_inference(parser):
    """How pictures become labels; returns the group."""
    group, add = parser.add_argument_group("how"), parser.add
    add(group, "mode", "whole", "whole pictures, or a sliding window", choices=("whole", "slide"))
    add(group, "window", None, "height and width of the window of --mode slide", recipe="crop", type=int, nargs="+", minimum=1)
    add(group, "stride", None, "step of the window; none: two thirds of it", type=int, nargs="+", minimum=1)
    add(group, "scales", (1.0,), "scales whose class probabilities are averaged", type=float, nargs="+", minimum=0.05, maximum=10)
    add(group, "flip", False, "average with the mirrored picture")
    return group


def _resolve_checkpoint(parser, argv) -> Options:
    """The options; without --dataset it is the one that the checkpoint names."""
    given = parser.parse(argv)
    if "dataset" not in given and not given.get("dry_run"):
        given["dataset"] = fail_in_one_line(parser, lambda: dataset_of(given["checkpoint"]))
    return fail_in_one_line(parser, lambda: _resolve(parser, given))


def config_of(path: str) -> dict:
    """What a checkpoint says of its training; empty for a file that is not of this project.

    Raises:
        ValueError: one line; its classes, colours or data set are not what a training writes.
    """
    config = read_state(path)[1]["config"] or {}
    dataset, classes, colours = (config.get(key) for key in ("dataset", "classes", "colours"))
    if not isinstance(dataset, str | None):
        raise ValueError(f"{path}: the data set in its config is not a name; use another copy")
    if classes is not None and not (isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"{path}: the classes in its config are not a list of names; use another copy")
    if colours is not None and not (isinstance(colours, list | tuple) and all(map(_is_colour, colours)) and len(colours) == len(classes or colours)):
        raise ValueError(f"{path}: the colours in its config are not red green blue for every class; use another copy")
    return config


def _is_colour(value) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)


def dataset_of(path: str) -> str:
    """The data set that a checkpoint of this project was trained on."""
    name = config_of(path).get("dataset")
    if name is None:
        raise ValueError(f"--dataset is missing: {path} does not say what it was trained on, as the checkpoints of this project do")
    return name


def classes_of(given: dict) -> Spec:
    """The data set whose classes a checkpoint has: what --dataset says, else what the checkpoint says of itself, classes and colours."""
    name, data, path = given.get("dataset"), given.get("data"), given["checkpoint"]
    spec = get_spec(name, data) if name else None
    if data is not None and (spec is None or spec.completion is None):
        raise ValueError(f"--data {data}: belongs to --dataset folder, whose classes.txt it holds; add it, or drop the flag")
    if spec is not None:
        return spec
    name, config = dataset_of(path), config_of(path)
    classes = config.get("classes")
    if not classes:
        return get_spec(name)
    spec = SPECS.get(name, SPECS["folder"])
    known = spec.colours if len(spec.colours) == len(classes) else map(voc_colour, range(len(classes)))
    return replace(spec, name=name, classes=tuple(classes), colours=tuple(map(tuple, config.get("colours") or known)))


def fail_in_one_line(parser, function):
    try:
        return function()
    except ValueError as error:
        parser.error(harmless(str(error)))


def _resolve(parser: _Parser, given: dict, spec: Spec | None = None) -> Options:
    spec = spec or get_spec(given.get("dataset") or parser.defaults.get("dataset") or "shapes", given.get("data"))
    options = Options(sources={}, methods={}, spec=spec)
    for name, default in parser.defaults.items():
        if name in given:
            value, source = given[name], "command line"
        elif name in parser.recipe:
            value, source = spec, f"data set {spec.name}"
            for attribute in parser.recipe[name].split("."):
                value = getattr(value, attribute)
        else:
            value, source = default, "default"
        flag, bounds = parser.bounds[name]
        if value is not None and bounds:
            check_bounds(flag, value, bounds)
        setattr(options, name, value)
        options.sources[name] = source
    options.dataset = spec.name
    for name in ("crop_size", "window", "stride", "size"):
        if getattr(options, name, None) is not None:
            setattr(options, name, pair(name, getattr(options, name)))
    for name in ("window", "stride"):
        if name in given and options.mode == "whole":
            shown = " ".join(map(str, given[name]))
            raise ValueError(f"--{name} {shown}: belongs to --mode slide, --mode is {options.mode}; add it, or drop the flag")
    if getattr(options, "stride", None) and any(step > side for step, side in zip(options.stride, options.window, strict=True)):
        given, window = (" ".join(map(str, sides)) for sides in (options.stride, options.window))
        raise ValueError(f"--stride {given}: must be at most the window, {window}, or pixels are left out")
    if "method" in parser.defaults:
        _resolve_methods(options, given)
    if "max_minutes" in parser.defaults:
        _check_training(options, given)
    return options


def pair(name: str, value) -> tuple[int, int]:
    """One number or two as (height, width)."""
    value = list(value)
    if len(value) > 2:
        raise ValueError(f"--{name.replace('_', '-')} {' '.join(map(str, value))}: give one number, or height and width")
    return (value[0], value[-1])


def _check_methods(names) -> None:
    for name in names:
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS, 1)
            raise ValueError(f"--method {name}: " + (f"did you mean {close[0]}? " if close else "") + f"possible are {', '.join(METHODS)}")
    if len(set(names)) != len(names):
        raise ValueError(f"--method {' '.join(names)}: names a method twice")


def _resolve_methods(options: Options, given: dict) -> None:
    _check_methods(options.method)
    for key in given:
        name, dot, field = key.partition(".")
        if dot and name not in options.method:
            raise ValueError(
                f"{METHODS[name].flag(field)} belongs to {name}, which is not in --method {' '.join(options.method)}; add it, or drop the flag"
            )
    for name in options.method:
        own = {key.partition(".")[2]: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key.startswith(f"{name}.")}
        options.methods[name], sources = resolve(METHODS[name], options.dataset, own)
        options.sources |= {f"{name}.{field}": source for field, source in sources.items()}


def _check_training(options: Options, given: dict) -> None:
    if "max_iterations" in given and "max_minutes" in given:
        raise ValueError("--max-iterations and --max-minutes: give one of them")
    if options.max_minutes is not None:
        options.max_iterations = None
    elif options.val_interval is None:
        options.val_interval = max(1, options.max_iterations // 10)
    if options.holdout and options.select_holdout:
        raise ValueError("--holdout and --select-holdout: give one of them")
    for name, report in (("holdout", True), ("select_holdout", False)):
        share = getattr(options, name)
        if share:
            options.spec = options.spec.hold_out(share, report)
    if "momentum" in given and options.optimizer != "sgd":
        raise ValueError(f"--momentum {options.momentum:g}: belongs to --optimizer sgd, --optimizer is {options.optimizer}; add it, or drop the flag")
    if options.lr_floor > options.lr:
        raise ValueError(f"--lr-floor {options.lr_floor:g}: must be at most --lr, {options.lr:g}")
    if options.max_iterations is not None and options.warmup_iterations > options.max_iterations:
        raise ValueError(f"--warmup-iterations {options.warmup_iterations}: must be at most --max-iterations, {options.max_iterations}")
    if options.cache_dir is not None and options.cache != "disk":
        raise ValueError(f"--cache-dir {options.cache_dir}: belongs to --cache disk, --cache is {options.cache}; add it, or drop the flag")
    if options.batch_size % options.accumulate:
        raise ValueError(f"--batch-size {options.batch_size}: must be a multiple of --accumulate {options.accumulate}")
    if options.spec.source and options.data is None and not options.dry_run:
        raise ValueError(f"--data is missing: the folder of {options.spec.name}; {options.spec.source}")
    if options.save_dir is None and not options.dry_run:
        raise ValueError("--save-dir is missing: the folder for log, metrics and checkpoints of this run")


def option_table(options: Options) -> str:
    """Every value with its source, one line each, for log and --dry-run."""
    rows = [(name, getattr(options, name), source) for name, source in options.sources.items() if "." not in name]
    for method, values in options.methods.items():
        rows += [(f"{method}.{field}", value, options.sources[f"{method}.{field}"]) for field, value in dataclasses.asdict(values).items()]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"  {name:<{width}}  {plain_value(value)!s:<24} {source}" for name, value, source in rows)
