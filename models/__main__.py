"""`python -m models`: every model with its cost at 19 classes; takes a minute or two, needs no accelerator."""

import torch

from . import AUXILIARY, FIELDS, build_model, count_macs, count_parameters, list_models

ORDER = [name for name in FIELDS if name not in AUXILIARY and name[0] != "p"]


def main() -> None:
    print("19 classes, one 3x512x512 image; params and GMAC include the auxiliary head, as published; logits: GMAC without it\n")
    print(f"{'model':13} {'backbone':25} {'stride':>6} {'params M':>9} {'GMAC':>7} {'logits':>7} {'aux':>3}  channels of {' '.join(ORDER)}")
    for name, backbone in list_models():
        with torch.device("meta"):
            model = build_model(name, backbone, 19)
        gmacs = [count_macs(model, 512, 512, needs) / 1e9 for needs in (model.channels, ("logits",))]
        row = f"{name:13} {backbone:25} {model.stride:6} {count_parameters(model) / 1e6:9.2f} {gmacs[0]:7.1f} {gmacs[1]:7.1f}"
        print(row, "yes" if "aux" in model.channels else " no", "", *(model.channels[field] for field in ORDER))


if __name__ == "__main__":
    main()
