"""What every quantizer offers. A quantizer is a module; `choose` finds it by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

import numpy as np

from dus_edge.quant.types import QuantType

#: One conversion: target type, dtype of the stored rows, whether importance is given.
Conversion: TypeAlias = tuple[QuantType, np.dtype, bool]


class Quantizer(Protocol):
    """Brings rows of weights to a storage type; all of it is safe to call from threads.

    Stored rows are float32, float16 or uint16 (bf16 bit patterns), ``(n_rows, n_cols)`` and
    C-contiguous; they may be read-only.
    """

    NAME: str

    def prepare(
        self, wanted: Iterable[Conversion], say: Callable[[str], None] = lambda line: None
    ) -> None:
        """Load or compile what these conversions need, so that the work itself never waits.

        Args:
            wanted: the conversions to come; none asks only whether the quantizer is there.
            say: takes lines for the user.

        Raises:
            DependencyError: a package that the quantizer needs is missing.
        """

    def as_input(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows in the form that `quantize` works on, for several calls with the same rows.

        `quantize` takes stored rows too; this only spares it a conversion in each call.
        """

    def quantize(
        self,
        rows: np.ndarray,
        kind: QuantType,
        importance: np.ndarray | None = None,
        *,
        validate: bool = True,
    ) -> np.ndarray:
        """Quantize rows.

        Args:
            rows: stored rows, or what `as_input` made of them; a row must be whole blocks of
                `kind`.
            kind: the target type.
            importance: ``(n_cols,)`` float32, how much an error in each column matters; None
                where that is unknown.
            validate: look for values that the type cannot hold.

        Returns:
            ``uint8`` bytes, rows one after the other.

        Raises:
            OverflowError: a value or a scale is too large for the type (F16 ends at 65,504).
        """
