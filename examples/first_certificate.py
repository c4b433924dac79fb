"""An algorithm, a network of ten layers, and an interval for its worst case."""

import torch

import firmly as fm

kernel = torch.ones(5, 5, dtype=torch.float64) / 25
A = fm.linear.Convolution(kernel, shape=(1, 64, 64))
algorithm = fm.algorithms.ForwardBackward(A, prior=fm.prox.L1(0.01))
net = fm.unroll(algorithm, depth=10, learn=("step_size",))

cert = fm.certify(net, wrt="data")
cert.save("deblur.certificate")
fm.verify("deblur.certificate", net)
print(cert)
