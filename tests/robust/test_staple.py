"""STAPLE against a plain loop, against the truth of simulated annotators, and its monotone likelihood."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import DataError, NotConverged, SettingsError, ShapeError
from firmly.robust import annotated, biased_annotators, staple


def simulated(pixels=(40, 50), seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 2 * pixels[0] * pixels[1], True, generator=generator)
    confusions = torch.tensor(
        [
            [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.05, 0.05, 0.9]],
            [[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.1, 0.6]],
            [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]],
            [[0.85, 0.1, 0.05], [0.1, 0.85, 0.05], [0.1, 0.2, 0.7]],
        ]
    )
    said = torch.stack([torch.multinomial(A[truth], 1, generator=generator)[:, 0] for A in confusions], 1)
    return truth.reshape(2, *pixels), said.reshape(2, *pixels, 4).movedim(-1, 1), confusions.double()


def plain_em(said, classes, posterior, pseudocount, steps):
    """One pixel after the other, straight from the formulas."""
    for _ in range(steps):
        A = torch.full((said.shape[1], classes, classes), pseudocount, dtype=torch.float64)
        for i in range(len(said)):
            for r in range(said.shape[1]):
                if said[i, r] != 255:
                    A[r, :, said[i, r]] += posterior[i]
        A = A / A.sum(2, keepdim=True)
        prior = posterior.mean(0)
        q = prior.repeat(len(said), 1)
        for i in range(len(said)):
            for r in range(said.shape[1]):
                if said[i, r] != 255:
                    q[i] *= A[r, :, said[i, r]]
        posterior = q / q.sum(1, keepdim=True)
    return posterior, A


def test_it_is_the_em_of_the_formulas():
    _, said, _ = simulated((5, 8))
    said = said.clone()
    said[0, 1, :2] = 255
    found = staple(said, 3, tol=1e-30, max_iterations=4000)  # to a fixed point: no growth left
    flat = said.movedim(1, -1).flatten(0, -2)
    start = found.probabilities.movedim(1, -1).flatten(0, -2)
    posterior, A = plain_em(flat, 3, start, 0.01, 1)
    torch.testing.assert_close(posterior, start, atol=1e-6, rtol=0)
    torch.testing.assert_close(A, found.confusion, atol=1e-6, rtol=0)


def test_it_finds_annotators_and_truth():
    truth, said, confusions = simulated()
    found = staple(said, 3)
    torch.testing.assert_close(found.confusion, confusions, atol=0.05, rtol=0)
    torch.testing.assert_close(found.prior, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), atol=0.03, rtol=0)
    votes = torch.nn.functional.one_hot(said, 3).sum(1).argmax(-1)
    known = torch.tensor([0.5, 0.3, 0.2]).double().log().repeat(2, 40, 50, 1)  # Bayes with the true matrices
    for r in range(4):
        known = known + confusions[r].T[said[:, r]].log()
    accuracy, of_votes, best = ((x == truth).double().mean() for x in (found.labels, votes, known.argmax(-1)))
    assert of_votes < accuracy and accuracy > best - 0.003
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(found.log_likelihood, found.log_likelihood[1:]))
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(2, 40, 50, dtype=torch.float64))


def test_void_is_nobody():
    _, said, _ = simulated((10, 12))
    said = said.clone()
    said[:, :, 0] = 255  # nobody
    said[:, 3, 1] = 255  # not all
    found = staple(said, 3, prior=torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(found.probabilities[:, :, 0, 0], torch.tensor([[0.5, 0.25, 0.25]] * 2).double())
    without = staple(said[:, :, 1:], 3, prior=torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(without.probabilities, found.probabilities[:, :, 1:], atol=1e-9, rtol=0)


def test_people_with_habits():
    labels = torch.zeros(4, 40, 40, dtype=torch.long)
    labels[:, 8:30, 8:24], labels[:, 14:26, 18:34] = 1, 2
    several, errors = annotated(biased_annotators(5, seed=1), labels, 3)
    found = staple(several, 3)
    assert (found.labels != labels).double().mean() < min(one.rate for one in errors) + 1e-12


@pytest.mark.parametrize("pseudocount", [5.0, 30.0])
def test_the_penalised_likelihood_never_falls(pseudocount):
    """Of few pixels the penalty is most of it: the likelihood alone falls at once."""
    said = torch.randint(0, 3, (1, 4, 6, 6), generator=torch.Generator().manual_seed(0))
    history = staple(said, 3, pseudocount=pseudocount).log_likelihood
    assert len(history) > 10 and history == tuple(sorted(history))


def test_refusals():
    _, said, _ = simulated((4, 5))
    with pytest.raises(ShapeError, match="annotator"):
        staple(said[0, 0], 3)
    with pytest.raises(DataError, match="between 0 and 1"):
        staple(said, 2)
    with pytest.raises(DataError, match="prior"):
        staple(said, 3, prior=torch.tensor([0.5, 0.2, 0.2]))
    with pytest.raises(NotConverged, match="iterations"):
        staple(said, 3, tol=1e-300, max_iterations=2)
    with pytest.raises(SettingsError, match="tol"):
        staple(said, 3, tol=0.0)
    with pytest.raises(DataError, match="no annotator"):
        staple(torch.full_like(said, 255), 3)
