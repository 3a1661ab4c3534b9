"""Training in parts and in several processes takes the same steps; schedules; a dead rank loses nothing."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError
from maodun.core.threat import Threat
from maodun.defenses.training import AWP, TRADES, FitSettings, Free, Inner, Objective, fit
from maodun.zoo.architectures import initialise

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(42, 5, generator=GENERATOR)
Y = (X[:, 0] > 0.5).long() + (X[:, 1] > 0.5).long()


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    initialise(model, 0)
    return model


def objective(kind: str) -> Objective:
    attack = Inner(build_attack("pgd", steps=2, loss="kl"), Threat("linf", 0.05))
    return AWP(TRADES(attack), gamma=0.01) if kind == "awp" else TRADES(attack)


def trained(settings: FitSettings, checkpoint: Path | None = None, kind: str = "trades") -> nn.Module:
    model = network()
    fit(model, X, Y, objective(kind), settings, validate=lambda _: 0.0, checkpoint=checkpoint, seed=5)
    return model


def close(first: nn.Module, second: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(value, second[name], atol=1e-5) for name, value in first.state_dict().items())


def torchrun(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run `body` in two processes that can import this file's helpers."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(body))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, timeout=240, env=environment, check=False)


def test_parts_of_a_batch_add_up_to_its_step() -> None:
    whole = trained(FitSettings(epochs=2, batch_size=16))
    parts = trained(FitSettings(epochs=2, batch_size=16, accumulate=3))
    assert close(whole, parts.state_dict())
    assert not close(whole, network().state_dict())


@pytest.mark.timeout(300)
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    out = tmp_path / "weights.pt"
    body = f"""
        import torch, torch.distributed as dist
        from pathlib import Path
        from test_train_processes import FitSettings, trained
        model = trained(FitSettings(epochs=2, batch_size=16), Path({str(tmp_path / "run.ckpt")!r}))
        torch.save(model.state_dict(), {str(out)!r} + str(dist.get_rank()))
    """
    done = torchrun(tmp_path, body)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = trained(FitSettings(epochs=2, batch_size=16))
    for rank in (0, 1):
        assert close(alone, torch.load(f"{out}{rank}", weights_only=True))
    resumed = trained(FitSettings(epochs=2, batch_size=16), tmp_path / "run.ckpt")
    assert close(alone, resumed.state_dict())


@pytest.mark.timeout(300)
def test_a_killed_rank_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    body = f"""
        import os, signal
        import torch
        from pathlib import Path
        import test_train_processes as here
        calls = 0
        class Deadly(here.TRADES):
            def __call__(self, model, batch):
                if os.environ["RANK"] == "1" and batch.step == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(model, batch)
        attack = here.objective("trades").attack
        model = here.network()
        settings = here.FitSettings(epochs=3, batch_size=16)
        here.fit(model, here.X, here.Y, Deadly(attack), settings, validate=lambda _: 0.0,
                 checkpoint=Path({str(tmp_path / "run.ckpt")!r}), seed=5)
    """
    done = torchrun(tmp_path, body)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert len(kept["history"]) == 1
    resumed = trained(FitSettings(epochs=3, batch_size=16), tmp_path / "run.ckpt")
    assert close(resumed, trained(FitSettings(epochs=3, batch_size=16)).state_dict())


@pytest.mark.timeout(300)
def test_moved_weights_work_in_two_processes(tmp_path: Path) -> None:
    body = """
        import torch, torch.distributed as dist
        from test_train_processes import FitSettings, trained
        model = trained(FitSettings(epochs=1, batch_size=16), kind="awp")
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        both = [torch.empty_like(flat) for _ in range(2)]
        dist.all_gather(both, flat)
        assert torch.equal(*both), "the ranks have drifted apart"
    """
    done = torchrun(tmp_path, body)
    assert done.returncode == 0, done.stderr[-2000:]


class TestSchedules:
    def test_one_cycle(self) -> None:
        settings = FitSettings(rate=1.0, warmup=0.25)
        assert settings.rate_at(0.125) == pytest.approx(0.501)
        assert settings.rate_at(0.25) == pytest.approx(1.0)
        assert settings.rate_at(0.625) == pytest.approx(0.5)

    def test_cosine(self) -> None:
        settings = FitSettings(rate=2.0, warmup=0.0, schedule="cosine")
        for done in (0.1, 0.5, 0.9):
            assert settings.rate_at(done) == pytest.approx(1 + math.cos(math.pi * done))

    def test_piecewise(self) -> None:
        settings = FitSettings(rate=0.1, warmup=0.0, schedule="piecewise", milestones=(100, 105), epochs=110)
        rates = [settings.rate_at(epoch / 110) for epoch in (1, 99, 100, 104, 105, 109)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])

    def test_bad_settings_are_refused(self) -> None:
        with pytest.raises(InputError, match="no milestones"):
            FitSettings(schedule="piecewise")
        with pytest.raises(InputError, match="accumulate 0"):
            FitSettings(accumulate=0)
        with pytest.raises(InputError, match="replays"):
            fit(
                network(), X, Y, Free(Threat("linf", 0.1)), FitSettings(accumulate=2), validate=lambda _: 0.0
            )  # fmt: skip


def test_a_collapsed_epoch_is_undone_and_the_rate_halved(tmp_path: Path) -> None:
    scores = iter([0.6, 0.8, 0.1, 0.7])
    kept: list[dict[str, torch.Tensor]] = []
    model = network()
    lines: list[dict[str, float]] = []

    def validate(net: nn.Module) -> float:
        kept.append({name: value.clone() for name, value in net.state_dict().items()})
        return next(scores)

    def after(line: dict[str, float]) -> None:
        lines.append(line)
        if line["epoch"] == 2:
            assert all(torch.equal(value, kept[1][name]) for name, value in model.state_dict().items())

    settings = FitSettings(epochs=4, batch_size=16, guard=0.5)
    fit(model, X, Y, objective("trades"), settings, validate=validate, on_epoch=after)
    assert [line["setbacks"] for line in lines] == [0.0, 0.0, 1.0, 1.0]
    assert all(torch.equal(value, kept[1][name]) for name, value in model.state_dict().items())


def test_another_recipe_is_not_continued(tmp_path: Path) -> None:
    file, settings = tmp_path / "run.ckpt", FitSettings(epochs=1, batch_size=16)
    trained(settings, file)
    with pytest.raises(InputError, match="another recipe"):
        fit(
            network(),
            X,
            Y,
            objective("trades"),
            settings,
            validate=lambda _: 0.0,
            checkpoint=file,
            seed=5,
            label="mart",
        )
