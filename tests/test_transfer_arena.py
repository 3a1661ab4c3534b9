"""Transfer down the corridor: surrogates searched once, judged on each shield, refused when they do not fit."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import maodun
from maodun.arena.evaluate import attack as make
from maodun.arena.recipe import make_recipe
from maodun.arena.run import run
from maodun.arena.store import Store
from maodun.arena.surrogates import PREFIX
from maodun.attacks.transfer.loop import Transfer
from maodun.core.ensemble import Ensemble
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat
from maodun.report.html import report_html
from maodun.report.terminal import summary_view
from maodun.report.view import transfers
from maodun.zoo import load_data, load_model

N = 40
SURROGATE, SECOND = "zoo:digits-cnn-distilled-t1", "zoo:digits-cnn-distilled-t20"


def recipe(spears: list[dict], shields: list[dict] | None = None, **more):
    return make_recipe(
        {
            "name": "transfer",
            "data": {"spec": "digits", "limit": N},
            "threats": [{"norm": "linf", "eps": 0.15}],
            "shields": shields or [{"name": "cnn", "model": "zoo:digits-cnn"}, {"name": "t1", "model": SURROGATE}],
            "spears": spears,
            "diagnostics": False,
            "shard_size": 16,
            **more,
        }
    )


@pytest.fixture(scope="module")
def matrix_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("transfer") / "run"
    spears = [
        {"attack": "mi", "surrogate": [SURROGATE]},
        {"attack": "mi", "surrogate": [SURROGATE, SECOND], "options": {"ensemble": "losses"}},
        {"attack": "mifgsm"},
    ]
    return out, run(recipe(spears), out, progress="quiet")


def rows(out, cell: str) -> dict[str, np.ndarray]:
    store = Store(out)
    table = store.read_table([f"records/{cell}/part-{k:05d}.parquet" for k in range(3)])
    return {name: table[name].to_numpy() for name in ("sample_id", "success", "clean_correct", "status", "queries")}


class TestMatrix:
    def test_surrogates_down_targets_across_white_box_marked(self, matrix_run):
        _, summary = matrix_run
        (matrix,) = summary.transfer
        assert matrix.targets == ["cnn", "t1"]
        assert [row.surrogates for row in matrix.rows] == [[SURROGATE], [SURROGATE, SECOND]]
        assert [[cell.white_box for cell in row.cells] for row in matrix.rows] == [[False, True], [False, True]]
        assert {row.hooks for row in matrix.rows} == {"mi"}
        for row in matrix.rows:
            black, white = row.cells
            assert row.mean == black.asr_correct.value
            assert white.asr_correct.value > black.asr_correct.value > 0
            assert black.asr_correct.n == round(black.clean.value * N)
            assert black.queries == 0

    def test_spears_without_surrogates_stay_out_of_it(self, matrix_run):
        _, summary = matrix_run
        assert all(row.spear != "mifgsm" for row in summary.transfer[0].rows)
        assert {cell.spear for cell in summary.cells} >= {"mifgsm", "mi from digits-cnn-distilled-t1"}

    def test_the_diagonal_is_an_attack_that_never_stops_early(self, matrix_run):
        _, summary = matrix_run
        data = load_data("digits", limit=N)
        model = load_model(SURROGATE).model
        found = Transfer(hooks="mi").run(Oracle(model, surrogate=True), data.x, data.y, Threat("linf", 0.15))
        with torch.no_grad():
            right, fell = model(data.x).argmax(1) == data.y, model(found.x_adv).argmax(1) != data.y
        white = next(row.cells[1] for row in summary.transfer[0].rows if row.surrogates == [SURROGATE])
        assert white.asr_correct.value == pytest.approx(float(fell[right].float().mean()))

    def test_each_search_is_made_once_for_all_targets(self, matrix_run):
        out, _ = matrix_run
        found = sorted(path.relative_to(out).parts[1:] for path in (out / "searches").rglob("*.npz"))
        assert len(found) == 2 * 3
        one = np.load(next((out / "searches").rglob("*.npz")))
        assert one["forwards"].shape == (16,)

    def test_what_the_target_gets_wrong_is_sent_unchanged(self, matrix_run):
        out, summary = matrix_run
        for cell in summary.cells:
            if cell.surrogates:
                columns = rows(out, cell.cell)
                wrong = ~columns["clean_correct"]
                assert columns["success"][wrong].all()
                assert (columns["status"][wrong] == "skipped_misclassified").all()

    def test_the_manifest_names_the_surrogates_weights(self, matrix_run):
        out, _ = matrix_run
        manifest = Store(out).manifest()
        assert manifest["weights"][PREFIX + SURROGATE] == manifest["weights"]["t1"]
        cell = manifest["cells"][0]
        assert cell["access"] == "surrogate"
        assert f"--surrogate {SURROGATE}" in cell["command"]

    def test_shown_in_the_terminal_and_on_the_page(self, matrix_run):
        from rich.console import Console

        out, summary = matrix_run
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(summary_view(summary))
        text = console.export_text()
        assert "mean, black box" in text and "white box: the target is among the surrogates" in text
        page = report_html(summary, out, light=True)
        assert 'id="transfer"' in page and page.count("□&nbsp;") == 2
        (shown,) = transfers(summary)
        assert [[field.white_box for field in fields] for _, _, fields, _ in shown.rows] == [[False, True]] * 2

    def test_a_second_start_does_nothing_anew(self, matrix_run):
        out, summary = matrix_run
        spears = [
            {"attack": "mi", "surrogate": SURROGATE},
            {"attack": "mi", "surrogate": [SURROGATE, SECOND], "options": {"ensemble": "losses"}},
            {"attack": "mifgsm"},
        ]
        before = {path: path.stat().st_mtime_ns for path in out.rglob("part-*")}
        again = run(recipe(spears), out, progress="quiet")
        assert again.cells == summary.cells
        assert {path: path.stat().st_mtime_ns for path in out.rglob("part-*")} == before


class Flat(nn.Module):
    """Three classes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


class TestDoors:
    def test_attack_hands_over_the_last_iterate_on_the_surrogate(self):
        data = load_data("digits", limit=8)
        target, stand_in = load_model("zoo:digits-cnn").model, load_model(SURROGATE).model
        found = make(target, data.x, data.y, "mi", norm="linf", eps=0.1, surrogate=SURROGATE)
        expected = Transfer(hooks="mi").run(Oracle(stand_in, surrogate=True), data.x, data.y, Threat("linf", 0.1))
        assert torch.equal(found.x_adv, expected.x_adv)
        both = make(target, data.x, data.y, "mi", norm="linf", eps=0.1, surrogate=[stand_in, SECOND])
        pair = Ensemble([stand_in, load_model(SECOND).model])
        expected = Transfer(hooks="mi").run(Oracle(pair, surrogate=True), data.x, data.y, Threat("linf", 0.1))
        assert torch.equal(both.x_adv, expected.x_adv)

    def test_evaluate_with_modules(self):
        data = load_data("digits", limit=N)
        summary = maodun.evaluate(
            "zoo:digits-cnn", data, norm="linf", eps=0.15, attack="mi,mifgsm", diagnostics=False,
            surrogate=load_model(SURROGATE).model,
        )  # fmt: skip
        one, two = summary.cells
        assert one.asr_correct == two.asr_correct
        assert one.surrogates and not one.white_box
        weak = maodun.evaluate("zoo:digits-cnn", data, norm="linf", eps=0.15, attack="mi", diagnostics=False)
        assert weak.cells[0].robust.value < one.robust.value

    @pytest.mark.parametrize("goal", ["random", "least_likely"])
    def test_targets_are_chosen_without_the_shield(self, goal, tmp_path):
        threats = [{"norm": "linf", "eps": 0.3, "targeted": True, "goal": goal}]
        spears = [{"attack": "mi", "surrogate": SURROGATE}]
        summary = run(recipe(spears, threats=threats), tmp_path / "run", progress="quiet")
        tables = [Store(tmp_path / "run").read_table([f"records/{cell.cell}/part-00000.parquet"]) for cell in
                  summary.cells]  # fmt: skip
        one, two = (table["target"].to_numpy() for table in tables)
        assert np.array_equal(one, two) and (one >= 0).all()
        assert summary.cells[1].asr_all.value > summary.cells[0].asr_all.value

    def test_command_line(self, maodun, tmp_path):
        done = maodun(
            "evaluate", "--model", "zoo:digits-cnn", "--data", "digits", "--limit", 16, "--eps", "0.15",
            "--attack", "mi", "--surrogate", f"{SURROGATE},{SECOND}", "--fusion", "probabilities",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert "ASR % [95 %]" in done.out
        saved = maodun(
            "attack", "--model", "zoo:digits-cnn", "--data", "digits", "--limit", 16, "--eps", "0.15",
            "--attack", "mi", "--surrogate", SURROGATE, "--out", tmp_path / "run", "--save", "npz",
        )  # fmt: skip
        assert saved.code == 0, saved.err


class TestRefusals:
    def test_another_number_of_classes(self):
        data = load_data("digits", limit=N)
        with pytest.raises(InputError, match=r"answers 3 classes where shield 'zoo:digits-cnn' answers 10"):
            maodun.evaluate("zoo:digits-cnn", data, norm="linf", eps=0.1, attack="mi", surrogate=Flat())
        with pytest.raises(InputError, match=r"answers 3 classes where model answers 10"):
            make(load_model("zoo:digits-cnn").model, data.x, data.y, "mi", norm="linf", eps=0.1, surrogate=Flat())

    def test_another_input_shape(self, maodun):
        words = ("evaluate", "--model", "zoo:digits-cnn", "--data", "digits", "--limit", 16, "--eps", "0.1")
        line = maodun(*words, "--attack", "mi", "--surrogate", "zoo:cifar10-resnet8").error
        assert "surrogate 'zoo:cifar10-resnet8'" in line
        assert "cannot take inputs of shape (1, 8, 8)" in line

    def test_an_unknown_one_and_none(self, maodun):
        words = ("evaluate", "--model", "zoo:digits-cnn", "--data", "digits", "--limit", 16, "--eps", "0.1")
        line = maodun(*words, "--attack", "mi", "--surrogate", "zoo:digits-cn").error
        assert "did you mean 'zoo:digits-cnn'" in line
        data = load_data("digits", limit=4)
        with pytest.raises(InputError, match="names no model"):
            make(load_model("zoo:digits-cnn").model, data.x, data.y, "mi", norm="linf", eps=0.1, surrogate=[])

    def test_recipes_without_surrogates_keep_their_digest(self):
        plain = recipe([{"attack": "pgd"}]).identity()["spears"][0]
        assert "surrogate" not in plain and "fusion" not in plain
        assert recipe([{"attack": "pgd", "surrogate": SURROGATE}]).identity()["spears"][0]["surrogate"] == [SURROGATE]
