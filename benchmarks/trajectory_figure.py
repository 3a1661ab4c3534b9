"""`python -m benchmarks.trajectory_figure OUT.png`: what the diffusion filter does to a few images, move by move.

Two rows per image: the clean one and the adversarial one of PGD against the undefended model. Columns: the input, the
image after the diffusion to t*, after every reverse step, and the classifier's answers before and behind the filter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

CELL, GAP, WORDS = 72, 6, 150


def sheet(rows: list[tuple[str, Tensor, str]], heads: list[str]) -> Image.Image:
    """Return a picture with a row per (words before, K x C x H x W images, words behind)."""
    count = len(heads)
    width = WORDS + count * (CELL + GAP) + WORDS
    page = Image.new("RGB", (width, 24 + len(rows) * (CELL + GAP)), "white")
    pen = ImageDraw.Draw(page)
    for k, head in enumerate(heads):
        pen.text((WORDS + k * (CELL + GAP) + 4, 6), head, fill="black")
    for r, (before, images, behind) in enumerate(rows):
        top = 24 + r * (CELL + GAP)
        pen.text((6, top + CELL // 2 - 12), before, fill="black")
        pen.text((WORDS + count * (CELL + GAP) + 6, top + CELL // 2 - 12), behind, fill="black")
        for k, image in enumerate(images):
            levels = (image * 255).round().clamp(0, 255).to(torch.uint8)
            array = (levels[0] if levels.shape[0] == 1 else levels.permute(1, 2, 0)).numpy()
            cell = Image.fromarray(array).convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(cell, (WORDS + k * (CELL + GAP), top))
    return page


def main() -> None:
    """Draw the page."""
    import maodun
    from maodun.defenses.purification import CLEAN
    from maodun.zoo import load_model
    from maodun.zoo.data import load_data
    from maodun.zoo.scores import find_score

    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("out")
    words.add_argument("--model", default="zoo:mnist-cnn")
    words.add_argument("--data", default="mnist")
    words.add_argument("--score", default="zoo:score-mnist")
    words.add_argument("--t-star", type=float, default=0.4)
    words.add_argument("--steps", type=int, default=5)
    words.add_argument("--eps", type=float, default=0.3)
    words.add_argument("--images", type=int, default=3)
    asked = words.parse_args()
    torch.set_num_threads(1)
    model, data = load_model(asked.model).model, load_data(asked.data, limit=asked.images)
    found = maodun.attack(model, data.x, data.y, "pgd", norm="linf", eps=asked.eps, steps=40)
    filter_ = maodun.DiffusionFilter(find_score(asked.score), t_star=asked.t_star, steps=asked.steps)
    heads = ["input", *(f"t={s + 1}" if s != CLEAN else "output" for _, s in filter_.moves())]
    names, rows = data.classes, []
    paths = [filter_.trajectory(x) for x in (data.x, found.x_adv)]
    for i in range(asked.images):
        for word, path in zip(("clean", f"PGD, {asked.eps:g}"), paths, strict=True):
            with torch.no_grad():
                first, last = (str(names[int(model(path[k][i : i + 1]).argmax())]) for k in (0, -1))
            rows.append((f"{word}\nseen as {first}", path[:, i], f"seen as {last}"))
    sheet(rows, heads).save(Path(asked.out), optimize=True)


if __name__ == "__main__":
    main()
