"""The checker of unrolled networks, on modules, parametrised modules and foreign tensors; and the projection back."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import firmly as fm
from firmly.errors import ConditionError, DataError, SettingsError, StorageError
from firmly.linear import BlockSampling, Dense
from firmly.networks import IstaNet, IstaNetPlus, check_unrolled, project, read_tensors


def operator() -> BlockSampling:
    return BlockSampling.gaussian(6, (1, 8, 8), torch.Generator().manual_seed(0), block=4)


def foreign() -> dict[str, torch.Tensor]:
    """Tensors named as in public code of ISTA-Net+."""
    steps, thresholds = (0.5, 2.3, -0.2), (0.01, -0.002, 0.0)
    tensors = {f"module.fcs.{i}.lambda_step": torch.tensor([v]) for i, v in enumerate(steps)}
    tensors |= {f"module.fcs.{i}.soft_thr": torch.tensor([v]) for i, v in enumerate(thresholds)}
    return tensors | {"module.fcs.0.conv_D": torch.ones(2, 1, 3, 3)}


def test_finds_every_entry_outside() -> None:
    check = check_unrolled(foreign(), operator())
    assert not check.holds and len(check.entries) == 6
    outside = ["module.fcs.1.lambda_step", "module.fcs.2.lambda_step", "module.fcs.1.soft_thr"]
    assert [e.name for e in check.broken] == outside
    assert check.limit == pytest.approx(2, rel=1e-9)
    assert "2 steps outside" in str(check) and "1 negative thresholds" in str(check)
    assert str(check).count("<- outside") == 3


def test_norm_of_the_operator_sets_the_limit() -> None:
    twice = Dense(2 * torch.eye(3, dtype=torch.float64))
    assert check_unrolled(foreign(), twice).limit == pytest.approx(0.5, rel=1e-9)
    assert check_unrolled(foreign(), 2.0).limit == 0.5
    assert not check_unrolled({"step": torch.tensor(0.5001)}, twice).holds
    assert check_unrolled({"step": torch.tensor(0.4999)}, twice).holds


def test_project_puts_back_what_is_outside_and_nothing_else() -> None:
    tensors = foreign()
    check = check_unrolled(tensors, operator())
    put_back = project(tensors, check)
    assert check_unrolled(put_back, operator()).holds
    assert float(put_back["module.fcs.2.lambda_step"]) == 0 and float(put_back["module.fcs.0.lambda_step"]) == 0.5
    assert float(tensors["module.fcs.1.lambda_step"]) == pytest.approx(2.3)  # the original is untouched

    net = IstaNetPlus(operator(), operator().T, phases=3, channels=2)
    with torch.no_grad():
        net.phases[0].step.fill_(3.0)
        net.phases[2].prior.weight.fill_(-1.0)
    back = project(net, check_unrolled(net, net.A))
    assert back.phases[0].step.item() <= 2 and back.phases[2].prior.weight.item() == 0
    assert net.phases[0].step.item() == 3.0
    torch.testing.assert_close(back.phases[1].lift.weight, net.phases[1].lift.weight)


def test_values_of_parametrised_modules_are_those_in_use() -> None:
    net = IstaNet(operator(), operator().T, phases=2, channels=2, constrained=True)
    check = check_unrolled(net, net.A)
    assert [e.name for e in check.entries if e.kind == "step"] == ["phases.0.step", "phases.1.step"]
    assert all(e.low == pytest.approx(0.5) for e in check.entries if e.kind == "step") and check.holds
    unrolled = fm.unroll(fm.algorithms.ForwardBackward(operator(), fm.prox.L1(0.1)), 3)
    assert check_unrolled(unrolled, operator()).holds
    with pytest.raises(SettingsError, match="no name ends like a step"):  # raw values of a parametrisation are no steps
        check_unrolled(net.state_dict(), net.A)


def test_every_entry_of_a_vector_counts_and_nan_does_not_hold() -> None:
    check = check_unrolled({"net.step_size": torch.tensor([0.1, 2.5, 1.0])}, 1.0)
    assert (check.entries[0].low, check.entries[0].high) == pytest.approx((0.1, 2.5)) and not check.holds
    nan = {"step": torch.tensor(float("nan"))}
    assert not check_unrolled(nan, 1.0).holds
    with pytest.raises(DataError, match="not numbers"):
        project(nan, check_unrolled(nan, 1.0))


def test_own_patterns() -> None:
    tensors = {"a.mu": torch.tensor(1.0), "a.t": torch.tensor(-1.0)}
    check = check_unrolled(tensors, 1.0, steps=("mu",), thresholds=("t",))
    assert [e.name for e in check.broken] == ["a.t"]


def test_reads_safetensors_and_refuses_pickles(tmp_path) -> None:
    save_file(foreign(), tmp_path / "net.safetensors")
    assert not check_unrolled(read_tensors(tmp_path / "net.safetensors"), 1.0).holds
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(DataError, match="pickle"):
        read_tensors(tmp_path / "net.pkl")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged"):
        read_tensors(tmp_path / "bad.safetensors")
    with pytest.raises(StorageError, match="no file"):
        read_tensors(tmp_path / "none.safetensors")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConditionError, match="norm"):
        check_unrolled(foreign(), 0.0)
    with pytest.raises(SettingsError, match="no name"):
        check_unrolled(nn.Linear(2, 2), 1.0)
    with pytest.raises(DataError, match="check it first"):
        project({"other": torch.ones(1)}, check_unrolled(foreign(), 1.0))
