"""Networks as the code of their model card loads them."""

import re

import torch


def card_accuracy(folder, peer, of="eval_accuracy"):
    card = (folder / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"\| {of}{peer} \| ([\d.]+) \|", card)
    return float(found[1])


def loaded_by_card(folder):
    """The variables that each block of code in the card leaves."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        names = {}
        exec(block.replace("FOLDER", str(folder)), names)
        yield names


def predictor(names):
    """Picture -> class, as the code of the card prepares it."""
    network = names["network"].eval()
    if "transform" in names:
        prepare = lambda picture: names["transform"](picture)[None]  # noqa: E731
    else:
        prepare = lambda picture: names["processor"](picture, return_tensors="pt")["pixel_values"]  # noqa: E731

    @torch.no_grad()
    def predict(picture):
        output = network(prepare(picture))
        return getattr(output, "logits", output).argmax(-1).item()

    return predict
