"""Networks that are built elsewhere, as teachers: a function that builds one, and its layers by name.

    python train_kd.py --method kd cwd --teacher-model my_package.my_module:build --teacher-checkpoint FILE \\
        --teacher-layers c4=backbone.layer4 head=classifier.3 ...

imports `my_package.my_module`, which runs its code. Nothing else in this project imports what a user names. Students, and the networks
that eval.py scores, are this project's.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .normalization import Normalized
from .output import FIELDS, SegOutput
from .weights import load_matching, read_state


class Foreign(Normalized):
    """Any network that maps (B, 3, H, W) to class scores, with layers of it as the fields of SegOutput; in evaluation mode.

    Attributes as of Segmentor: config, channels, num_classes, norms. macs: multiply-adds of one picture of the given size.

    Args:
        net: what it returns is a tensor (B, K, h, w), a mapping with "out" (torchvision's) or "logits", or a tuple that begins with it.
        name: for messages.
        layers: field -> dotted name of the layer whose output it is; `logits` is what the network returns unless a layer is named.
            A layer that runs several times in one pass gives the last output.
        size: (height, width) of pictures, for the pass that finds the channels.
        normalization: a name in NORMALIZATIONS.

    Raises:
        ValueError: one line; there is no such field or layer, or it gives no map of features.
    """

    def __init__(self, net: nn.Module, name: str, layers: dict[str, str], size: tuple[int, int], normalization: str = "imagenet"):
        super().__init__({"model": name, "backbone": "", "in_channels": 3, "normalization": normalization})
        self.net, self.layers, self.norms = net.eval(), layers, {}
        known = dict(net.named_modules())
        for field, layer in layers.items():
            if field not in FIELDS:
                raise ValueError(f"--teacher-layers {field}={layer}: no field is called {field!r}; possible: {', '.join(FIELDS)}")
            if layer not in known:
                close = get_close_matches(layer, known, 3) or [child for child, _ in net.named_children()]
                raise ValueError(f"--teacher-layers {field}={layer}: {name} has no layer {layer!r}; near it: {', '.join(close)}")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            maps = self.maps(torch.zeros(1, 3, *size), {"logits", *layers})
        for field, value in maps.items():
            self.check_order(field, value.shape, size)
            if not value.isfinite().all():
                raise ValueError(f"{name}: {self.who(field)} gives NaN or infinite values for {field!r} from a black picture; mend its weights")
        self.macs = counter.get_total_flops() // 2  # torch counts two per multiply-add
        self.channels = Channels({field: maps[field].shape[1] for field in FIELDS if field in maps})
        self.num_classes = self.channels["logits"]

    def maps(self, image: Tensor, needs: set[str]) -> dict[str, Tensor]:
        """Field -> (B, C, h, w)."""
        with outputs_of({field: self.net.get_submodule(self.layers[field]) for field in needs & self.layers.keys()}) as found:
            result = self.net(self.normalize(image))
        if "logits" in needs:
            found.setdefault("logits", result)
        return {field: self.map_of(field, found.get(field)) for field in needs}

    def map_of(self, field: str, value) -> Tensor:
        """The map (B, C, h, w) in what the network or a layer returned."""
        found = value
        if isinstance(value, Mapping):
            value = value.get("out", value.get("logits"))
        elif isinstance(value, (tuple, list)) and value:
            value = value[0]
        if isinstance(value, Tensor) and value.dim() == 4:
            return value
        found = "nothing" if found is None else f"a {type(found).__name__}" + (f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "")
        raise ValueError(
            f"{self.config['model']}: {self.who(field)} gives {found} for {field!r}, not (B, C, h, w); give another --teacher-layers {field}=LAYER"
        )

    def who(self, field: str) -> str:
        """What gives a field, for messages."""
        return f"layer {self.layers[field]}" if field in self.layers else "the network"

    def check_order(self, field: str, shape: tuple[int, ...], size: tuple[int, int]) -> None:
        """ValueError where a map has the sides of a picture of this size in the places of channels and rows, and not in those of sides."""
        if not proportional(shape[2:], size) and proportional(shape[1:3], size):
            remedy = "give a layer that comes before or after" if field in self.layers else "return permute(0, 3, 1, 2) of it"
            raise ValueError(
                f"{self.config['model']}: {self.who(field)} gives {tuple(shape)} for {field!r} from a picture of {size[0]}x{size[1]}: "
                f"(B, h, w, C), not (B, C, h, w); {remedy}"
            )

    def forward(self, image: Tensor, needs: Iterable[str] = ("logits",)) -> SegOutput:
        """(B, 3, H, W) uint8 or float, RGB in 0..255 -> SegOutput with the fields that are named in `needs`."""
        return SegOutput(**self.maps(image, set(needs)))


def proportional(sides: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether a map's height and width are a picture's, both divided by one stride; a row or a column may come from rounding or padding."""
    (height, width), (rows, columns) = size, sides
    return abs(rows * width / height - columns) <= 1 + width / height


class Channels(dict):
    """Field -> number of channels; asking for a field that has no layer says what to do."""

    def __missing__(self, field):
        raise ValueError(f"{field!r} of the teacher is read, but no layer is named for it; add {field}=LAYER to --teacher-layers")


@contextmanager
def outputs_of(modules: dict[str, nn.Module]):
    """{name: output of the module's last call inside the context}; tensors are copied, as a ReLU behind it may overwrite them."""
    outputs = {}

    def keep(name):
        return lambda module, args, output: outputs.update({name: output.clone() if isinstance(output, Tensor) else output})

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def build_foreign(name: str, checkpoint: str | None, layers: Iterable[str], size: tuple[int, int], normalization: str | None) -> tuple[Foreign, str]:
    """The teacher and a report for the log.

    Args:
        name: "package.module:function"; the function takes nothing and returns a network. Its module is found as python finds
            modules, for example in the folders of PYTHONPATH.
        checkpoint: file with the network's state dict; None if the function returns it with its weights.
        layers: "field=layer" each.
        size, normalization: see `Foreign`; None for imagenet.

    Raises:
        ValueError: one line (then a table where tensors do not fit): no such module, function, file, field or layer.
    """
    net = import_function(name)()
    if not isinstance(net, nn.Module):
        raise ValueError(f"--teacher-model {name}: returned a {type(net).__name__}; it must return a torch.nn.Module")
    report = f"{name}, weights as built"
    if checkpoint is not None:
        report = f"{name}; {load_matching(net, read_state(checkpoint)[0], str(checkpoint), allowed=lambda row: False)}"
    pairs = {}
    for token in layers:
        field, equals, layer = token.partition("=")
        if not equals or not layer or field in pairs:
            raise ValueError(f"--teacher-layers {token}: give FIELD=LAYER, every field once, such as c4=backbone.layer4")
        pairs[field] = layer
    return Foreign(net, name, pairs, size, normalization or "imagenet"), report


def import_function(name: str) -> Callable:
    """The function of "package.module:function"; imports the module."""
    module_name, _, function = name.partition(":")
    if not all((*module_name.split("."), function)):
        raise ValueError(f"--teacher-model {name}: give PACKAGE.MODULE:FUNCTION, such as my_package.my_module:build")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # a module that theirs imports
            raise
        raise ValueError(f"--teacher-model {name}: there is no module {error.name!r}; put the folder that holds it on PYTHONPATH") from error
    found = getattr(module, function, None)
    if not callable(found):
        close = get_close_matches(function, vars(module), 1)
        raise ValueError(f"--teacher-model {name}: {module_name} has no function {function!r}" + (f" (did you mean {close[0]}?)" if close else ""))
    return found
