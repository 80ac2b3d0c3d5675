"""The sampling noise in correlations, in float64 and straight from the definition."""

from collections.abc import Sequence

import numpy as np


def reference_sampling_noise(sequences: Sequence[np.ndarray]) -> float:
    """ρ of inputs of sequences, each `[tokens, features]`, without dead features."""
    x = [np.asarray(sequence, np.float64) for sequence in sequences]
    off_diagonal = ~np.eye(x[0].shape[1], dtype=bool)

    def squared_correlations(hessian: np.ndarray) -> float:
        norms = np.sqrt(np.diag(hessian))
        return ((hessian / np.outer(norms, norms))[off_diagonal] ** 2).sum()

    hessians = np.stack([sequence.T @ sequence for sequence in x])
    whole = squared_correlations(hessians.sum(axis=0))
    single = np.mean([squared_correlations(hessian) for hessian in hessians])
    return (single - whole) / (len(x) - 1) / whole
