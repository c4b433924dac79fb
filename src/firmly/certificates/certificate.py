"""What `certify` returns: a bracket of the Lipschitz constant, with all that is needed to check it again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from firmly.certificates.representation import BasisChoice
from firmly.errors import VerificationError
from firmly.storage import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Bound:
    """One method's upper bound, its time in seconds, and a remark."""

    method: str
    value: float
    seconds: float
    note: str = ""


@dataclass
class Certificate:
    """lower <= sup |net(y) - net(y')| / |y - y'| <= upper, for the inputs named in `wrt`.

    `point` and `perturbation` attain `lower`; `multipliers` prove `upper` (None for methods made of norms alone).
    """

    lower: float
    upper: float
    method: str
    bounds: list[Bound]
    wrt: tuple[str, ...]
    inputs: dict[str, tuple[int, ...]]
    is_complex: bool
    basis: BasisChoice
    per_channel: bool
    assumptions: list[str]
    weights_hash: str
    system_hash: str
    point: Tensor
    perturbation: Tensor
    multipliers: Tensor | None = field(default=None)

    @property
    def gap(self) -> float:
        """upper / lower: 1 for a tight certificate."""
        return self.upper / self.lower if self.lower > 0 else float("inf")

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The two inputs whose outputs are `lower` times as far apart as they are."""
        return self.point, self.point + self.perturbation

    def __str__(self) -> str:
        lines = [
            f"Lipschitz constant with respect to {' and '.join(self.wrt)}, in the {self.basis.name} basis:",
            f"  {self.lower:.6g} <= L <= {self.upper:.6g}   (gap {self.gap:.4g}, upper bound by '{self.method}')",
        ]
        for b in self.bounds:
            lines.append(f"  {b.method:<12}{b.value:>14.6g}{b.seconds:>9.2f} s  {b.note}".rstrip())
        lines += [f"  - {text}" for text in self.assumptions]
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write the certificate to one safetensors file, atomically; returns its path."""
        from safetensors.torch import save

        facts = {k: v for k, v in asdict_shallow(self).items() if k not in ("point", "perturbation", "multipliers")}
        tensors = {"point": self.point, "perturbation": self.perturbation}
        if self.multipliers is not None:
            tensors["multipliers"] = self.multipliers
        content = save({k: stored(v) for k, v in tensors.items()}, {"firmly": json.dumps({"format": FORMAT, **facts})})
        return write_atomically(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate; raises `VerificationError` for a file that is none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["firmly"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if facts.pop("format") != FORMAT:
                raise VerificationError(
                    f"{path} was written in another format than {FORMAT}; certify the network again"
                )
            if facts["is_complex"]:
                for name in ("point", "perturbation"):
                    tensors[name] = torch.view_as_complex(tensors[name])
            facts["bounds"] = [Bound(**b) for b in facts["bounds"]]
            choice = facts["basis"]
            facts["basis"] = BasisChoice(choice["name"], tuple(choice["spatial"]), choice["operator"])
            facts["wrt"] = tuple(facts["wrt"])
            facts["inputs"] = {name: tuple(shape) for name, shape in facts["inputs"].items()}
            return cls(**facts, **tensors)
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise VerificationError(f"{path} is not a firmly certificate, or is damaged: {error}") from error


def stored(tensor: Tensor) -> Tensor:
    """As safetensors holds it, which knows no complex128: real and imaginary parts along a last axis."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous()


def asdict_shallow(cert: Certificate) -> dict:
    facts = dict(vars(cert))
    facts["bounds"] = [asdict(b) for b in cert.bounds]
    facts["basis"] = asdict(cert.basis)
    return facts
