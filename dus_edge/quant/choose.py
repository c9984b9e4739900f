"""The choice among the quantizers by name.

`native` is this program's own, `ggml` calls llama.cpp's. Neither is imported before it is chosen,
so the one never needs what only the other needs.
"""

from __future__ import annotations

from dus_edge.errors import UsageError
from dus_edge.quant.quantizer import Quantizer

#: Names of the quantizers, the default first.
QUANTIZERS = ("native", "ggml")
DEFAULT = QUANTIZERS[0]


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
