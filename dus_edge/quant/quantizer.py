"""What every quantizer offers, and the choice among them by name.

A quantizer is a module: `native` is this program's own, `ggml` calls llama.cpp's. Neither is
imported before it is chosen, so the one never needs what only the other needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, TypeAlias

from dus_edge.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from dus_edge.quant.types import QuantType

#: One conversion: target type, dtype of the stored rows, whether importance is given.
Conversion: TypeAlias = "tuple[QuantType, np.dtype, bool]"

#: Names of the quantizers, the default first.
QUANTIZERS = ("native", "ggml")
DEFAULT = QUANTIZERS[0]


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


def find_quantizer(name: str) -> Quantizer:
    """The quantizer of a name, imported now.

    Raises:
        UsageError: no quantizer has that name.
    """
    match name:
        case "native":
            from dus_edge.quant import native

            return native
        case "ggml":
            from dus_edge.quant import ggml

            return ggml
    raise UsageError(f"there is no quantizer '{name}'; choose one of {', '.join(QUANTIZERS)}.")
