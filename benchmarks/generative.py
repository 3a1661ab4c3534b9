"""The ablation of the multi-proxy generator: train its variants, then compare them on the same test images.

python -m benchmarks.generative recipes/ablation-multi-proxy.yaml --out runs/ablation [--train NAME] [--table]
    [--baseline 500]

Without options it trains every variant that has no file yet (each resumes where it stopped), then makes the table.
Success is counted where the target is right without an attack; a variant's black-box success is its mean over the
targets. Differences are paired: the same resampled images for both sides (`scipy.stats.bootstrap`, percentiles).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy.stats import bootstrap

from maodun.arena.recipe import parse_radius
from maodun.arena.train_generator import GeneratorRecipe, train_generator
from maodun.attacks.artifacts import load_attack
from maodun.attacks.generative.collapse import collapse
from maodun.attacks.registry import build_attack
from maodun.core.ensemble import Ensemble
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat
from maodun.zoo import load_data, load_model

DRAWS = 9999


def variants(content):
    """Return name -> recipe: the base with each variant's keys, options merged key by key."""
    made = {}
    for name, changes in content["variants"].items():
        options = {**content["base"].get("options", {}), **changes.get("options", {})}
        made[name] = GeneratorRecipe.model_validate({**content["base"], **changes, "options": options, "name": name})
    proxies = {spec for recipe in made.values() for spec in recipe.proxies}
    if proxies & set(content["targets"]):
        raise InputError("targets", f"{min(proxies & set(content['targets']))} is a proxy", "hold the targets out")
    return made


def ratio_difference(first, second, clean):
    """Return black-box success of `first` minus `second`, booleans (targets x n) of forced errors where right."""

    def statistic(rows, axis=-1):
        rows = rows.astype(int)
        right = np.stack([each[rows].sum(axis) for each in clean])
        a = np.stack([each[rows].sum(axis) for each in first])
        b = np.stack([each[rows].sum(axis) for each in second])
        return ((a - b) / np.maximum(right, 1)).mean(0)

    return statistic


def compare(first, second, clean, seed):
    """Return the difference, its 99 % interval and a two-sided bootstrap p-value."""
    statistic = ratio_difference(first, second, clean)
    rows = np.arange(clean.shape[1])
    found = bootstrap((rows,), statistic, n_resamples=DRAWS, batch=200, vectorized=True, method="percentile",
                      confidence_level=0.99, rng=np.random.default_rng(seed))  # fmt: skip
    below = (found.bootstrap_distribution <= 0).mean()
    p = min(1.0, 2 * min(below, 1 - below) + 1 / (DRAWS + 1))
    low, high = found.confidence_interval
    return float(statistic(rows)), float(low), float(high), float(p)


def answers(model, x):
    """Return the classes (N,) a model in evaluation mode names."""
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(128)]).argmax(1)


def measure(content, names, out):
    """Return per variant: who falls (targets x n), who is right without an attack, collapse metrics, ms per image.

    What was measured is kept beside each variant as NAME.npz, and the clean answers as clean.npz.
    """
    data = load_data(content["base"]["data"]["spec"], split="test", limit=content["limit"])
    models = [load_model(spec).model for spec in content["targets"]]
    clean = kept(out / "clean.npz", content, lambda: [answers(model, data.x) for model in models])
    rights, results = clean == data.y.numpy(), {}
    for name in names:
        attack = load_attack(out / f"{name}.safetensors")
        threat = Threat("linf", attack.eps)
        began = time.process_time()
        made = attack.candidates(data.x, data.ids, threat)
        speed = 1e3 * (time.process_time() - began) / len(data)
        forced = kept(out / f"{name}.npz", content, lambda made=made: [answers(model, made) for model in models])
        shapes = [collapse(made - data.x, torch.from_numpy(each)) for each in forced]
        results[name] = ((forced != data.y.numpy()) & rights, rights, shapes, speed)
    return results


def kept(path, content, make):
    """Return the classes (targets x n) of `path`, made and kept there unless they are of these targets and this n."""
    mark = json.dumps([content["targets"], content["limit"]])
    if path.is_file():
        with np.load(path) as old:
            if str(old["mark"]) == mark:
                return old["classes"]
    classes = np.stack([each.numpy() for each in make()])
    np.savez(path, classes=classes, mark=mark)
    return classes


def baseline(content, results, n, seed=0):
    """Print MI-FGSM on the ensemble of all proxies beside every variant, on the first `n` test images."""
    data = load_data(content["base"]["data"]["spec"], split="test", limit=n)
    proxies = [load_model(spec).model for spec in content["base"]["proxies"]]
    oracle = Oracle(Ensemble(proxies), surrogate=True)
    threat = Threat("linf", parse_radius(content["base"]["eps"]))
    began = time.process_time()
    made = build_attack("mi").run(oracle, data.x, data.y, threat, ids=data.ids, seed=seed, check_model=False).x_adv
    spent = 1e3 * (time.process_time() - began) / n
    falls = [answers(load_model(spec).model, made) != data.y for spec in content["targets"]]
    rights = next(iter(results.values()))[1][:, :n]
    falls = torch.stack(falls).numpy() & rights
    lines = ["", f"MI-FGSM, 10 steps on the ensemble of the proxies, first {n} images: black-box success "
             + ", ".join(f"{100 * each:.1f}" for each in falls.sum(1) / rights.sum(1))
             + f", mean {100 * (falls.sum(1) / rights.sum(1)).mean():.1f} %, {spent:.1f} ms per image"]  # fmt: skip
    for name, (fell, _, _, speed) in results.items():
        value, low, high, p = compare(fell[:, :n], falls, rights, seed)
        lines.append(
            f"{name} - MI-ENS: {100 * value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], p {p:.4f}; "
            f"{spent / speed:.0f} times faster"
        )
    return lines


def table(content, recipes, out, pairs, seed=0, n=0):
    """Print and keep the table and the paired differences of the variants trained so far."""
    names = [name for name in recipes if (out / f"{name}.safetensors").is_file()]
    results = measure(content, names, out)
    targets = [spec.partition(":")[2] for spec in content["targets"]]
    lines = [
        "| variant | proxies | " + " | ".join(targets) + " | mean | cosine | entropy (nats) | classes | ms per image |"
    ]
    lines.append("|---" * (len(targets) + 7) + "|")
    for name, (falls, rights, shapes, speed) in results.items():
        shares = falls.sum(1) / rights.sum(1)
        cells = [name, str(len(recipes[name].proxies)), *(f"{100 * each:.1f}" for each in shares)]
        cells += [f"**{100 * shares.mean():.1f}**", f"{shapes[0].cosine:.3f}"]
        cells += ["/".join(f"{each.entropy:.2f}" for each in shapes), "/".join(str(each.classes) for each in shapes)]
        lines.append("| " + " | ".join([*cells, f"{speed:.2f}"]) + " |")
    lines += ["", "| difference of mean black-box success | points | 99 % interval | p |", "|---|---|---|---|"]
    for first, second in pairs:
        if first in results and second in results:
            value, low, high, p = compare(results[first][0], results[second][0], results[first][1], seed)
            lines.append(
                f"| {first} - {second} | {100 * value:+.1f} | [{100 * low:+.1f}, {100 * high:+.1f}] | {p:.4f} |"
            )
    lines += baseline(content, results, n, seed) if n else []
    text = "\n".join(lines)
    print(text)
    (out / "table.md").write_text(text + "\n")
    raw = {name: (falls.sum(1) / rights.sum(1)).tolist() for name, (falls, rights, _, _) in results.items()}
    (out / "table.json").write_text(json.dumps({"n": content["limit"], "seed": seed, "success": raw}, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--out", default="runs/ablation")
    parser.add_argument("--train", action="append", help="only train this variant; may be repeated")
    parser.add_argument("--table", action="store_true", help="only make the table of what is trained")
    parser.add_argument(
        "--baseline", type=int, default=0, help="compare with MI-FGSM on the ensemble on so many images"
    )
    words = parser.parse_args()
    torch.set_num_threads(1)
    content, out = yaml.safe_load(Path(words.recipe).read_text()), Path(words.out)
    recipes = variants(content)
    for name in [] if words.table else words.train or recipes:
        if not (out / f"{name}.safetensors").is_file():
            made = train_generator(recipes[name], out, on_epoch=lambda line, name=name: print(name, line, flush=True))
            print(name, [f"{each.metric}: {each.value}" for each in made.measured], flush=True)
    if words.table or not words.train:
        single = [name for name in recipes if recipes[name].attack == "advgan"]
        given = content.get("compare") or list(itertools.combinations(recipes, 2))
        pairs = [tuple(pair) for pair in given if not all(name in single for name in pair)]
        table(content, recipes, out, pairs, n=words.baseline)


if __name__ == "__main__":
    main()
