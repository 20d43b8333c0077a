"""What a model returns: named tensors, so that no caller counts positions."""

from torch import Tensor

FIELDS = ("logits", "head", "c4", "c3", "c2", "c1", "aux", "aux2", "detail", "p4", "p3", "p2", "p1")
AUXILIARY = ("aux", "aux2", "detail")  # of auxiliary heads, for training alone


class SegOutput:
    """The tensors of one forward pass, by name; only those that were asked for are set.

    logits  (B, K, h, w)  class scores at the model's output stride, not upsampled
    head    (B, C, h, w)  input of the last 1x1 classifier
    c4..c1  (B, C, h, w)  stages of the backbone, c4 the deepest
    aux     (B, K, h, w)  class scores of the auxiliary head; aux2: of a second one
    detail  (B, 1, h, w)  score of the detail head: is there a boundary? A logit
    p4..p1  (B, C, h, w)  the stages before the ReLU they end in; equal to c4..c1 where they end in none

    Immutable, and neither indexable nor iterable: `output[-1]` raises TypeError, since a position means another tensor in every
    codebase. Reading a field that was not computed raises AttributeError, so `hasattr(output, "aux")` tells whether it was.
    """

    def __init__(self, **tensors: Tensor):
        unknown = sorted(set(tensors) - set(FIELDS))
        if unknown:
            raise TypeError(f"SegOutput has no field {', '.join(map(repr, unknown))}; possible: {', '.join(FIELDS)}")
        self.__dict__.update(tensors)

    def __getattr__(self, name: str) -> Tensor:  # called only for what is not set
        if name not in FIELDS:
            raise AttributeError(f"SegOutput has no field {name!r}; possible: {', '.join(FIELDS)}")
        raise AttributeError(f"{name!r} was not computed (computed: {', '.join(self.computed)}); a method lists what it reads in `needs`")

    def __setattr__(self, name: str, value) -> None:
        raise AttributeError(f"SegOutput is immutable; {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"SegOutput is immutable; {name!r} cannot be deleted")

    def __repr__(self) -> str:
        return f"SegOutput({', '.join(f'{name}={tuple(getattr(self, name).shape)}' for name in self.computed)})"

    @property
    def computed(self) -> tuple[str, ...]:
        """The names of the fields that are set, in the order of FIELDS."""
        return tuple(name for name in FIELDS if name in self.__dict__)
