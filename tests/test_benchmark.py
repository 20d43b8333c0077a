"""Every optimised form against its plain one (`scripts/plain.py`), what `Watch` counts, and the benchmark's rows."""

import copy
import gc
import json
import shlex
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from losses import METHODS, cirkd, icsd, ifvd, projection, skd, task
from losses.memory import Queue, class_means, class_pixels
from models.fold import fold_batchnorm
from scripts import benchmark, plain
from scripts.compare import parse_arm
from scripts.watch import Watch
from utils import distill, engine, metrics
from utils.distill import Distiller, Teacher
from utils.optim import build_optimizers


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(*shape, classes=5, ignored=0.2):
    generator = torch.Generator().manual_seed(9)
    target = torch.randint(0, classes, shape, generator=generator, dtype=torch.uint8)
    return target.masked_fill(torch.rand(shape, generator=generator) < ignored, 255)


def same(ours, other, student, rtol=1e-9):
    """Equal values and gradients with respect to the student."""
    torch.testing.assert_close(ours, other, rtol=rtol, atol=1e-12)
    gradients = [torch.autograd.grad(7 * value, student)[0] for value in (ours, other)]
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-12 + rtol * gradients[1].abs().max().item())


# losses: (student, teacher) -> scalar, ours and plain
MAPS = {
    "ifvd": [partial(f, labels=labels(2, 9, 7), num_classes=6) for f in (ifvd.intra_class_difference, plain.intra_class_difference)],
    "mimicking": [projection.mimicking, plain.mimicking],
    "mimicking, mean": [partial(f, mean=True) for f in (projection.mimicking, plain.mimicking)],
    "skd by channels": [skd.pairwise, plain.pairwise],
    "skd original": [partial(f, form="original") for f in (skd.pairwise, plain.pairwise)],
    "icsd": [lambda s, t, f=f: F.mse_loss(f(s), f(t)) for f in (icsd.divergences, plain.divergences)],
    "icsd released": [lambda s, t, f=f: F.mse_loss(f(s), f(t)) for f in (icsd.released_similarity, plain.released_similarity)],
    "cirkd": [lambda s, t, f=f: f(cirkd.pixels(s), cirkd.pixels(t), 0.7) for f in (cirkd.minibatch_relation, plain.minibatch_relation)],
}


@pytest.mark.parametrize("case", MAPS)
def test_losses_equal_their_plain_forms(case):
    student, teacher = random(2, 5, 9, 7, seed=1).requires_grad_(), random(2, 5, 9, 7, seed=2)
    ours, other = MAPS[case]
    same(ours(student, teacher), other(student, teacher), student, rtol=1e-7)


def test_float32_products_keep_their_digits():
    """CIRKD's pairs in float32, by whatever library the CPU uses, are as near to float64 as the plain form."""
    student, teacher = (F.normalize(random(2, 300, c, seed=c).relu(), dim=2) for c in (32, 64))
    results = {}
    for name, form, dtype in (("exact", plain, torch.float64), ("plain", plain, torch.float32), ("ours", cirkd, torch.float32)):
        leaf = student.to(dtype).requires_grad_()
        value = form.minibatch_relation(leaf, teacher.to(dtype))
        results[name] = value.double(), torch.autograd.grad(value, leaf)[0].double()
    for name in ("plain", "ours"):
        assert abs(results[name][0] / results["exact"][0] - 1) < 1e-5
        assert (results[name][1] - results["exact"][1]).norm() < 3e-6 * results["exact"][1].norm()


def test_queues_equal_their_plain_form():
    """Drawn pixels, means, and the rings after many steps."""
    ours, other = Queue(5, 9, 4, seed=0), Queue(5, 9, 4, seed=0)
    for step in range(6):
        features, target = random(2, 4, 30, seed=step, dtype=torch.float32), labels(2, 30)
        noise = torch.rand(2, 30, generator=torch.Generator().manual_seed(step))
        for released in (False, True):
            found, expected = (f(features, target, noise, 5, 4, released) for f in (class_pixels, plain.class_pixels))
            assert torch.equal(found[1], expected[1])
            here = torch.arange(4) < found[1][..., None]
            assert torch.equal(found[0][here], expected[0][here])
        means, counts = class_means(features, target, 5)
        torch.testing.assert_close(means, plain.class_means(features, target, 5)[0])
        ours.enqueue(*found)
        plain.enqueue(other, *found)
        assert torch.equal(ours.rows, other.rows) and torch.equal(ours.pointer, other.pointer)


@pytest.mark.parametrize("images", [1, 4])
def test_a_queue_update_is_few_operations(images):
    """However many images and classes; the plain form has more with each, and reads back."""
    queue, features, target = Queue(19, 90, 4, seed=0), random(images, 4, 90, dtype=torch.float32), labels(images, 90, classes=19)
    noise = torch.rand(images, 90)
    watches = []
    for pixels, means, store in ((class_pixels, class_means, Queue.enqueue), (plain.class_pixels, plain.class_means, plain.enqueue)):
        with Watch() as watch:
            store(queue, *pixels(features, target, noise, 19))
            store(queue, *means(features, target, 19))
            queue.sample(noise[0], 5)
        watches.append(watch)
    assert watches[0].operations <= 150 and not watches[0].blocks
    assert watches[1].operations > 150 and len(watches[1].blocks) > 40 * images


@pytest.mark.parametrize("size", [(40, 56), (33, 41), (5, 7), (3, 4), (1, 1), (64, 7)])
@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_cross_entropy_by_bands(size, block):
    """Bands of one row, of a few and of all; whole and broken factors, no factor, and downwards."""
    logits, target = (3 * random(2, 5, 5, 7)).requires_grad_(), labels(2, *size)
    target[:, 0, 0] = 1
    ours = task._UpsampledCrossEntropy.apply(logits, target, block) / 13
    same(ours, plain.cross_entropy(logits, target, 13.0), logits)


def test_cross_entropy_of_impossible_labels_and_of_none():
    logits = torch.tensor([[300.0, 0.0], [0.0, 300.0]]).view(1, 2, 1, 2).requires_grad_()
    wrong = torch.tensor([[[1, 0]]], dtype=torch.uint8)
    same(task.cross_entropy(logits, wrong, 1.0), plain.cross_entropy(logits, wrong, 1.0), logits)
    nothing = task.cross_entropy(logits, torch.full_like(wrong, 255), 1.0)
    assert nothing.item() == 0 and torch.autograd.grad(nothing, logits)[0].abs().max() == 0


def test_cross_entropy_is_never_whole():
    logits, target = random(2, 5, 32, 32, dtype=torch.float32).requires_grad_(), labels(2, 256, 256)
    with Watch() as ours:
        torch.autograd.grad(task._UpsampledCrossEntropy.apply(logits, target, 1 << 14), logits)
    with Watch() as whole:
        torch.autograd.grad(plain.cross_entropy(logits, target, 1.0), logits)
    assert ours.peak < whole.peak / 14 and not ours.blocks


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_metric_counts_the_same_integers(layout):
    """Classes of upsampled scores, ties included, and the counts."""
    logits, target = (2 * random(2, 6, 9, 11, dtype=torch.float32)).round().contiguous(memory_format=layout), labels(2, 67, 83, classes=6)
    found, expected = metrics.labels_at(logits, (67, 83)), plain.labels_at(logits.contiguous(), (67, 83))
    assert found.dtype == torch.uint8 and torch.equal(found.long(), expected)
    assert torch.equal(metrics.class_of(logits).long(), logits.argmax(1))
    counts = metrics.confusion(found, target, 6)
    assert counts.dtype == torch.int64 and torch.equal(counts, plain.confusion(expected, target, 6))
    assert counts.sum() == (target != 255).sum()


def test_metric_of_150_classes():
    """Cells beyond what a byte or 16 bits hold."""
    prediction, target = labels(3, 64, 64, classes=250, ignored=0), labels(3, 64, 64, classes=250)
    assert torch.equal(metrics.confusion(prediction, target, 250), plain.confusion(prediction, target, 250))


def test_plain_forms_take_their_place():
    before = task.cross_entropy, ifvd.intra_class_difference, Queue.enqueue
    with plain.forms():
        assert (task.cross_entropy, ifvd.intra_class_difference, Queue.enqueue) == (
            plain.cross_entropy, plain.intra_class_difference, plain.enqueue)  # fmt: skip
    assert (task.cross_entropy, ifvd.intra_class_difference, Queue.enqueue) == before


def test_watch_counts_operations_reads_and_memory():
    gc.disable()
    try:
        x = torch.ones(1000, requires_grad=True)
        with Watch() as watch:
            y = x * 2  # 4000 bytes
            y.view(10, 100)
            del y
            z = (x + 1).exp()  # 8000, of which 4000 stay
        assert (watch.operations, watch.blocks, watch.peak, watch.live) == (3, [], 8000, 4000)
        with Watch() as watch:
            z.sum().item()
            z[z > 0]
            torch.ones(3, 4) @ torch.ones(4, 5)
            torch.ones(3, 4, dtype=torch.bfloat16) @ torch.ones(4, 2, dtype=torch.bfloat16)
        assert len(watch.blocks) == 2 and watch.blocks[0] == "tests/test_benchmark.py:test_watch_counts_operations_reads_and_memory"
        assert watch.flops == {torch.float32: 2 * 3 * 4 * 5, torch.bfloat16: 2 * 3 * 4 * 2}
    finally:
        gc.enable()


def rows_of(folder) -> dict:
    return {(row["part"], row["name"], row["amp"]): row for row in json.loads((folder / "rows.json").read_text())["rows"]}


def test_rows_of_the_benchmark(tmp_path, capsys, monkeypatch):
    """Half of the command is run, then the same folder gone on with in another precision."""
    monkeypatch.setattr(benchmark, "commit", lambda: "1234")
    first = ["--quick", "--methods", "icsd", "icsd:icsd-upsample=", "--output", str(tmp_path)]
    benchmark.main(first)
    content, rows = json.loads((tmp_path / "rows.json").read_text()), rows_of(tmp_path)
    parts = [("task", "cross-entropy"), ("teacher", "exact"), ("metric", "counts"), ("metric", "counts and upsampling"),
             ("loader", "sample"), ("loader", "sample, cached"), ("loader", "decoding alone"), ("loader", "scaling alone"),
             ("piece", "contrast"), ("piece", "front, centre mask"), ("piece", "front, random mask")]  # fmt: skip
    methods = [(part, name) for part in ("loss", "step") for name in ("kd", "icsd", "icsd:icsd-upsample=")]
    assert sorted(rows) == sorted([(*key, "off") for key in parts + methods] + [("teacher", "bf16", "bf16")])
    assert content["gflops"].keys() == {"float32", "bfloat16"} and min(content["gflops"].values()) > 0 and content["gb_per_s"] > 0
    assert content["threads"] == 1 and content["commit"] == "1234" and content["torch"] == torch.__version__
    assert content["commands"] == [shlex.join(["python", "-m", "scripts.benchmark", *first])]
    exact = [row for row in rows.values() if row["plain_ms"] is not None and row["amp"] == "off"]
    assert len(exact) == 14
    for row in exact:
        assert row["value_error"] < 1e-5 and row["gradient_error"] < (1e-3 if row["part"] == "step" else 1e-5), row
    for key in (("metric", "counts"), ("loader", "sample"), ("loader", "sample, cached")):
        assert (rows[*key, "off"]["value_error"], rows[*key, "off"]["gradient_error"]) == (0, 0), key
    assert rows["teacher", "bf16", "bf16"]["value_error"] < 0.05
    # on a CPU alone, the contrast looks for the pairs that matter and the front counts what is visible
    assert {key[1]: row["blocks"] for key, row in rows.items() if row["blocks"]} == {
        "contrast": 12, "front, centre mask": 1, "front, random mask": 1}  # fmt: skip
    assert rows["loss", "icsd:icsd-upsample=", "off"]["peak"] > 10 * rows["loss", "icsd", "off"]["peak"]
    steps = {name: rows["step", name, "off"] for name in ("kd", "icsd")}
    assert rows["loss", "icsd", "off"]["peak"] > 0 and steps["icsd"]["operations"] > steps["kd"]["operations"] > 5
    # the same product, priced at the rate of its own precision
    rates = content["gflops"]
    teacher = [rows["teacher", name, amp]["floor_ms"] for name, amp in (("exact", "off"), ("bf16", "bf16"))]
    assert teacher[0] / teacher[1] == pytest.approx(rates["bfloat16"] / rates["float32"], rel=0.05)
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out

    benchmark.main(["--quick", "--parts", "task", "step", "--methods", "kd", "--amp", "off", "bf16", "--output", str(tmp_path)])
    found = rows_of(tmp_path)
    assert found.keys() - rows.keys() == {("step", "kd", "bf16")} and all(found[key] == row for key, row in rows.items())
    assert found["step", "kd", "bf16"]["value_error"] < 0.05
    printed = capsys.readouterr()
    assert [line.partition(" after ")[0] for line in printed.err.splitlines() if " of 3: " in line] == [
        "1 of 3: task, shapes 2x64x64, there already", "2 of 3: step kd, shapes 2x64x64, there already", "3 of 3: step kd, shapes 2x64x64, done",
    ]  # fmt: skip
    line = next(line for line in printed.out.splitlines() if line.startswith("| step | kd | shapes 2x64x64 | bf16 |"))
    cells = dict(zip(table_head(), (cell.strip() for cell in line.strip("|").split("|")), strict=True))
    assert float(cells["from fp32"]) == pytest.approx(steps["kd"]["plain_ms"] / found["step", "kd", "bf16"]["ms"], abs=0.006)
    assert cells["of KD"] == "1.00"


def test_steps_with_compiled_networks_have_rows_of_their_own(capsys, monkeypatch):
    """With a compiler that does nothing but count: both networks of our form, one pass in each of two steps and in the one that is watched,
    which are the steps that are marked."""
    compiled, passes, marks, compile = [], [], [], torch.compile

    def counting(function, options=None, **others):
        if options is None:  # the look whether there is a compiler
            return compile(function, **others)
        compiled.append(options)
        return lambda *arguments: (passes.append(1), function(*arguments))[1]

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(len(passes)))
    benchmark.main(["--quick", "--parts", "step", "--compile", "default", "off", "--methods", "kd"])
    printed = capsys.readouterr()
    lines = [line.split(" | ") for line in printed.out.splitlines() if line.startswith("| step ")]
    assert [line[1] for line in lines[: len(lines) // 2]] == ["kd", "kd, --compile default"] and "2 of 2: step kd, --compile default" in printed.err
    assert compiled == 2 * [{"layout_optimization": False}] and len(passes) == 6 and marks == [0, 2, 4]


def test_every_method_has_its_networks_compiled(capsys, monkeypatch):
    """Torch's compiler gives up on code that it has compiled eight times, and all networks share theirs."""
    calls = []
    monkeypatch.setattr(benchmark, "check_compile", lambda *given: None)
    monkeypatch.setattr(distill, "compiled", lambda model, mode: model if mode == "off" else torch.compile(
        model.forward, dynamic=False, backend=lambda graph, inputs: lambda *given: (calls.append(1), graph.forward(*given))[1]))  # fmt: skip
    methods = ["kd", "at", "cirkd", "dist", "dsd", "feature", "mgd"]
    benchmark.main(["--quick", "--parts", "step", "--compile", "default", "--methods", *methods])
    assert len(calls) == 2 * 2 * len(methods)  # of two networks in two steps; the third, which is watched, is never compiled


def test_times_are_of_the_kd_with_the_same_compiler():
    rows = [benchmark.Row("step", name, "s", "off", 1, ms) for name, ms in (("kd", 4.0), ("cwd", 6.0), ("kd, --compile default", 2.0),
                                                                            ("cwd, --compile default", 5.0))]  # fmt: skip
    column = table_head().index("of KD")
    assert [line.strip("|").split("|")[column].strip() for line in benchmark.table(rows).splitlines()[2:]] == ["1.00", "1.50", "1.00", "2.50"]


def test_a_wrong_gradient_of_a_step_is_seen(monkeypatch):
    """Also one of the same length as the right one."""
    bench = benchmark.Bench(benchmark.QUICK[0], benchmark.Machine(torch.device("cpu"), quick=True), 1, 1, "off")

    class Turned(torch.autograd.Function):
        """The identity, with the gradient of the mirrored picture."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.flip(-1)

    form = plain.cross_entropy
    assert bench.step(parse_arm("kd")).gradient_error < 1e-3
    monkeypatch.setattr(plain, "cross_entropy", lambda logits, *given: form(Turned.apply(logits), *given))
    row = bench.step(parse_arm("kd"))
    assert row.value_error < 1e-5 and row.gradient_error > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd", "afdcd"])
def test_a_step_is_as_near_to_float64_as_its_plain_form(name):
    """The networks of the benchmark, from random weights, raise rounding a thousandfold and more: a step's gradient error is that. Shown by
    `--slow -s`; ours has BatchNorms folded and channels-last maps, whose sums are longer."""
    bench = benchmark.Bench(replace(benchmark.SHAPES[0], crop=(120, 120), batch=2), benchmark.Machine(torch.device("cpu"), quick=True), 1, 1, "off")
    options = bench.options(parse_arm(name))

    def gradient(form, dtype):
        torch.manual_seed(0)
        distiller = Distiller(copy.deepcopy(bench.student), task.TaskLoss(0.4), bench.methods(options)).to(dtype)
        distiller.arrange(bench.layout(form, "student"))
        teacher = fold_batchnorm(bench.teacher, distiller.teacher_needs)[0] if form == "ours" else copy.deepcopy(bench.teacher)
        teacher = teacher.to(dtype=dtype, memory_format=bench.layout(form, "teacher"))
        training = engine.Training(distiller, build_optimizers(distiller, options), options, torch.device("cpu"))
        found = {}
        for key, p in distiller.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, key=key: found.update({key: p.grad.double()}))
        batch = bench.batch(0)
        with plain.forms() if form == "plain" else nullcontext():
            engine.train_step(training, distiller, Teacher(teacher, distiller.teacher_needs), [batch], training.record)
        return torch.cat([found[key].flatten() for key in sorted(found)])

    exact = gradient("plain", torch.float64)
    errors = {form: benchmark.relative(gradient(form, torch.float32), exact) for form in ("plain", "ours")}
    print(f"{name}: relative error of a step's gradients to float64: " + ", ".join(f"{form} {error:.1e}" for form, error in errors.items()))
    assert 1e-5 < errors["ours"] < 4 * errors["plain"] < 0.2


def table_head() -> list[str]:
    """Columns by name; of two that are called alike, of times and of memory, the second one gets a prime."""
    names = []
    for name in (cell.strip() for cell in benchmark.table([]).splitlines()[0].strip("|").split("|")):
        names.append(f"{name}'" if name in names else name)
    return names


def test_rows_of_other_code_are_not_gone_on_with(tmp_path, monkeypatch, capsys):
    given = ["--quick", "--parts", "metric", "--output", str(tmp_path)]
    monkeypatch.setattr(benchmark, "commit", lambda: "1234-dirty")
    benchmark.main(given)
    kept = (tmp_path / "rows.json").read_bytes()
    for commit, told in (("1234-dirty", "differ from their commit"), ("5678", "has rows of commit 1234-dirty, this is 5678; choose another")):
        monkeypatch.setattr(benchmark, "commit", lambda commit=commit: commit)
        with pytest.raises(SystemExit) as stopped:
            benchmark.main(given)
        assert stopped.value.code == 2 and told in capsys.readouterr().err
    assert (tmp_path / "rows.json").read_bytes() == kept
    (tmp_path / "rows.json").write_text('{"rows": [{"part": 1}]}')
    with pytest.raises(SystemExit):
        benchmark.main(given)
    assert "is not a file of this benchmark" in capsys.readouterr().err


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512"])
@pytest.mark.parametrize("amp,dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_maps_and_weights_of_a_loss_are_those_of_a_step(monkeypatch, amp, dtype, instructions):
    """Types and memory formats of what the method is given and of its weights, in our form and in the plain one."""
    seen, forward = [], METHODS["afdcd"].forward

    def layout(x):
        return x.dtype, "NCHW" if x.is_contiguous() else "NHWC" if x.is_contiguous(memory_format=torch.channels_last) else "neither"

    def look(self, student, teacher, batch):
        maps = [layout(getattr(output, name)) for output in (student, teacher) for name in ("logits", "c4")]
        seen.append((*maps, *(layout(p) for p in self.parameters() if p.ndim == 4 and p.shape[-1] > 1)))
        return forward(self, student, teacher, batch)

    monkeypatch.setattr(METHODS["afdcd"], "forward", look)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    bench = benchmark.Bench(benchmark.QUICK[0], benchmark.Machine(torch.device("cpu"), quick=True), 1, 1, amp)
    arm = parse_arm("afdcd:afdcd-projector=bottleneck")
    bench.loss(arm)
    alone = set(seen)
    seen.clear()
    bench.step(arm)
    assert alone == set(seen) and len(alone) == 2
    ours, other = sorted(alone, key=lambda found: found[3][1] == "NCHW")
    trained = "NCHW" if (instructions, amp) == ("AVX2", "off") else "NHWC"
    assert ours[1] == (dtype, trained) and ours[3] == (dtype, "NHWC")
    assert other[1] == other[3] == (dtype, "NCHW") and other[4:] == 2 * ((torch.float32, "NCHW"),)


@pytest.mark.parametrize("given,told", [
    (["--methods", "nope"], "--methods nope: there is no method 'nope'; possible: "), (["--repeats", "0"], "--repeats 0: must be at least 1"),
    (["--parts", "loader", "--amp", "bf16"], "--amp: --parts loader does not read it"),
    (["--parts", "loss", "--step-repeats", "3"], "--step-repeats: --parts loss does not read it"),
    (["--parts", "loss", "--compile", "default"], "--compile: --parts loss does not read it"),
    (["--compile", "reduce-overhead"], "--compile reduce-overhead: records CUDA graphs, which cpu has not"),
    (["--methods", "kd:batch-size=1"], "batch-size is no option of kd"),
    (["--step-repeats", "0"], "--step-repeats 0: must be at least 1"), (["--quick", "--repeats", "3"], "--repeats: --quick has its own"),
    (["--quick", "--shapes", "citys"], "--shapes: --quick has its own"), (["--methods", "kd+cwd"], "kd+cwd: one method at a time"),
    (["--methods", "none"], "none: one method at a time"), (["--methods", "kd", "--parts", "task"], "--methods: --parts task has no method in it"),
])  # fmt: skip
def test_refusals(given, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(given)
    assert stopped.value.code == 2 and told in capsys.readouterr().err
