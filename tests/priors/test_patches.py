"""Images, their patches, and the cosine dictionary."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import ShapeError
from firmly.priors.omp import refuse_dictionary
from firmly.priors.patches import cosine_dictionary, image_from, patches_of


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_taking_apart_and_putting_together(stride):
    images = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patches = patches_of(images, 4, stride)
    assert torch.equal(patches[1].reshape(4, 4), images[0, :4, stride : stride + 4])
    torch.testing.assert_close(image_from(patches, (2, 10, 16), stride), images)


def test_the_mean_of_patches_that_disagree():
    together = image_from(torch.arange(2.0)[:, None].expand(2, 4), (1, 2, 3))
    torch.testing.assert_close(together[0], torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]]))


def test_cosine_dictionary():
    D = cosine_dictionary(8, 256)
    refuse_dictionary(D)
    assert D.shape == (64, 256) and (D[:, 1:].sum(0).abs() < 1e-12).all()
    assert torch.linalg.matrix_rank(cosine_dictionary(5, 25)) == 25


@pytest.mark.parametrize("call", [
    lambda: patches_of(torch.zeros(8, 8), 4), lambda: patches_of(torch.zeros(1, 3, 8), 4),
    lambda: patches_of(torch.zeros(1, 8, 8), 4, 0), lambda: image_from(torch.zeros(4, 16), (1, 8, 8), 3),
    lambda: image_from(torch.zeros(4, 15), (1, 8, 8)), lambda: cosine_dictionary(8, 60),
    lambda: cosine_dictionary(8, 49), lambda: image_from(torch.zeros(4, 4), (1, 5, 5), 3),
])  # fmt: skip
def test_bad_shapes(call):
    with pytest.raises(ShapeError):
        call()
