"""Learn a dictionary from patches: python -m benchmarks.programs.learn_dictionary METHOD COUNT [PASSES].

Prints the seconds of the processor and of the clock, and two scores on unseen patches; `stream` prints the peak memory.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.runner.machine import peak_memory
from firmly.data import Crops, photographs
from firmly.priors import KSvd, Online, lasso, learn_dictionary, learn_from_stream, omp
from firmly.priors.patches import cosine_dictionary, patches_of

ATOMS, SPARSITY, WEIGHT, BATCH = 256, 5, 0.15, 256


def patches(split: str, count: int) -> Tensor:
    """Random 8 x 8 patches of photographs without their mean, of norm 1; flat ones are left out."""
    generator = torch.Generator().manual_seed(0)
    found = torch.cat([patches_of(image, 8, stride=2) for image in photographs(split)])  # type: ignore[arg-type]
    found = found - found.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(found, dim=1)
    kept = (norms > 0.2).nonzero()[:, 0]
    kept = kept[torch.randperm(len(kept), generator=generator)[:count]]
    if len(kept) < count:
        raise SystemExit(f"there are only {len(kept)} patches")
    return found[kept] / norms[kept, None]


def ours(method: Online | KSvd) -> Callable[[Tensor, Tensor, int], Tensor]:
    def learn(data: Tensor, start: Tensor, passes: int) -> Tensor:
        return learn_dictionary(data, method, start=start, iterations=passes).dictionary

    return learn


def spams(mode: int, parameter: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    def learn(data: Tensor, start: Tensor, passes: int) -> Tensor:
        import numpy as np
        import spams

        D = spams.trainDL(
            np.asfortranarray(data.numpy().T), D=np.asfortranarray(start.numpy()), K=ATOMS, mode=mode, numThreads=1,
            lambda1=parameter, batchsize=BATCH, iter=-(-passes * len(data) // BATCH), verbose=False,
        )  # fmt: skip
        return torch.from_numpy(np.ascontiguousarray(D))

    return learn


def scikit_learn(data: Tensor, start: Tensor, passes: int) -> Tensor:
    from sklearn.decomposition import MiniBatchDictionaryLearning

    warnings.simplefilter("ignore")
    model = MiniBatchDictionaryLearning(
        ATOMS, alpha=WEIGHT, batch_size=BATCH, max_iter=passes, fit_algorithm="lars", dict_init=start.mT.numpy(),
        tol=0, max_no_improvement=None, random_state=0,
    )  # fmt: skip
    return torch.from_numpy(model.fit(data.numpy()).components_.T.copy())


METHODS = {
    "online": ours(Online(WEIGHT, batch_size=BATCH)),
    "online-pursuit": ours(Online(sparsity=SPARSITY, batch_size=BATCH)),
    "k-svd": ours(KSvd(SPARSITY, exact=False, batch_size=3000)),
    "spams": spams(2, WEIGHT),
    "spams-pursuit": spams(3, SPARSITY),
    "scikit-learn": scikit_learn,
}


def scores(dictionary: Tensor) -> dict[str, float]:
    """The l1 objective, and half the squared error with five atoms, on 2000 patches of the validation photographs."""
    unseen = patches("validation", 2000).double()
    dictionary = dictionary.double() / torch.linalg.vector_norm(dictionary.double(), dim=0)
    rest = unseen - omp(dictionary, unseen, SPARSITY).synthesise(dictionary)
    return {
        "l1 objective": float(lasso(dictionary, unseen, WEIGHT, tol=1e-6).objective.mean()),
        "error, 5 atoms": float(rest.square().sum(1).mean() / 2),
    }


def stream(count: int) -> Iterator[Tensor]:
    """Batches of patches that are cut when they are asked for."""
    crops, generator = Crops(photographs("train"), 8), torch.Generator().manual_seed(0)
    for _ in range(count // BATCH):
        batch = crops.batch(BATCH, generator).flatten(1)
        yield batch - batch.mean(1, keepdim=True)


def main(name: str, count: int, passes: int = 1) -> dict[str, float]:
    if name == "stream":
        method, start = Online(0.05, batch_size=BATCH, steps=5), cosine_dictionary(8, ATOMS).float()
        learn_from_stream(stream(10 * BATCH), method, start=start)
        before, began = peak_memory(), time.process_time()
        learn_from_stream(stream(count), method, start=start)
        return {
            "seconds processor": time.process_time() - began,
            "MiB": peak_memory(),
            "MiB more": peak_memory() - before,
        }
    data = patches("train", count)
    start = data[:ATOMS].mT.contiguous()
    METHODS[name](data[:1000], start, 1)  # what is loaded at first use
    began, clock = time.process_time(), time.perf_counter()
    dictionary = METHODS[name](data, start, passes)
    found = {"seconds processor": time.process_time() - began, "seconds clock": time.perf_counter() - clock}
    return {**found, **scores(dictionary)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
