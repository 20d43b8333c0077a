"""What networks expect at their input."""

import torch
from torch import Tensor, nn

# name: (channel order, mean, standard deviation) in units of 0..255
NORMALIZATIONS = {
    "imagenet": ("RGB", (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)),
    "caffe-bgr": ("BGR", (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0)),  # the published weights of the CIRKD line
    "none": ("RGB", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # fed as it is
}


class Normalized(nn.Module):
    """A network that owns its normalisation, since that is part of what its weights mean.

    Args:
        config: what is read here are normalization, a name in NORMALIZATIONS, and in_channels, 3 or 4.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = dict(config)
        order, mean, std = NORMALIZATIONS[config["normalization"]]
        self.bgr = order == "BGR"
        # not persistent: the name in `config` says it all, and published checkpoints have no such keys
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of the weights, in which the network computes: a convolution takes NHWC if one of its operands has it."""
        for weight in self.parameters():
            contiguous = weight.is_contiguous()
            if weight.dim() == 4 and contiguous != weight.is_contiguous(memory_format=torch.channels_last):
                return torch.contiguous_format if contiguous else torch.channels_last
        return torch.preserve_format  # no kernel that would tell

    def normalize(self, image: Tensor) -> Tensor:
        """(B, 3 or 4, H, W) RGB in 0..255, any dtype -> what the network expects, in its dtype and memory format.

        One with four input channels gets the fourth divided by the mean of the colours' deviations (1 for the published weights), so that it
        keeps its strength beside them; zeros if the image has none.
        """
        expected = self.config["in_channels"]
        if image.dim() != 4 or image.shape[1] not in (3, expected):
            possible = "3" if expected == 3 else "3 or 4"
            raise ValueError(f"image has shape {tuple(image.shape)}; this model takes (B, {possible}, H, W)")
        image = image.to(torch.promote_types(self.mean.dtype, torch.float32))  # 0..255 minus a mean needs more than bfloat16's 8 bits
        colour = image[:, :3].flip(1) if self.bgr else image[:, :3]
        colour = (colour - self.mean) / self.std
        if expected == 4:
            fourth = image[:, 3:] / self.std.mean() if image.shape[1] == 4 else torch.zeros_like(image[:, :1])
            colour = torch.cat([colour, fourth], dim=1)
        return colour.to(self.mean.dtype, memory_format=self.layout)
