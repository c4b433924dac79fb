"""The training loop: progress, resuming to the last bit, and every way in which it can be cut short."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from firmly.errors import DataError, SettingsError
from firmly.lab.engine import Engine
from firmly.lab.run_folder import RunFolder
from firmly.lab.training import Plan, rise_and_fall, train
from firmly.lab.weights import learned

PLAN = Plan(epochs=4, steps=5, learning_rate=1e-2, weight_decay=1e-2, averaging=0.9)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def sample(generator):
    x = torch.randn(16, 4, generator=generator)
    return x + 0.1 * torch.randn(16, 4, generator=generator), x


def fixed_score(net):
    y, x = sample(torch.Generator().manual_seed(99))
    with torch.no_grad():
        return -float((net(y) - x).square().mean())


class Kill(BaseException):
    pass


def at(epoch, step, exception):
    def callback(event):
        if (event["epoch"], event["step"]) == (epoch, step):
            raise exception

    return callback


def test_training_lowers_the_loss_and_keeps_the_best_weights(tmp_path):
    net = network()
    outcome = train(net, sample, PLAN, RunFolder(tmp_path), "net", validate=fixed_score)
    losses = [row["loss"] for row in outcome.history]
    assert outcome.status == "finished" and len(losses) == 4 and losses[-1] < losses[0]
    assert fixed_score(net) == max(row["score"] for row in outcome.history)
    assert [row["loss"] for row in RunFolder(tmp_path).metrics("epoch", network="net")] == losses


@pytest.mark.parametrize("step", [6, 10, 13])
def test_resuming_after_a_kill_gives_the_same_bits(tmp_path, step):
    whole, cut = network(), network()
    reference = train(whole, sample, PLAN, RunFolder(tmp_path / "whole"), "net", validate=fixed_score)
    with pytest.raises(Kill):
        kill = at((step - 1) // 5, step, Kill())
        train(cut, sample, PLAN, RunFolder(tmp_path / "cut"), "net", validate=fixed_score, callback=kill)
    resumed = network()
    outcome = train(resumed, sample, PLAN, RunFolder(tmp_path / "cut"), "net", validate=fixed_score)
    assert all(torch.equal(a, b) for a, b in zip(learned(whole).values(), learned(resumed).values(), strict=True))
    assert [r["loss"] for r in outcome.history] == [r["loss"] for r in reference.history]


def test_a_finished_training_is_not_repeated(tmp_path):
    first, second = network(), network()
    train(first, sample, PLAN, RunFolder(tmp_path), "net")
    train(second, sample, PLAN, RunFolder(tmp_path), "net", callback=at(0, 1, AssertionError("trained again")))
    assert all(torch.equal(a, b) for a, b in zip(learned(first).values(), learned(second).values(), strict=True))


def test_control_c_stops_cleanly_with_the_last_epoch_kept(tmp_path):
    run = RunFolder(tmp_path)
    outcome = train(network(), sample, PLAN, run, "net", callback=at(2, 12, KeyboardInterrupt()))
    assert outcome.status == "interrupted" and len(outcome.history) == 2
    assert train(network(), sample, PLAN, run, "net").status == "finished"


def test_data_that_is_not_finite_stops_training_with_the_batch_saved(tmp_path):
    def poisoned(generator):
        y, x = sample(generator)
        return y.fill_(torch.nan), x

    with pytest.raises(DataError, match="training stopped at step 0: the loss is nan") as raised:
        train(network(), poisoned, PLAN, RunFolder(tmp_path), "net")
    saved = tmp_path / "checkpoints" / "net-batch-not-finite.safetensors"
    assert saved.exists() and str(saved) in str(raised.value)


def test_early_stop(tmp_path):
    scores = iter([1.0, 2.0, 1.5, 1.6, 5.0])
    plan = Plan(epochs=5, steps=1, patience=2)
    outcome = train(network(), sample, plan, RunFolder(tmp_path), "net", validate=lambda net: next(scores))
    assert outcome.status == "stopped early" and [r["score"] for r in outcome.history] == [1.0, 2.0, 1.5, 1.6]


def test_penalty_enters_the_gradient(tmp_path):
    net = network()
    train(net, sample, PLAN, RunFolder(tmp_path), "net", penalty=lambda n, step: 100 * n[2].bias.square().sum())
    free = network()
    train(free, sample, PLAN, RunFolder(tmp_path), "free")
    assert net[2].bias.norm() < 0.9 * free[2].bias.norm()


def test_a_checkpoint_of_another_plan_or_network_is_refused(tmp_path):
    run = RunFolder(tmp_path)
    train(network(), sample, PLAN, run, "net")
    with pytest.raises(DataError, match="not a checkpoint of this plan"):
        train(network(), sample, Plan(epochs=9), run, "net")
    with pytest.raises(DataError, match="belongs to another network"):
        train(nn.Linear(4, 4), sample, PLAN, run, "net")
    (tmp_path / "checkpoints" / "net.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="damaged"):
        train(network(), sample, PLAN, run, "net")


def test_the_learning_rate_rises_and_falls():
    assert rise_and_fall(0.05) == 0.5 and rise_and_fall(0.1) == 1 and rise_and_fall(1) == 0.003


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"learning_rate": -1.0}, {"averaging": 1.0}, {"clip": 0.0}])
def test_bad_plans_are_refused(bad):
    with pytest.raises(SettingsError):
        Plan(**bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SettingsError, match="no CUDA device"):
        Engine("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_runs_on_cuda(tmp_path):
    net = network()
    train(net, sample, PLAN, RunFolder(tmp_path), "net", engine=Engine("cuda"))
    assert next(net.parameters()).is_cuda


def test_mixed_precision_runs_when_asked_for(tmp_path):
    outcome = train(network(), sample, PLAN, RunFolder(tmp_path), "net", engine=Engine("cpu", "bfloat16"))
    assert outcome.history[-1]["loss"] < outcome.history[0]["loss"]


def test_two_processes_train_the_same_weights(tmp_path):
    pytest.importorskip("lightning_fabric")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch
        from test_training import PLAN, network, sample
        from firmly.lab.engine import start_engine
        from firmly.lab.run_folder import RunFolder
        from firmly.lab.training import train
        from firmly.lab.weights import learned
        engine = start_engine("cpu")
        net = network()
        outcome = train(net, sample, PLAN, RunFolder({str(tmp_path)!r}), "net", engine=engine)
        flat = torch.cat([p.flatten() for p in learned(net).values()])
        both = engine.gather(flat)
        assert engine.world == 2 and torch.equal(both[0], both[1]), both
        assert len(outcome.history) == 4
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "checkpoints" / "net.safetensors").exists()


def test_another_loss_is_what_is_trained(tmp_path):
    heard = []

    def absolute(output, truth):
        heard.append(float((output - truth).detach().abs().mean()))
        return (output - truth).abs().mean()

    outcome = train(network(), sample, PLAN, RunFolder(tmp_path), "net", loss=absolute)
    assert outcome.history[0]["loss"] == pytest.approx(sum(heard[: PLAN.steps]) / PLAN.steps)
