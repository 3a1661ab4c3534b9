"""What training does to confidence, as a picture: accuracy against confidence, clean and under attack.

    python -m benchmarks.training_figure runs/training-mnist docs/images/confidence-mnist.png

One panel per objective named by --show, in which the seeds are pooled; the area of a dot is the bin's share of the
samples. Attacked means the last points of PGD on every image. Above the diagonal a network is less sure than it should
be, below it surer.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.training_claims import Table, told_by
from maodun.arena.calibration import calibrate, equal_width

SIDE, EDGE, SCALE = 260, 46, 2
COLOURS = ((31, 90, 166), (200, 72, 40))
GREY = (120, 128, 140)


def panel(draw: ImageDraw.ImageDraw, left: int, title: str, said: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Draw one panel whose top left corner is (left, EDGE)."""
    font = ImageFont.load_default(12 * SCALE)

    def at(x: float, y: float) -> tuple[float, float]:
        return SCALE * (left + SIDE * x), SCALE * (EDGE + SIDE * (1 - y))

    draw.rectangle((*at(0, 1), *at(1, 0)), outline=GREY, width=SCALE)
    draw.line((*at(0, 0), *at(1, 1)), fill=GREY, width=SCALE)
    for mark in (0.0, 0.5, 1.0):
        x, y = at(mark, 0)
        draw.text((x, y + 4 * SCALE), f"{mark:g}", fill=GREY, font=font, anchor="ma")
        x, y = at(0, mark)
        draw.text((x - 5 * SCALE, y), f"{mark:g}", fill=GREY, font=font, anchor="rm")
    x, y = at(0.5, 1)
    draw.text((x, y - 22 * SCALE), title, fill=(0, 0, 0), font=ImageFont.load_default(14 * SCALE), anchor="ma")
    for place, (name, pair) in enumerate(said.items()):
        colour, bins, scores = COLOURS[place], equal_width(*pair), calibrate(*pair)
        points = [
            (float(c), float(a), float(s)) for c, a, s in zip(bins.confidence, bins.accuracy, bins.share, strict=True)
        ]
        shown = [(*at(c, a), s) for c, a, s in points if s > 0]
        draw.line([(x, y) for x, y, _ in shown], fill=colour, width=2 * SCALE)
        for x, y, share in shown:
            r = SCALE * (2 + 12 * share**0.5)
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=2 * SCALE)
        text = f"{name}: over {scores.over:.2f}, under {scores.under:.2f}"
        x, y = at(0, -0.12 - 0.07 * place)
        draw.text((x, y), text, fill=colour, font=font, anchor="la")


def main() -> None:
    """Draw the panels side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("out")
    parser.add_argument("--show", default="undefended,PGD training,PGD training + ACE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int)
    options = parser.parse_args()
    names = options.show.split(",")
    answers = told_by(Table(options.run.split("+")).manifests, options.steps, options.images, names)
    size = (SCALE * (EDGE + len(names) * (SIDE + EDGE)), SCALE * (SIDE + EDGE + 70))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for place, name in enumerate(names):
        pooled = {
            kind: (torch.cat([p for p, _ in told[name]]), torch.cat([y for _, y in told[name]]))
            for kind, told in answers.items()
        }
        panel(draw, EDGE + place * (SIDE + EDGE), name, pooled)
    picture.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
