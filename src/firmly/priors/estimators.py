"""Dictionary learning as scikit-learn estimators; needs scikit-learn, the extra `sklearn`.

Rows are signals, and `components_` has the atoms as rows, as everywhere in scikit-learn. What the methods do is written
at the classes of `firmly.priors` that they wrap.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from firmly.errors import ShapeError
from firmly.linear import LinearMap
from firmly.priors.alternating import Alternating, Unrolled
from firmly.priors.analysis_operator import AnalysisOperator, TightFrame, UnitRows
from firmly.priors.k_svd import KSvd, Mod
from firmly.priors.lasso import lasso
from firmly.priors.learning import Learned, Method, learn_dictionary, learn_from_stream
from firmly.priors.omp import omp
from firmly.priors.online import Online
from firmly.priors.sparse_model import SparseModel
from firmly.priors.synthesis import CircularSynthesis

__all__ = [
    "KSVD",
    "MOD",
    "AlternatingDictionary",
    "AnalysisDictionary",
    "ConvolutionalDictionary",
    "OnlineDictionary",
    "UnrolledDictionary",
]


class _DictionaryEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """fit, transform, `components_` (n_components, n_features), `n_iter_`, `objectives_`, `n_replaced_`.

    `n_components=None` takes as many atoms as features. Progress is reported by `learn_dictionary(callback=...)`, not
    here.
    """

    n_components: int | None
    max_iter: int
    tol: float
    random_state: Any

    def fit(self, X: Any, y: None = None) -> _DictionaryEstimator:
        """Learn from signals X (n_samples, n_features)."""
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        learned = learn_dictionary(
            self._signals(X), self._method(X.shape[1]), self._atoms(X), iterations=self.max_iter, tol=self.tol,
            seed=self._seed(),
        )  # fmt: skip
        self._keep(learned)
        self.n_iter_ = -(-learned.iterations // self._rounds(len(X)))
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The codes of X: (n_samples, n_components)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        data = self._signals(X)
        return self._codes(torch.from_numpy(self.components_.T).to(data.dtype), data).numpy()

    @abstractmethod
    def _method(self, n_features: int) -> Method:
        """What `fit` alternates."""

    @abstractmethod
    def _codes(self, dictionary: Tensor, data: Tensor) -> Tensor:
        """Codes for a dictionary (m, n)."""

    def _signals(self, X: np.ndarray) -> Tensor:
        """The signals in the rows."""
        return _tensor(X)

    def _atoms(self, X: np.ndarray) -> int:
        return X.shape[1] if self.n_components is None else self.n_components

    def _rounds(self, n_samples: int) -> int:
        return 1

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _keep(self, learned: Learned) -> None:
        self.components_ = learned.dictionary.mT.contiguous().numpy()
        self.objectives_, self.n_replaced_ = learned.objectives, learned.replaced

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)


class KSVD(_DictionaryEstimator):
    """`firmly.priors.KSvd`: at most `n_nonzero` atoms per signal (at most n_features), codes by matching pursuit."""

    def __init__(self, n_components=None, *, n_nonzero=5, exact=True, max_iter=30, tol=0.0, random_state=None):
        self.n_components = n_components
        self.n_nonzero = n_nonzero
        self.exact = exact
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _method(self, n_features: int) -> Method:
        return KSvd(self.n_nonzero, self.exact)

    def _codes(self, dictionary: Tensor, data: Tensor) -> Tensor:
        return omp(dictionary, data, min(self.n_nonzero, *dictionary.shape)).dense()


class MOD(_DictionaryEstimator):
    """`firmly.priors.Mod`: at most `n_nonzero` atoms per signal (at most n_features), codes by matching pursuit."""

    def __init__(self, n_components=None, *, n_nonzero=5, max_iter=30, tol=0.0, random_state=None):
        self.n_components = n_components
        self.n_nonzero = n_nonzero
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _method(self, n_features: int) -> Method:
        return Mod(self.n_nonzero)

    def _codes(self, dictionary: Tensor, data: Tensor) -> Tensor:
        return omp(dictionary, data, min(self.n_nonzero, *dictionary.shape)).dense()


class _LassoEstimator(_DictionaryEstimator):
    """Codes are Lasso solutions, to a duality gap of `transform_tol` relative to |x|^2 / 2."""

    alpha: float
    transform_tol: float

    def _codes(self, dictionary: Tensor, data: Tensor) -> Tensor:
        return self._lasso(dictionary.double(), data)

    def _lasso(self, D: Tensor | LinearMap, data: Tensor) -> Tensor:
        found = lasso(D, data.double(), self.alpha, tol=self.transform_tol)
        if not bool(found.converged.all()):
            warnings.warn(str(found.status), ConvergenceWarning, stacklevel=4)
        return found.code.to(data.dtype)


class OnlineDictionary(_LassoEstimator):
    """`firmly.priors.Online`: `max_iter` passes over mini-batches, or `partial_fit` of batch after batch."""

    tol = 0.0  # a mini-batch does not show when to stop

    def __init__(
        self, n_components=None, *, alpha=0.1, batch_size=256, steps=40, max_iter=5, transform_tol=1e-8,
        random_state=None,
    ):  # fmt: skip
        self.n_components = n_components
        self.alpha = alpha
        self.batch_size = batch_size
        self.steps = steps
        self.max_iter = max_iter
        self.transform_tol = transform_tol
        self.random_state = random_state

    def partial_fit(self, X: Any, y: None = None) -> OnlineDictionary:
        """One round with the batch X; the first decides on the atoms to start from, and their precision."""
        begun = hasattr(self, "components_")
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=not begun)
        start = torch.from_numpy(self.components_.T) if begun else None
        data = _tensor(X) if start is None else _tensor(X).to(start.dtype)
        atoms = None if begun else self._atoms(X)
        memory = self._memory if begun else None
        learned = learn_from_stream([data], self._method(X.shape[1]), atoms, start, memory, self._seed())
        self._keep(learned)
        self.n_iter_ = getattr(self, "n_iter_", 0) + 1
        return self

    def _keep(self, learned: Learned) -> None:
        super()._keep(learned)
        self._memory = learned.memory._replace(codes=learned.memory.codes[:0])

    def _method(self, n_features: int) -> Online:
        return Online(self.alpha, batch_size=self.batch_size, steps=self.steps)

    def _rounds(self, n_samples: int) -> int:
        return -(-n_samples // self.batch_size)


class AlternatingDictionary(_LassoEstimator):
    """`firmly.priors.Alternating`: `steps` of FISTA, then a gradient step for the dictionary."""

    def __init__(
        self, n_components=None, *, alpha=0.1, steps=20, max_iter=100, tol=1e-5, transform_tol=1e-8, random_state=None
    ):
        self.n_components = n_components
        self.alpha = alpha
        self.steps = steps
        self.max_iter = max_iter
        self.tol = tol
        self.transform_tol = transform_tol
        self.random_state = random_state

    def _method(self, n_features: int) -> Method:
        return Alternating(SparseModel(self.alpha), self.steps)


class UnrolledDictionary(_LassoEstimator):
    """`firmly.priors.Unrolled`: the gradient goes through the last `through` of `steps` iterations of FISTA."""

    def __init__(
        self, n_components=None, *, alpha=0.1, steps=20, through=None, max_iter=50, tol=1e-5, transform_tol=1e-8,
        random_state=None,
    ):  # fmt: skip
        self.n_components = n_components
        self.alpha = alpha
        self.steps = steps
        self.through = through
        self.max_iter = max_iter
        self.tol = tol
        self.transform_tol = transform_tol
        self.random_state = random_state

    def _method(self, n_features: int) -> Method:
        return Unrolled(SparseModel(self.alpha), self.steps, through=self.through)


class ConvolutionalDictionary(_LassoEstimator):
    """`firmly.priors.Alternating` with a `CircularSynthesis`: short atoms at every place of long signals.

    A row is a signal in one dimension, or an image of `image_shape`, flattened. `components_` is (n_components,
    atom_size, or its square for images), and `transform` gives the codes at all places, atom after atom:
    (n_samples, n_components * n_features). Atoms longer than the signals are refused.
    """

    def __init__(
        self, n_components=3, *, atom_size=3, image_shape=None, alpha=0.1, steps=20, max_iter=50, tol=1e-5,
        transform_tol=1e-6, random_state=None,
    ):  # fmt: skip
        self.n_components = n_components
        self.atom_size = atom_size
        self.image_shape = image_shape
        self.alpha = alpha
        self.steps = steps
        self.max_iter = max_iter
        self.tol = tol
        self.transform_tol = transform_tol
        self.random_state = random_state

    def _synthesis(self, n_features: int) -> CircularSynthesis:
        shape: Sequence[int] = (n_features,) if self.image_shape is None else tuple(self.image_shape)
        if math.prod(shape) != n_features:
            raise ShapeError(f"images of shape {tuple(shape)} have {math.prod(shape)} features, given {n_features}")
        return CircularSynthesis(shape, [min(self.atom_size, n) for n in shape])

    def _method(self, n_features: int) -> Method:
        return Alternating(SparseModel(self.alpha, self._synthesis(n_features)), self.steps)

    def _signals(self, X: np.ndarray) -> Tensor:
        return _tensor(X).reshape(-1, *self._synthesis(X.shape[1]).shape)

    def _codes(self, dictionary: Tensor, data: Tensor) -> Tensor:
        A = self._synthesis(self.n_features_in_).linear_map(dictionary.double())
        return self._lasso(A, data[:, None]).flatten(1)

    @property
    def _n_features_out(self) -> int:
        return len(self.components_) * self.n_features_in_


class AnalysisDictionary(_DictionaryEstimator):
    """`firmly.priors.AnalysisOperator`: `components_` is Gamma, and `transform` is X Gamma'.

    `tight=True` asks for a unit-norm tight frame, which has n_components >= n_features; False for rows of unit norm
    only; None for a tight frame where there can be one.
    """

    def __init__(self, n_components=None, *, alpha=0.1, tight=None, steps=30, max_iter=50, tol=1e-5, random_state=None):
        self.n_components = n_components
        self.alpha = alpha
        self.tight = tight
        self.steps = steps
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _method(self, n_features: int) -> Method:
        enough = self.n_components is None or self.n_components >= n_features
        tight = enough if self.tight is None else self.tight
        return AnalysisOperator(self.alpha, TightFrame() if tight else UnitRows(), self.steps)

    def _codes(self, dictionary: Tensor, data: Tensor) -> Tensor:
        return data @ dictionary


def _tensor(X: np.ndarray) -> Tensor:
    """The array as a tensor, without a copy where PyTorch allows it."""
    return torch.from_numpy(X if X.flags.writeable and X.flags.c_contiguous else np.array(X, order="C"))
