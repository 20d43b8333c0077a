"""Evaluate a checkpoint: scores, a table per class, report.json, and pictures.

    python eval.py --checkpoint runs/afdcd/student_best.pth
    python eval.py --checkpoint deeplabv3_resnet101_citys_best_model.pth --dataset citys --data DIR --scales 0.75 1 1.25 --flip
    torchrun --nproc-per-node 4 eval.py --checkpoint ... --data DIR --mode slide --window 512 --save-predictions

The network is built from the checkpoint itself. The figures do not depend on the number of ranks or workers. Of a split without labels
--save-predictions and --save-overlays write pictures, and there is no report.
"""

import json
from pathlib import Path

from dataset import EvalSampler, build_dataset, build_loader
from models import count_macs, count_parameters
from models.weights import model_from_checkpoint
from utils import distributed
from utils.checkpoint import fingerprint
from utils.distill import is_label_assisted
from utils.engine import AMP, memory_format
from utils.files import read_json
from utils.log import logger
from utils.metrics import Inference, Timed, evaluate
from utils.options import eval_options, option_table
from utils.run import command, environment, write_text, writing
from utils.session import check_classes, run_script
from utils.visualize import overlay, save_overlay, save_palette


def main(options, device) -> None:
    if options.dry_run:
        logger.info("%s", option_table(options))
        return
    model, found = model_from_checkpoint(options.checkpoint, normalization=options.normalization)
    spec = options.spec
    check_classes(model, options.checkpoint, spec)
    split = options.split or spec.report_split
    pictures = build_dataset(spec, options.data, split)
    labelled = spec.splits[split].labelled
    if not labelled and not (options.save_predictions or options.save_overlays):
        other = "python -m scripts.submit predicts it for the test server" if spec.submission else "choose another split"
        raise ValueError(f"--split {split}: {spec.name} has no labels there to compare with; {other}, or add --save-predictions or "
                         "--save-overlays for pictures without scores")  # fmt: skip
    if not labelled and is_label_assisted(model):
        raise ValueError(f"{options.checkpoint}: a label-assisted teacher needs the labels that it would predict; give a student")
    count = min(options.limit or len(pictures), len(pictures))
    loader = build_loader(pictures, EvalSampler(count, distributed.rank(), distributed.world()), workers=options.workers, device=device)
    model = model.to(device=device, memory_format=memory_format(options, device))
    inference = Inference(options.mode, options.window, options.stride, tuple(options.scales), options.flip)
    output = Path(options.output or Path(options.checkpoint).parent / "eval" / Path(options.checkpoint).stem / split)
    if distributed.is_main():
        evaluated = evaluation(options, spec.name, split)
        check_output(output, evaluated)
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
    distributed.barrier()

    pictures_out = Pictures(output, spec, options)
    timed = Timed(inference, device)
    logger.info("%s\n%s, %s, %d pictures", found, spec.title, split, count)
    if is_label_assisted(model):
        logger.warning("a label-assisted teacher: it sees the labels, so the scores say how well it can teach, not how well it predicts")
    scores = evaluate(model, loader, count, spec, device, timed, AMP[options.amp], visit=pictures_out, labelled=labelled)
    if not labelled:
        logger.info("%s: pictures alone, no scores and no report: %s of %s has no labels", output, split, spec.name)
        return
    height, width = pictures.read(0)[1].shape
    macs = count_macs(model, height, width)
    logger.info("%s", scores.table(spec.classes))
    cost = (count_parameters(model) / 1e6, macs / 1e9, timed.median_ms, height, width)
    logger.info("%.2f M parameters, %.2f GMAC and %.1f ms per %dx%d picture", *cost)
    if distributed.is_main():
        report = {
            "checkpoint": str(options.checkpoint), "model": model.config, "dataset": spec.name, "split": split, "classes": list(spec.classes),
            "evaluation": evaluated, **scores.plain(),
            "parameters": count_parameters(model), "macs": macs, "size": [height, width], "milliseconds_per_image": timed.median_ms,
            "options": options.plain(), "command": command(), "environment": environment(),
        }  # fmt: skip
        write_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    logger.info("%s", output / "report.json")


def evaluation(options, dataset: str, split: str) -> dict:
    """What the figures depend on, by name of the option; where no folder was asked for it lies beside the checkpoint and is of that one."""
    names = ["scales", "flip", "limit", "amp", "normalization", "mode"] + ["window", "stride"] * (options.mode == "slide")
    found = {"dataset": dataset, "data": options.data and str(Path(options.data).resolve()), "split": split}
    if options.output:
        found["checkpoint"] = f"{Path(options.checkpoint).name} ({fingerprint(options.checkpoint)[:16]})"
    return json.loads(json.dumps(found | {name: getattr(options, name) for name in names}))


def check_output(folder: Path, evaluated: dict) -> None:
    """ValueError where the folder holds the report of another evaluation; the same one may be repeated."""
    path = folder / "report.json"
    if not path.exists():
        return
    report = read_json(path)
    before = report.get("evaluation") if isinstance(report, dict) else None
    remedy = "give another --output, or remove that folder"
    if not isinstance(before, dict):
        raise ValueError(f"{path} does not say what it is of; {remedy}")
    for name in [*evaluated, *before]:
        if before.get(name) != evaluated.get(name):
            ours, theirs = (" ".join(map(str, value)) if isinstance(value, list) else value for value in (evaluated.get(name), before.get(name)))
            raise ValueError(f"{path} is of another evaluation: --{name} is {ours}, was {theirs}; {remedy}")


class Pictures:
    """Writes predictions and overlays as the evaluation goes."""

    def __init__(self, folder: Path, spec, options):
        # pictures go round the ranks: this rank's share of the first `save_overlays`
        self.palette, self.left = spec.palette(), len(EvalSampler(options.save_overlays, distributed.rank(), distributed.world()))
        self.predictions = folder / "predictions" if options.save_predictions else None
        self.overlays = folder / "overlays" if options.save_overlays else None

    def __call__(self, batch, prediction) -> None:
        for name, image, labels in zip(batch.names, batch.image, prediction, strict=True):
            labels = labels.cpu().numpy().astype("uint8")
            if self.predictions:
                with writing(self.predictions):
                    save_palette(self.path(self.predictions, name, ".png"), labels, self.palette)
            if self.overlays and self.left > 0:
                mixed = overlay(image.permute(1, 2, 0).cpu().numpy(), labels, self.palette)
                with writing(self.overlays):
                    save_overlay(self.path(self.overlays, name, ".jpg"), mixed)
                self.left -= 1

    def path(self, folder: Path, name: str, ending: str) -> Path:
        """A picture's name is its path below its split without an ending: folders and dots in it tell pictures apart."""
        path = folder / (name + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


if __name__ == "__main__":
    run_script(main, eval_options(description=__doc__))
