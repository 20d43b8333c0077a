"""CIRKD: what a pixel resembles in other images, and in a memory of earlier ones."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from losses.base import IGNORE, Method, option, term_weight
from losses.functional import labels_like, pixel_kl, resize_like, similarity_kl, unit
from losses.memory import build_queues, class_means, class_pixels
from utils import distributed

PIXELS_PER_CLASS = 16  # of one image, that enter the memory


# terms inside a batch and with memories; the channels' are of CIRKDv2
RELATIONS, MEMORIES = ("minibatch_pixel", "minibatch_channel"), ("memory_pixel", "memory_region", "memory_channel")


class CIRKD(Method):
    """The student's pixels shall resemble other pixels as much as the teacher's do, across images; features are `head`, unit over C.

    Term `minibatch_pixel`: for all B^2 ordered pairs of images, KL(teacher || student) of softmax(f_i . F_j / 0.1) over the pixels
    of j, averaged over pixels and pairs. Terms `memory_pixel` and `memory_region`: the student, projected to the teacher's width,
    and the teacher are both compared with a sample of the teacher's features of earlier steps, with one softmax over all classes'
    samples, averaged over the pixels that have a label. The memory holds pixels and regions (the mean of a class in an image) in
    one queue per class; the batch is enqueued before it is contrasted. Term `kd` is plain KD with T = 1.

    All terms are per-pixel means with the published weights: factor 1 to the paper's numbers.

    Memory is linear in the batch: no N x N map is ever whole, whatever the crop. The queues are equal on all ranks because every
    rank enqueues every rank's features, with random numbers that depend on no rank.

    Differs from the released code: up to 16 pixels of a class are taken from the pixels of that class. The release permutes the
    class's pixels but then indexes the image with the permutation, so that it stores the first positions of the image, of any class
    (`released_queue` does the same). A step enqueues all its images at once, which gives the same queues as one after another.
    """

    title = "Cross-image relational knowledge distillation"
    paper = "Yang, Zhou, An, Jiang, Xu, Zhang: Cross-Image Relational Knowledge Distillation for Semantic Segmentation, CVPR 2022"
    url = "https://arxiv.org/abs/2204.06986"

    @dataclass(frozen=True)
    class Options:
        kd_weight: float = term_weight(1.0, "weight of plain KD")
        minibatch_pixel_weight: float = term_weight(1.0, "weight of the relation between the pixels of a batch")
        memory_pixel_weight: float = term_weight(0.1, "weight of the relation to remembered pixels", voc=0.01)
        memory_region_weight: float = term_weight(0.1, "weight of the relation to remembered regions", voc=0.01)
        temperature: float = option(0.1, "softmax temperature of the similarities", above=0, terms=(*RELATIONS, *MEMORIES))
        gather: bool = option(
            False, "compare the images of all ranks instead of each rank's own (with one image per rank that is the image with itself)",
            terms=RELATIONS,
        )
        pixel_queue: int = option(
            20000, "remembered pixels per class (published: 20000, with SegFormer 2000)", minimum=1, shapes=2000, terms=("memory_pixel",)
        )
        region_queue: int = option(2000, "remembered regions per class", minimum=1, shapes=500, terms=("memory_region",))
        pixel_samples: int = option(4096, "remembered pixels of all classes together that one step compares with", minimum=1, terms=("memory_pixel",))
        region_samples: int = option(
            1024, "remembered regions of all classes together that one step compares with", minimum=1, terms=("memory_region",)
        )
        released_queue: bool = option(
            False, "store the first positions of an image as pixels of each class, as the released code does", terms=("memory_pixel",)
        )
        memory_limit_mib: int = option(8192, "refuse queues that together take more than this on every process", minimum=1, terms=MEMORIES)

    def __init__(self, options, setup):
        super().__init__(options, setup)
        features = [term for term in self.weights if term != "kd"]
        # pairs of images; means over drawn and labelled pixels, beside what earlier steps have left in the queues
        pairs = "ranks" if options.gather else "rank"
        self.over_batch = {term: pairs if "minibatch" in term else "rank" for term in self.terms() if "minibatch" in term or "memory" in term}
        self.needs = ("logits",) * self.active("kd") + ("head",) * bool(features)
        self.queues = build_queues(self.name, self.queue_shapes(), setup.seed, options.memory_limit_mib)
        self.remembers = [kind for kind in ("pixel", "region") if kind in self.queues]
        for kind, most in (("pixel", PIXELS_PER_CLASS), ("region", 1)):
            if kind in self.queues and self.queues[kind].size < most * setup.global_batch:
                raise ValueError(
                    f"--{self.name}-{kind}-queue {self.queues[kind].size}: {setup.global_batch} images may add "
                    f"{most * setup.global_batch} {kind}s per class in one step; give at least as many"
                )
        if self.remembers:
            self.project = Projection(setup.student["head"], setup.teacher["head"])

    def queue_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(K, size, C) of every queue that the active terms need."""
        sizes = {"pixel": self.options.pixel_queue, "region": self.options.region_queue}
        return {
            kind: (self.setup.num_classes, size, self.setup.teacher["head"])
            for kind, size in sizes.items()
            if self.active(f"memory_{kind}")
        }

    def forward(self, student, teacher, batch):
        terms = {}
        if self.active("kd"):
            terms["kd"] = pixel_kl(student.logits, resize_like(teacher.logits, student.logits))
        if "head" in self.needs:
            terms |= self.relations(student.head, resize_like(teacher.head, student.head), batch)
        return terms

    def relations(self, student: Tensor, teacher: Tensor, batch) -> dict[str, Tensor]:
        """The terms of the features student (B, Cs, h, w) and teacher (B, Ct, h, w)."""
        terms = {}
        if self.active("minibatch_pixel"):
            terms["minibatch_pixel"] = self.minibatch_pixel(student, teacher)
        if self.remembers:
            terms |= self.memory(student, teacher, batch)
        return terms

    def minibatch_pixel(self, student: Tensor, teacher: Tensor) -> Tensor:
        return minibatch_relation(pixels(unit(student, 1)), pixels(unit(teacher, 1)), self.options.temperature, self.options.gather)

    def memory(self, student: Tensor, teacher: Tensor, batch) -> dict[str, Tensor]:
        """Enqueue the teacher's features of all ranks, then compare the labelled pixels of student and teacher with a sample."""
        options, num_classes = self.options, self.setup.num_classes
        student, teacher = unit(self.project(student), 1), unit(teacher, 1)  # (B, Ct, h, w) both
        labels, features = labels_like(batch.target, teacher).flatten(1), teacher.flatten(2)
        valid = labels != IGNORE
        weights = (valid.to(features.dtype) / valid.sum().clamp(min=1)).flatten()
        terms = {}
        for kind in self.remembers:
            if kind == "pixel":
                noise = self.uniform(batch, labels.shape[1])
                new = class_pixels(features, labels, noise, num_classes, PIXELS_PER_CLASS, options.released_queue)
            else:
                new = class_means(features, labels, num_classes)
            queue = self.queues[kind]
            queue.enqueue(*map(distributed.gather, new))
            keys = queue.sample(self.common_noise(batch, queue.size), getattr(options, f"{kind}_samples") // num_classes + 1)[None]
            terms[f"memory_{kind}"] = similarity_kl(
                pixels(student).flatten(0, 1), keys, pixels(teacher).flatten(0, 1), keys, options.temperature, weights
            )
        return terms

    def common_noise(self, batch, count: int) -> Tensor:
        """(count,) uniform numbers of the global batch's first image: the same on every rank."""
        return self.uniform(replace(batch, offset=0), count)[0]


class Projection(nn.Sequential):
    """1x1 - BatchNorm - ReLU - 1x1, Cs -> Ct -> Ct."""

    def __init__(self, student: int, teacher: int):
        super().__init__(
            nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher), nn.ReLU(), nn.Conv2d(teacher, teacher, 1, bias=False)
        )


def pixels(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C)"""
    return x.flatten(2).transpose(1, 2)


def minibatch_relation(student: Tensor, teacher: Tensor, temperature: float = 0.1, gather: bool = False) -> Tensor:
    """KL of softmax(x_i . y_j / temperature) over the vectors y_j of image j, teacher's to student's, averaged over the vectors x_i and
    all ordered pairs of images (i, j), i = j included.

    Args:
        student, teacher: unit vectors (B, N, C); the widths C may differ.
        gather: pairs of the images of all ranks; every rank computes them all.
    """
    if gather:
        student, teacher = distributed.gather_with_gradient(student), distributed.gather(teacher)
    return similarity_kl(student.flatten(0, 1), student, teacher.flatten(0, 1), teacher, temperature)
