"""One algorithm, two lives: run it to convergence, or take eight of its steps as a network."""

import torch

import firmly as fm

torch.manual_seed(0)
truth = torch.zeros(1, 1, 64, dtype=torch.float64)
truth[0, 0, [10, 30, 33]] = torch.tensor([1.0, -0.7, 0.9], dtype=torch.float64)

kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64) / 16
A = fm.linear.Convolution(kernel, shape=(1, 64))
y = A(truth) + 0.01 * torch.randn_like(truth)

algorithm = fm.algorithms.ForwardBackward(A, prior=fm.prox.L1(0.01))
for condition in algorithm.conditions():
    print(condition.text)

solution = fm.solve(algorithm, y, tol=1e-8, max_iterations=20000)
net = fm.unroll(algorithm, depth=8, learn=())
print(f"{solution.status.value} after {solution.iterations} iterations")
print(f"error of the solution {(solution.x - truth).norm():.3f}, of eight layers {(net(y) - truth).norm():.3f}")
