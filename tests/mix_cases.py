"""Sensitivities that nobody measured, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dus_edge.quant.mix.matrices import Matrix
from dus_edge.quant.sensitivity import Sensitivity
from dus_edge.quant.sensitivity.candidates import candidate_types


def made_up(matrices: Sequence[Matrix], *, seed: int = 0, identity: str = "made up") -> Sensitivity:
    """Losses that fall by about four with each bit, from matrix to matrix of all sizes."""
    draw = np.random.default_rng(seed)
    kl = {}
    for matrix in matrices:
        scale = float(np.exp(draw.normal(0, 1.5))) * matrix.n_weights * 1e-9
        kl[matrix.name] = {
            kind.name: scale * 4**-kind.bits_per_weight * float(draw.uniform(0.8, 1.2))
            for kind in candidate_types(matrix.n_cols)
        }
    return Sensitivity(identity, 4096, "nothing", kl)
