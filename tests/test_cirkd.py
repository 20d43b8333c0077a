"""CIRKD and CIRKDv2: the published values, the blocked similarities against their plain form, and queues against plain loops."""

import logging
import os
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from losses.cirkd import minibatch_relation, pixels
from losses.cirkdv2 import Context, pool_to
from losses.functional import similarity_kl, unit
from losses.memory import Queue, build_queues, class_means, class_pixels
from tests import reference
from utils import distributed

CIRKD_TERMS = ("kd", "minibatch_pixel", "memory_pixel", "memory_region")
V2_TERMS = (*CIRKD_TERMS, "fitnet", "minibatch_channel", "channel_mse", "memory_channel")


def only(*active, terms=CIRKD_TERMS):
    """Weights that leave these terms."""
    return {f"{term}_weight": float(term in active) for term in terms}


def ascending(batch, *shape):
    """Noise that makes every random permutation 0, 1, 2, ..., across images too."""
    numbers = torch.arange(len(batch) * shape[0], dtype=torch.float64)
    return numbers.view(len(batch), *shape)


def golden(name, method, terms, **given):
    """(entry, its inputs, the method with the entry's parameters, its batch)."""
    entry = reference.LOSSES[name]
    spec, tensors = entry["spec"], reference.inputs(entry["spec"])
    weights = only(*terms, terms=V2_TERMS if method == "cirkdv2" else CIRKD_TERMS)
    built = reference.build(
        method, student={"head": spec["student_channels"]}, teacher={"head": spec["teacher_channels"]}, num_classes=spec["num_classes"],
        crop=(8 * spec["H"], 8 * spec["W"]), global_batch=spec["B"], **weights, **given,
    )  # fmt: skip
    reference.fill(built)
    built.uniform = ascending
    return entry, tensors, built, reference.batch_of(tensors.target)


def heads(student, teacher):
    return reference.outputs({"head": student}), reference.outputs({"head": teacher})


def fill_queue(queue, seed):
    size = (queue.num_classes, queue.size, queue.rows.shape[1])
    queue.entries.copy_(unit(reference.recipe(seed, size), -1))


@pytest.mark.parametrize("name", reference.names("cirkd_minibatch"))
def test_published_minibatch(name):
    entry, given, method, batch = golden(name, "cirkd", ["minibatch_pixel"])
    ours = method(*heads(given.student_feature, given.teacher_feature), batch)
    reference.check(ours["minibatch_pixel"], entry["terms"]["minibatch_pixel"], [given.student_feature])


@pytest.mark.parametrize("name", reference.names("cirkd_memory"))
def test_published_memory(name):
    spec = reference.LOSSES[name]["spec"]
    entry, given, method, batch = golden(
        name, "cirkd", ["memory_pixel", "memory_region"], pixel_queue=spec["pixel_memory_size"], region_queue=spec["region_memory_size"],
        pixel_samples=spec["num_classes"] * (spec["pixel_contrast_size"] - 1),  # the entry counts samples per class
        region_samples=spec["num_classes"] * (spec["region_contrast_size"] - 1), released_queue=True,
    )  # fmt: skip
    pixel, region = method.queues["pixel"], method.queues["region"]
    fill_queue(region, spec["base_seed"] + 8)
    fill_queue(pixel, spec["base_seed"] + 9)
    ours = method(*heads(given.student_feature, given.teacher_feature), batch)
    for term in ("memory_pixel", "memory_region"):
        reference.check(ours[term], entry["terms"][term], [given.student_feature])
    after = entry["queue_after"]
    assert pixel.pointer.tolist() == after["pixel_ptr"] and region.pointer.tolist() == after["segment_ptr"]
    assert pixel.entries.sum().item() == pytest.approx(after["pixel_sum"], rel=1e-4)
    assert region.entries.sum().item() == pytest.approx(after["segment_sum"], rel=1e-4)


@pytest.mark.parametrize("name", reference.names("cirkdv2_channel"))
def test_published_channels(name):
    spec = reference.LOSSES[name]["spec"]
    terms = ["minibatch_channel", "channel_mse", "memory_channel"]
    entry, given, method, batch = golden(
        name, "cirkdv2", terms, channel_queue=spec["channel_memory_size"], channel_samples=spec["channel_contrast_size"]
    )
    fill_queue(method.queues["channel"], spec["base_seed"] + 10)
    method.context = torch.nn.Identity()
    ours = method(*heads(given.student_feature, given.teacher_feature), batch)
    for term in terms:
        reference.check(ours[term], entry["terms"][term], [given.student_feature])


@pytest.mark.parametrize("name", reference.names("cirkdv2_gcn"))
def test_published_context(name):
    entry = reference.LOSSES[name]
    given = reference.inputs(entry["spec"])
    context = Context(entry["spec"]["student_channels"])
    reference.fill(context)
    value = context(given.student_feature).square().mean()
    reference.check(value, entry["terms"]["sum_of_squares_mean"], [given.student_feature])


# --- similarities


def plain_kl(student, student_keys, teacher, teacher_keys, temperature, weights):
    """All similarities at once."""
    s = torch.einsum("rc,gmc->grm", student, student_keys) / temperature
    t = torch.einsum("rc,gmc->grm", teacher, teacher_keys) / temperature
    kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)  # (G, R)
    return (kl.mean(0) * weights).sum()


@pytest.mark.parametrize("block", [1, 40, None])
def test_blocked_similarities_are_the_plain_ones(block):
    generator = torch.Generator().manual_seed(0)
    student, student_keys, teacher, teacher_keys, weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(23, 5), (3, 13, 5), (23, 7), (3, 13, 7), (23,)]
    )
    inputs = [student.requires_grad_(), student_keys.requires_grad_()]
    ours = similarity_kl(student, student_keys, teacher, teacher_keys, 0.3, weights, block)
    theirs = plain_kl(student, student_keys, teacher, teacher_keys, 0.3, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    for a, b in zip(*(torch.autograd.grad(3 * loss, inputs) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert similarity_kl(student, student_keys, teacher, teacher_keys, 0.3).item() == pytest.approx(
        plain_kl(student, student_keys, teacher, teacher_keys, 0.3, torch.full((23,), 1 / 23)).item(), rel=1e-7
    )


def test_pairs_of_images_one_by_one():
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(3, 6, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 8, 3, 5, generator=generator, dtype=torch.float64)
    ours = minibatch_relation(pixels(unit(student, 1)), pixels(unit(teacher, 1)), 0.1)
    s, t = F.normalize(student, dim=1).flatten(2), F.normalize(teacher, dim=1).flatten(2)
    pairs = []
    for i in range(3):
        for j in range(3):
            p, q = (t[i].T @ t[j] / 0.1).softmax(1), (s[i].T @ s[j] / 0.1).softmax(1)
            pairs.append((p * (p / q).log()).sum(1).mean())
    theirs = torch.stack(pairs).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)), rtol=1e-9, atol=1e-12)


def test_similarities_are_never_whole():
    """No tensor of the forward or backward pass is larger than a block or the inputs."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    student, teacher = torch.randn(400, 4, requires_grad=True), torch.randn(400, 4)
    with Watch():
        similarity_kl(student, student[None], teacher, teacher[None], block=4000).backward()
    assert 0 < largest <= 4000


def test_a_dead_position_gets_no_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    y = unit(x, 1)
    y.sum().backward()
    assert y.tolist() == [[0, 0], pytest.approx([0.6, 0.8])] and x.grad[0].tolist() == [0, 0] and x.grad[1].abs().max() > 0


def test_pairs_nearer_to_the_teacher_lose_less():
    teacher, noise = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    losses = [minibatch_relation(unit(teacher + step * noise, -1), unit(teacher, -1)).item() for step in (0.0, 0.3, 1.0, 3.0)]
    assert losses == sorted(losses) and losses[0] == pytest.approx(0, abs=1e-5) and losses[-1] > 0.1


# --- queues


def ring(rows, pointer, entries, counts):
    """The rule of the released queue, one image and class after the other, on lists of arrays."""
    size = rows.shape[1]
    for b in range(len(entries)):
        for k in range(len(rows)):
            n = int(counts[b, k])
            if n == 0:
                continue
            if pointer[k] + n >= size:
                rows[k, size - n :] = entries[b, k, :n]
                pointer[k] = 0
            else:
                rows[k, pointer[k] : pointer[k] + n] = entries[b, k, :n]
                pointer[k] += n


def test_ring_wraps_as_one_image_after_the_other():
    random = np.random.RandomState(0)
    for images, most, size in [(3, 4, 12), (3, 4, 15), (1, 5, 5), (4, 1, 7), (2, 8, 50)]:
        queue = Queue(6, size, 3, seed=0)
        rows, pointer = queue.entries.numpy().copy(), np.zeros(6, dtype=int)
        for _ in range(12):
            entries = random.standard_normal((images, 6, most, 3)).astype(np.float32)
            counts = random.randint(0, most + 1, (images, 6)) * (random.rand(images, 6) < 0.8)
            slot, stored, _ = queue.slots(torch.from_numpy(counts), most)
            for k in range(6):
                written = slot[:, k][stored[:, k]]
                assert written.numel() == written.unique().numel(), "two writes to one slot have no order on a GPU"
            queue.enqueue(torch.from_numpy(entries), torch.from_numpy(counts))
            ring(rows, pointer, entries, counts)
            assert queue.pointer.tolist() == pointer.tolist()
            np.testing.assert_array_equal(queue.entries.numpy(), rows)
            assert queue.rows[-1].abs().max() == 0


def test_queue_holds_features_of_its_own_class():
    """Every stored pixel is a teacher's pixel of that class; the slip that the release has stores others."""
    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(3, 6, 70, generator=generator), torch.randint(0, 5, (3, 70), generator=generator, dtype=torch.uint8)
    labels[labels == 4] = 255
    labels[0, labels[0] == 1] = 3
    labels[1, :] = torch.where(torch.arange(70) < 20, labels[1], 255)
    noise = torch.rand(3, 70, generator=generator)

    def purity(released):
        vectors, counts = class_pixels(features, labels, noise, 5, 16, released)
        hits, picks = 0, 0
        for b in range(3):
            for k in range(5):
                n = int((labels[b] == k).sum())
                assert counts[b, k] == min(n, 16)
                own = features[b, :, labels[b] == k].T
                stored = [tuple(v.tolist()) for v in vectors[b, k, : counts[b, k]]]
                assert len(set(stored)) == len(stored), "the same pixel twice"
                hits += len(set(stored) & {tuple(v.tolist()) for v in own})
                picks += len(stored)
        return hits / picks

    assert purity(False) == 1 and purity(True) < 0.5


def test_released_slip_takes_the_first_positions():
    features, labels = torch.arange(12.0).view(1, 1, 12), torch.tensor([[1] * 6 + [0] * 4 + [255] * 2])
    vectors, counts = class_pixels(features, labels, torch.rand(1, 12), 2, 3, released=True)
    assert counts.tolist() == [[3, 3]] and vectors[0, 0].max() < 4 and vectors[0, 1].max() < 6
    vectors, _ = class_pixels(features, labels, torch.rand(1, 12), 2, 3)
    assert set(vectors[0, 0].flatten().tolist()) <= {6.0, 7.0, 8.0, 9.0}


def test_regions_are_the_directions_of_means():
    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(2, 6, 30, generator=generator), torch.randint(0, 3, (2, 30), generator=generator)
    labels[1, labels[1] == 2] = 255
    vectors, present = class_means(features, labels, 3)
    assert present.tolist() == [[1, 1, 1], [1, 1, 0]]
    for b, k in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        torch.testing.assert_close(vectors[b, k, 0], F.normalize(features[b][:, labels[b] == k].mean(1), dim=0))


def test_sample_takes_the_same_slots_of_every_class():
    queue = Queue(3, 10, 2, seed=0)
    noise = torch.rand(10)
    keys = queue.sample(noise, 4)
    assert torch.equal(keys, queue.entries[:, noise.argsort()[:4]].reshape(12, 2))
    assert queue.sample(noise, 11).shape == (30, 2)


def test_queues_start_as_unit_vectors_of_the_seed():
    a, b, c = (build_queues("cirkd", {"pixel": (3, 40, 8)}, seed, 1)["pixel"] for seed in (0, 0, 1))
    torch.testing.assert_close(a.entries.norm(dim=-1), torch.ones(3, 40))
    assert torch.equal(a.rows, b.rows) and not torch.equal(a.rows, c.rows)
    assert set(a.state_dict()) == {"rows", "pointer"}


def sizes(**given):
    queues = {f"{kind}_queue": size for kind, size in (("pixel", 200), ("region", 20)) if given.get(f"memory_{kind}_weight", 1)}
    return {"student": {"head": 8}, "teacher": {"head": 16}, "crop": (64, 64), **queues, **given}


def test_refusals_and_announcement(caplog):
    with caplog.at_level(logging.INFO, logger="segkd"):
        reference.build("cirkd", **sizes(kd_weight=0.0))
    assert "cirkd: pixel queue of 5 x 200 vectors of 16 numbers, 0 MiB" in caplog.text
    with pytest.raises(ValueError, match="lower --cirkdv2-pixel-queue, or raise --cirkdv2-memory-limit-mib 1") as error:
        reference.build("cirkdv2", **sizes(pixel_queue=20000, memory_limit_mib=1))
    assert "5 x 20000 x 16" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--cirkd-pixel-queue 20: 2 images may add 32 pixels"):
        reference.build("cirkd", **sizes(pixel_queue=20))
    with pytest.raises(ValueError, match="--cirkdv2-channel-updates 300"):
        reference.build("cirkdv2", **sizes(channel_updates=300, channel_queue=200))


# --- the methods


def example(batch=2, seed=0, grid=(8, 8)):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, 8, *grid, generator=generator, requires_grad=True)
    teacher = torch.randn(batch, 16, *grid, generator=generator)
    target = torch.randint(0, 5, (batch, *grid), generator=generator, dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return student, teacher, target


def test_no_label_leaves_queues_alone_and_the_loss_at_a_connected_zero():
    student, teacher, target = example()
    method = reference.build("cirkd", **sizes(**only("memory_pixel", "memory_region")))
    before = {key: value.clone() for key, value in method.queues.state_dict().items()}
    terms = method(*heads(student, teacher), reference.batch_of(torch.full_like(target, 255)))
    assert [value.item() for value in terms.values()] == [0, 0]
    sum(terms.values()).backward()
    assert student.grad.abs().max() == 0
    assert all(torch.equal(value, before[key]) for key, value in method.queues.state_dict().items())


def test_memory_is_the_mean_over_labelled_pixels_of_the_plain_form():
    student, teacher, target = example()
    target[:, :, :24] = 255
    method = reference.build("cirkd", **sizes(**only("memory_pixel"), pixel_samples=50)).double()
    terms = method(*heads(student.double(), teacher.double()), reference.batch_of(target))
    queue = method.queues["pixel"]  # after the step: what the step was compared with
    slots = method.common_noise(reference.batch_of(target), 200).argsort()[:11]  # 50 // 5 + 1
    keys = queue.entries[:, slots].flatten(0, 1)
    losses = []
    anchors = method.project(student.double())
    for b in range(2):
        for y in range(8):
            for x in range(3, 8):
                p = (F.normalize(teacher[b, :, y, x].double(), dim=0) @ keys.T / 0.1).log_softmax(0)
                q = (F.normalize(anchors[b, :, y, x], dim=0) @ keys.T / 0.1).log_softmax(0)
                losses.append((p.exp() * (p - q)).sum())
    torch.testing.assert_close(terms["memory_pixel"], torch.stack(losses).mean(), rtol=1e-9, atol=0)


def test_entries_of_a_step_are_its_teacher_features():
    student, teacher, target = example()
    method = reference.build("cirkd", **sizes(**only("memory_pixel", "memory_region")))
    method(*heads(student, teacher), reference.batch_of(target))
    labels, features = target[:, ::8, ::8], unit(teacher, 1)
    for k in range(5):
        own = features.movedim(1, -1)[labels == k]  # (pixels, C)
        stored = method.queues["pixel"].entries[k, : method.queues["pixel"].pointer[k]]
        assert len(stored) == sum(min(16, int((image == k).sum())) for image in labels)
        assert torch.cdist(stored, own, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() == 0


def test_a_restored_method_goes_on_as_if_never_stopped():
    def step(method, number):
        student, teacher, target = example(seed=number)
        return [value.item() for value in method(*heads(student, teacher), reference.batch_of(target, step=number)).values()]

    weights = only(*V2_TERMS[1:], terms=V2_TERMS)
    straight = reference.build("cirkdv2", **sizes(**weights))
    step(straight, 1)
    resumed = reference.build("cirkdv2", **sizes(**weights))
    resumed.load_state_dict({key: value.clone() for key, value in straight.state_dict().items()})
    assert step(straight, 2) == step(resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True))


@pytest.mark.parametrize("name,terms", [("cirkd", CIRKD_TERMS), ("cirkdv2", V2_TERMS)])
def test_nothing_is_read_back_from_the_device(name, terms):
    """No operation whose result's size or value the host has to wait for."""
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "bincount", "_assert_async")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            assert not any(word in str(function) for word in waiting), str(function)
            boolean = "aten.index" in str(function) and any(isinstance(a, torch.Tensor) and a.dtype == torch.bool for a in arguments[1])
            assert not boolean, f"{function} with a mask"
            return function(*arguments, **(keywords or {}))

    student, teacher, target = example()
    method = reference.build(name, **sizes(**only(*terms[1:], terms=terms)))
    batch = reference.batch_of(target)
    with Watch():
        total = sum(method(*heads(student, teacher), batch).values())
        total.backward()


def test_context_serves_the_feature_terms_alone():
    student, teacher, target = example()
    logits = {"logits": torch.randn(2, 5, 8, 8)}
    student_output = reference.outputs({"head": student, "logits": logits["logits"].clone().requires_grad_()})
    teacher_output = reference.outputs({"head": teacher, **logits})
    channels = {"student": {"head": 8, "logits": 5}, "teacher": {"head": 16, "logits": 5}}
    both = [reference.build(name, **sizes(**channels)) for name in ("cirkd", "cirkdv2")]
    terms = [method(student_output, teacher_output, reference.batch_of(target)) for method in both]
    assert terms[0]["kd"].item() == terms[1]["kd"].item() == pytest.approx(0, abs=1e-6)
    assert terms[0]["minibatch_pixel"].item() != terms[1]["minibatch_pixel"].item()
    refined = both[1].context(student)
    torch.testing.assert_close(terms[1]["fitnet"], F.mse_loss(F.conv2d(refined, both[1].regress.weight), teacher))
    torch.testing.assert_close(terms[1]["minibatch_pixel"], both[0].minibatch_pixel(refined, teacher))
    assert not hasattr(reference.build("cirkdv2", **sizes(**only("kd", terms=V2_TERMS))), "context")


def test_fitnet_weight_is_the_published_one():
    for dataset, value in {"citys": 1.0, "voc": 10.0, "coco_stuff_182": 10.0}.items():
        assert reference.build("cirkdv2", dataset=dataset, **sizes(channel_queue=300)).weights["fitnet"] == value
    assert reference.build("cirkd", dataset="voc", **sizes()).weights["memory_pixel"] == 0.01


def test_large_maps_are_pooled_first_in_version_two():
    method = reference.build("cirkdv2", **sizes(**only("minibatch_pixel", terms=V2_TERMS)))
    student, teacher = torch.randn(1, 8, 256, 256), torch.randn(1, 16, 256, 256)
    pooled = minibatch_relation(pixels(unit(F.avg_pool2d(student, 4), 1)), pixels(unit(F.avg_pool2d(teacher, 4), 1)))
    assert method.minibatch_pixel(student, teacher).item() == pooled.item()


def test_channels_have_one_length_for_every_stride():
    x = torch.arange(13.0 * 17).view(1, 1, 13, 17)
    pooled = pool_to(x, (4, 5))
    assert pooled.shape == (1, 1, 4, 5)
    assert pooled[0, 0, 0, 0] == x[0, 0, :4, :4].mean() and pooled[0, 0, 3, 4] == x[0, 0, 12, 16]
    fine = torch.randn(1, 2, 32, 48)  # stride 4 of the crop whose stride 8 map has the grid 4 x 6
    torch.testing.assert_close(pool_to(fine, (4, 6)), F.avg_pool2d(fine, 8))
    student, teacher, target = example(grid=(13, 17))
    method = reference.build("cirkdv2", **sizes(crop=(104, 136), **only("memory_channel", terms=V2_TERMS)))
    assert method.queues["channel"].rows.shape == (10001, 20)
    method(*heads(student, teacher), reference.batch_of(target))
    assert method.queues["channel"].pointer.tolist() == [2 * 16]


# --- ranks


def two_steps(rank, world) -> dict:
    """What a rank with its share of four images has after two steps: queues, loss and gradient of the gathered pairs."""
    student, teacher, target = example(batch=4)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    part = student.detach()[mine].requires_grad_()
    weights = only("minibatch_pixel", "memory_pixel", "memory_region", "memory_channel", terms=V2_TERMS)
    method = reference.build("cirkdv2", global_batch=4, gather=True, **sizes(**weights))
    method.context = torch.nn.Identity()  # its BatchNorm, like every one on a CPU, sees the rank's own images
    for step in (1, 2):
        terms = method(*heads(part, teacher[mine]), reference.batch_of(target[mine], step=step, offset=mine.start, global_size=4))
    terms["minibatch_pixel"].backward()
    return {"queues": method.queues.state_dict(), "loss": terms["minibatch_pixel"].item(), "gradient": part.grad}


def on_a_rank(rank, world, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init("cpu")
    torch.save(two_steps(rank, world), f"{folder}/{rank}.pt")
    distributed.shutdown()


def test_two_ranks_are_one_with_all_images(tmp_path):
    """Queues equal bit for bit on both ranks and to those of one process; gathered pairs give its loss and gradient."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(on_a_rank, (2, port, str(tmp_path)), nprocs=2)
    alone = two_steps(0, 1)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in alone["queues"].items():
        assert torch.equal(value, first["queues"][key]) and torch.equal(value, second["queues"][key]), key
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    # DDP takes the mean over the ranks
    torch.testing.assert_close(torch.cat([first["gradient"], second["gradient"]]) / 2, alone["gradient"], rtol=1e-4, atol=1e-8)
