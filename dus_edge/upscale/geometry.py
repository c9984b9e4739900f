"""How the stream of hidden states moves through a base's layers: pure numbers of layer inputs.

Stream i is what layer i takes in, before its norm; stream n is what the last layer gives. *Block
influence* of a layer is 1 less the mean cosine of its input and its output (ShortGPT,
arXiv:2403.03853, equation 1). The *angle* of two streams is the mean arccosine between their
directions at each token, by π (arXiv:2403.17887, which looks at the last token alone; here it is
every token shown).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: A modified z-score above which a value is an outlier: Iglewicz and Hoaglin, How to Detect and
#: Handle Outliers, ASQC 1993; also NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.5.17.
OUTLIER_Z = 3.5
#: By which a median, and a mean, of absolute deviations become a normal standard deviation.
_MEDIAN_SCALE, _MEAN_SCALE = 1.482602, 1.253314


@dataclass(frozen=True)
class StreamGeometry:
    """Of a base of n layers, over tokens of text.

    Attributes:
        rms: ``(n + 1,)`` float64: of each stream, the mean over tokens of their root mean square.
        influence: ``(n,)`` float64: block influence of each layer, 0 to 2.
        angles: ``(n + 1, n + 1)`` float64: of every two streams, in units of π, 0 to 1.
        n_tokens: that were shown.
        angle_errors: ``(n + 1, n + 1)`` float64: standard errors of the angles over chunks of
            text, for tokens of one chunk lean on each other; None for a single chunk.
    """

    rms: np.ndarray
    influence: np.ndarray
    angles: np.ndarray
    n_tokens: int
    angle_errors: np.ndarray | None = None

    @property
    def n_layers(self) -> int:
        """Layers of the base."""
        return len(self.influence)

    @property
    def z_scores(self) -> np.ndarray:
        """Modified z-score of each layer's block influence ``(n,)``."""
        return modified_z(self.influence)

    @property
    def outliers(self) -> tuple[int, ...]:
        """Layers that turn the stream far more than the others do, in order."""
        return tuple(int(i) for i in np.flatnonzero(self.z_scores > OUTLIER_Z))

    @property
    def outlier_limit(self) -> float:
        """Block influence above which a layer is an outlier."""
        median, spread = _robust_spread(self.influence)
        return median + OUTLIER_Z * spread


def measure_streams(chunks: Iterable[Iterable[np.ndarray]]) -> StreamGeometry:
    """Geometry of streams, in float64.

    A stream that is zero at a token has no direction there: its cosines count as 0.

    Args:
        chunks: of text, equally long; each is arrays ``(n + 1, n_tokens, hidden)``, the same tokens
            of all streams in each; at least one token in all.
    """
    sums = [_sums(blocks) for blocks in chunks]
    n_tokens = sum(n for n, *_ in sums)
    rms, cosines, angles = (sum(found) / n_tokens for found in list(zip(*sums, strict=True))[1:])
    np.fill_diagonal(angles, 0)
    errors = None
    if len(sums) > 1:
        means = np.stack([turns / n for n, _, _, turns in sums]) / np.pi
        errors = means.std(axis=0, ddof=1) / np.sqrt(len(sums))
        np.fill_diagonal(errors, 0)
    return StreamGeometry(rms, 1 - np.diagonal(cosines, 1), angles / np.pi, n_tokens, errors)


def _sums(blocks: Iterable[np.ndarray]) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, and over them the sums of RMS, cosines and arccosines."""
    n_tokens = 0
    rms = cosines = angles = np.zeros(())
    for block in blocks:
        x = np.ascontiguousarray(np.swapaxes(block, 0, 1), dtype=np.float64)
        norms = np.linalg.norm(x, axis=-1)
        rms = rms + norms.sum(0) / np.sqrt(x.shape[-1])
        x /= np.maximum(norms, np.finfo(np.float64).tiny)[..., None]
        cosine = np.clip(x @ np.swapaxes(x, 1, 2), -1, 1)
        cosines = cosines + cosine.sum(0)
        angles = angles + np.arccos(cosine).sum(0)
        n_tokens += len(x)
    return n_tokens, rms, cosines, angles


def modified_z(values: np.ndarray) -> np.ndarray:
    """How far each value is from the median, in robust standard deviations.

    Their unit is the median absolute deviation, or, where over half of the values are equal and
    that is 0, the mean one. All are 0 if all values are equal.

    Args:
        values: ``(n,)`` floats, at least one.
    """
    median, spread = _robust_spread(values)
    return (values - median) / spread if spread else np.zeros(len(values))


def _robust_spread(values: np.ndarray) -> tuple[float, float]:
    """The median, and the unit of `modified_z`."""
    median = np.median(values)
    away = np.abs(values - median)
    return float(median), float(_MEDIAN_SCALE * np.median(away) or _MEAN_SCALE * away.mean())
