"""A normalising flow of invertible Bregman layers on two moons: train, draw, and prove that it is a bijection."""

import torch

import firmly as fm
from firmly.lab.flow_data import PLANE
from firmly.networks import BregmanFlow, Inverse, invertibility

moons = PLANE[0]
generator = torch.Generator().manual_seed(0)
flow = BregmanFlow(features=2, depth=2, width=16, generator=generator)
flow.start_at(moons.sample(1000, generator))
optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
for _ in range(60):
    loss = -flow.log_prob(moons.sample(256, generator)).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

test = moons.sample(5000, generator)
print(f"log-likelihood {flow.log_prob(test).mean():.3f} nats, of the true density {moons.log_prob(test).mean():.3f}")
for layer in flow.layers[1::2]:
    print(f"invertible by condition '{invertibility(layer).condition}', margin {invertibility(layer).margin:.3f}")

flow = flow.double()
draws = flow.sample(1000, generator)
print(f"1000 draws, back in the latent space to {float((flow.inverse(flow(draws)) - draws).abs().max().detach()):.1g}")
print(fm.certify(Inverse(flow), shape=(2,)))
