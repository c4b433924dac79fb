"""Every bound for a small ordinary network, next to each other, and why the cheap ones are loose."""

import torch

import firmly as fm

net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 2, bias=False))
with torch.no_grad():
    net[0].weight.copy_(torch.diag(torch.tensor([1.0, 0.5])))
    net[2].weight.copy_(torch.diag(torch.tensor([0.5, 1.0])))

cert = fm.certify(net, shape=(2,))
for bound in cert.bounds:
    print(f"{bound.method:10s} {bound.value:.4f}")
print(f"attained   {cert.lower:.4f}")
