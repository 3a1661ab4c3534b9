"""Tasks: metrics against hand-computed cases and torchmetrics, losses with known minima, networks and loaders."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.tasks import (
    TASKS,
    Classification,
    Detection,
    FitSettings,
    Labelled,
    Reconstruction,
    Retrieval,
    Segmentation,
    fit_task,
    load_camvid,
    load_cifar10,
    load_penn_fudan,
    load_weights,
    metrics,
    save_weights,
)
from maodun.tasks.fit import augment, crop_boxes


def uniform(name: str, *shape: int) -> Tensor:
    return Stream(0, name).uniform(torch.arange(shape[0]), shape[1:])


def test_mean_iou_of_a_case_worked_by_hand():
    truth = torch.tensor([[[0, 0], [1, 11]], [[1, 1], [2, 0]]])
    predicted = torch.tensor([[[0, 1], [1, 0]], [[1, 0], [2, 0]]])
    counts = metrics.confusion(predicted, truth, 3)
    # Class 0: hit 2, union 2 + 1 + 1 (0,1) = 4; class 1: hit 2, union 4; class 2: hit 1, union 1; one pixel ignored.
    assert counts.sum().item() == 7
    assert math.isclose(metrics.mean_iou(counts), (2 / 4 + 2 / 4 + 1) / 3)
    assert math.isclose(metrics.mean_iou(counts, torch.tensor([2.0, 0.0])), (1 / 2 + 1 / 2) / 2)


def test_mean_iou_agrees_with_torchmetrics():
    from torchmetrics.classification import MulticlassJaccardIndex

    truth = (uniform("t", 4, 6, 5) * 5).long()
    predicted = torch.where(uniform("m", 4, 6, 5) < 0.5, truth, (uniform("p", 4, 6, 5) * 4).long())
    other = MulticlassJaccardIndex(5, average="macro")(predicted, truth)
    assert math.isclose(metrics.mean_iou(metrics.confusion(predicted, truth, 5)), float(other), rel_tol=1e-6)


def test_box_overlaps_by_hand():
    a = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 1, 1]]])
    b = torch.tensor([[[1.0, 1, 3, 3], [0, 0, 2, 2], [-1, -1, -1, -1]]])
    assert torch.allclose(metrics.box_iou(a, b), torch.tensor([[[1 / 7, 1.0, 0.0], [0.0, 1 / 4, 0.0]]]))


def test_average_precision_of_a_case_worked_by_hand():
    # Two objects and four detections in falling order: right, right again (a double), elsewhere, the second object.
    truth = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30], [-1, -1, -1, -1]]])
    boxes = torch.tensor([[[0.0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 31]]])
    hits = metrics.match_boxes(boxes, truth)
    assert hits.tolist() == [[True, False, False, True]]
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    # Precision 1 at recall 1/2, 2/4 at recall 1.
    assert math.isclose(metrics.average_precision(scores, hits, torch.tensor([2])), 0.5 * 1 + 0.5 * 0.5)
    none = torch.full((1, 4), -math.inf)
    assert metrics.average_precision(none, hits, torch.tensor([2])) == 0.0


def test_weights_are_the_same_as_repeating_images():
    scores, hits = uniform("s", 5, 6).sort(1, descending=True).values, uniform("h", 5, 6) < 0.4
    objects = hits.sum(1) + 1
    weights = torch.tensor([2.0, 0.0, 1.0, 3.0, 1.0])
    rows = torch.repeat_interleave(torch.arange(5), weights.long())
    repeated = metrics.average_precision(scores[rows], hits[rows], objects[rows])
    # Equal scores stand in one block of the weighted sum and one by one in the repeated one.
    assert math.isclose(metrics.average_precision(scores, hits, objects, weights), repeated, rel_tol=0.02)
    counts = metrics.confusion((uniform("p", 5, 4, 4) * 3).long(), (uniform("t", 5, 4, 4) * 3).long(), 3)
    assert math.isclose(metrics.mean_iou(counts, weights), metrics.mean_iou(counts[rows]))
    assert math.isclose(metrics.weighted_mean(scores[:, 0], weights), float(scores[rows, 0].double().mean()))


def test_psnr_and_ssim():
    x = uniform("x", 3, 3, 16, 16) * 0.8
    assert torch.allclose(metrics.psnr(x + 0.1, x), torch.full((3,), 20.0), atol=1e-3)
    assert metrics.psnr(x, x).tolist() == [100.0] * 3
    assert torch.allclose(metrics.ssim(x, x), torch.ones(3), atol=1e-5)
    assert metrics.ssim(x[:1], x[:1]).shape == (1,)
    assert (metrics.ssim(uniform("y", 3, 3, 16, 16), x) < 0.5).all()


def test_retrieval_by_hand_and_by_torchmetrics():
    from torchmetrics.functional.retrieval import retrieval_average_precision

    gallery = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1.0]])
    ap, first = metrics.retrieval_ranks(torch.tensor([[1.0, 0]]), torch.tensor([7]), gallery, torch.tensor([7, 3, 7]))
    assert math.isclose(ap.item(), (1 + 2 / 3) / 2, rel_tol=1e-6) and first.item() == 1.0
    queries, many = (torch.nn.functional.normalize(uniform(n, 9, 4) - 0.5, dim=1) for n in "qg")
    labels, kinds = (uniform("l", 9) * 3).long(), (uniform("k", 9) * 3).long()
    ap, _ = metrics.retrieval_ranks(queries, labels, many, kinds)
    for row in range(9):
        wanted = retrieval_average_precision(queries[row] @ many.T + 2.0, kinds == labels[row])
        assert math.isclose(ap[row].item(), float(wanted), rel_tol=1e-5)


def test_a_detector_that_says_the_truth_scores_one_and_has_next_to_no_loss():
    task = Detection()
    boxes = torch.tensor([[[8.0, 8, 40, 72], [64, 20, 96, 84]], [[20.0, 10, 52, 60], [-1, -1, -1, -1]]])
    heat, cells = task._heat(boxes, 24, 32)
    assert torch.allclose(heat.flatten(2).amax(2), torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    peak, owner = heat.max(1)
    box = boxes.gather(1, owner.flatten(1)[:, :, None].expand(-1, -1, 4)).reshape(2, 24, 32, 4)
    distances = torch.cat([cells - box[..., :2], box[..., 2:] - cells], -1).clamp(min=0.01) / task.scale
    centre = torch.where(peak > 0.99, 9.0, -9.0)
    output = torch.cat([centre[:, None], distances.permute(0, 3, 1, 2)], 1)
    judged = task.judge(output, torch.zeros(2), boxes)
    assert judged["objects"].tolist() == [2, 1]
    assert math.isclose(task.score(judged), 1.0)
    wrong = torch.cat([-centre[:, None], distances.permute(0, 3, 1, 2)], 1)
    assert (task.loss(output, boxes) < 0.05).all() and (task.loss(wrong, boxes) > 5).all()
    shifted = torch.cat([centre[:, None], distances.permute(0, 3, 1, 2) * 3], 1)
    assert task.score(task.judge(shifted, torch.zeros(2), boxes)) == 0.0


@pytest.mark.parametrize("name", list(TASKS))
def test_networks_take_odd_sizes_and_their_losses_have_gradients(name):
    task = TASKS[name]()
    model = task.build(3).eval()
    x = uniform("x", 2, 3, 30, 42)
    truth = {
        "segmentation": torch.zeros(2, 30, 42, dtype=torch.int64),
        "detection": torch.tensor([[[2.0, 2, 20, 28]]]).expand(2, 1, 4),
    }.get(name, torch.tensor([1, 2]))
    if name == "retrieval":
        task = Retrieval.with_gallery(model, uniform("g", 5, 3, 30, 42), torch.tensor([0, 1, 2, 1, 2]))
    target = task.target(model, 0.5 * x, truth)
    x.requires_grad_(True)
    values = task.loss(model(x), target)
    assert values.shape == (2,)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert torch.isfinite(gradient).all() and (gradient.flatten(1) != 0).any(1).all()
    statistics = task.evaluate(model, x.detach(), x.detach(), truth)
    assert all(value.shape[0] == 2 for value in statistics.values())
    assert math.isfinite(task.score(statistics))
    again = TASKS[name]().build(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_segmentation_ignores_the_unlabelled_and_rewards_the_truth():
    task = Segmentation(classes=3)
    truth = torch.tensor([[[0, 11], [2, 11]]])
    output = torch.full((1, 3, 2, 2), -9.0)
    output[0, 0, 0, 0] = output[0, 2, 1, 0] = output[0, 1, :, 1] = 9.0
    assert task.loss(output, truth).item() < 1e-5
    assert math.isclose(task.score(task.judge(output, output, truth)), 1.0)


def test_crops_and_mirrors_move_the_truth_with_the_image():
    boxes = torch.tensor([[[10.0, 10, 20, 30], [0, 0, 6, 6], [-1, -1, -1, -1]]])
    cut = crop_boxes(boxes, top=5, left=5, high=20, wide=20)
    assert torch.equal(cut, torch.tensor([[[5.0, 5, 15, 20], [-1, -1, -1, -1], [-1, -1, -1, -1]]]))
    x = torch.zeros(1, 1, 40, 40)
    x[0, 0, 10:30, 10:20] = 1.0
    settings = FitSettings(crop=(30, 30))
    for seed in range(6):
        image, moved = augment(x.expand(1, 3, 40, 40), boxes[:, :1], settings, torch.Generator().manual_seed(seed))
        x0, y0, x1, y1 = (int(v) for v in moved[0, 0])
        assert image[0, 0, y0:y1, x0:x1].all() and image[0, 0].sum() == (x1 - x0) * (y1 - y0)
        image, mask = augment(x.expand(1, 3, 40, 40), x[0].long(), settings, torch.Generator().manual_seed(seed))
        assert torch.equal(image[0, 0].long(), mask[0])


def test_training_learns_repeats_itself_and_survives_a_file(tmp_path):
    x = (uniform("x", 64, 3, 16, 16) * 100).byte()
    y = torch.arange(64) % 2
    x[y == 1, 0] += 120
    data = Labelled("toy", x, y)
    task = Classification(2)
    lines: list[dict[str, float]] = []
    made = [
        fit_task(task, task.build(), data, FitSettings(epochs=4, batch_size=16), on_epoch=lines.append) for _ in "ab"
    ]
    assert task.score(task.evaluate(made[0], data.images(), data.images(), y)) > 0.9
    assert lines[3]["loss"] < lines[0]["loss"] and len(lines) == 8
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    save_weights(made[0], tmp_path / "w.safetensors")
    again = load_weights(task.build(), tmp_path / "w.safetensors")
    assert torch.allclose(again(data.images()), made[0](data.images()), atol=0.05)
    with pytest.raises(InputError, match="do not fit"):
        load_weights(Classification(5).build(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="at least 1 epoch"):
        FitSettings(epochs=0)


def test_reconstruction_is_judged_against_the_clean_image():
    x = uniform("x", 2, 3, 16, 16) * 0.8
    task = Reconstruction()
    assert torch.equal(task.target(torch.nn.Identity(), x, torch.zeros(2)), x)
    judged = task.judge(x + 0.1, x, torch.zeros(2))
    assert torch.allclose(judged["psnr"], torch.full((2,), 20.0), atol=1e-3)


def test_missing_data_and_limits_are_clear_errors(monkeypatch, tmp_path):
    monkeypatch.delenv("MAODUN_DATA", raising=False)
    with pytest.raises(InputError, match="MAODUN_DATA"):
        load_camvid()
    monkeypatch.setenv("MAODUN_DATA", str(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        load_cifar10()
    with pytest.raises(InputError, match="penn_fudan"):
        load_penn_fudan("val")
    with pytest.raises(InputError, match="limit 0"):
        Labelled("toy", torch.zeros(3, 1), torch.zeros(3)).take(0)


@pytest.mark.data
def test_real_sets_have_the_shapes_and_truths_they_claim(real_data):
    street, people, things = load_camvid("test", 3), load_penn_fudan("test", 4), load_cifar10("test", 5)
    assert street.x.shape == (3, 3, 120, 160) and street.truth.shape == (3, 120, 160) and street.truth.max() <= 11
    assert people.x.shape == (4, 3, 120, 160) and people.truth.shape[2] == 4
    there = people.truth[..., 2] > people.truth[..., 0]
    assert there.any(1).all() and people.truth[there].min() >= 0 and people.truth[there][:, 2].max() <= 160
    assert things.x.dtype == torch.uint8 and things.truth.max() <= 9
    assert len(load_penn_fudan("train")) == 113
