"""The commands on networks that firmly did not make: certify, verify, attack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from firmly.certificates import Certificate
from firmly.cli import app
from firmly.errors import VerificationError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A folder with the same small network as code, weights and exported program."""
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))\n"
    )
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    save_file(net.state_dict(), "net.safetensors")
    torch.export.save(torch.export.export(net, (torch.zeros(1, 4),)), "net.pt2")
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_weights_and_exported_program_of_one_network_have_the_same_certificate(folder):
    run("certify", "net.pt2", "-o", "exported", "--method", "spectral")
    run(
        "certify",
        "net.safetensors",
        "--model",
        "small_nets:build",
        "--shape",
        "4",
        "-o",
        "plain",
        "--method",
        "spectral",
    )
    assert Certificate.load("exported").upper == pytest.approx(Certificate.load("plain").upper, rel=1e-6)
    assert "ball arithmetic" in run("verify", "exported", "net.pt2", "--exact")
    run("verify", "plain", "net.safetensors", "--model", "small_nets:build")
    with pytest.raises(VerificationError, match="other weights"):
        run("verify", "plain", "small_nets:build")


def test_an_exported_program_is_attacked(folder):
    assert "amplification" in run("attack", "net.pt2")
