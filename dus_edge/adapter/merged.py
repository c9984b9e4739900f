"""A merged checkpoint is a view of its base: the same tensors, some with an adapter's part added.

The arithmetic is that of peft's `merge_and_unload` on a CPU (`peft/tuners/lora/layer.py`): the
matrices A and B as float32, scale·(B·A) in float32, added to the weights in float32, and the sum
rounded once to the weights' own dtype. A module that is saved whole takes the base's dtype.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType

import numpy as np

from dus_edge.adapter.adapter import Adapter, LowRank, stored_rows, widened_tensor
from dus_edge.adapter.fit import check_fit
from dus_edge.adapter.numbers import as_floats, as_stored
from dus_edge.checkpoint.safetensors import StoredTensor
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.quant.kernels import cached_code

#: Weights that are worked on at once: small enough that what lies between stays in the caches, and
#: that the system is not asked for new pages each time.
_STEP_WEIGHTS = 1 << 17


class MergedCheckpoint(Checkpoint):
    """A checkpoint with an adapter merged into it; every row is computed when it is read."""

    def __init__(self, below: Checkpoint, adapter: Adapter) -> None:
        """Put an adapter over a checkpoint; nothing is read.

        Raises:
            CheckpointError: the adapter is not one of this model.
        """
        check_fit(adapter, below.config)
        self.below = below
        self.adapter = adapter
        self.config = below.config
        self.source = below.source
        self._kernel = _load_kernel()
        self._added = {f"{module}.weight": pair for module, pair in adapter.added.items()}
        self._specs = {name: self._spec(spec) for name, spec in below.specs().items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        spec = self._specs[name]
        stop = spec.n_rows if stop is None else stop
        if (tensor := self.adapter.replaced.get(name)) is not None:
            rows = _converted(tensor, spec, start, stop)
        else:
            rows = self.below.read(name, start, stop)
        if (pair := self._added.get(name)) is not None and len(rows):
            rows = _with_added(self._kernel, rows, pair, spec, start)
        return rows

    def check_unchanged(self) -> None:
        self.below.check_unchanged()
        self.adapter.check_unchanged()

    def _spec(self, spec: TensorSpec) -> TensorSpec:
        """What is changed has a source of its own; copies that are changed alike share it."""
        if spec.name in self.adapter.replaced:
            spec = replace(spec, source=f"{spec.name} of the adapter")
        if (pair := self._added.get(spec.name)) is not None:
            return replace(spec, source=f"{spec.source} with adapter {pair.digest}")
        return spec


def _converted(tensor: StoredTensor, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor that is replaced, in the base's dtype."""
    rows = stored_rows(tensor, start, stop)
    return rows if tensor.dtype == spec.dtype else as_stored(as_floats(rows), spec.dtype)


@functools.cache
def _load_kernel() -> ModuleType:
    """The compiled product; Numba takes its time to import, so only where an adapter is given."""
    with cached_code():
        return importlib.import_module("dus_edge.adapter.kernel")


def _with_added(
    kernel: ModuleType, rows: np.ndarray, pair: LowRank, spec: TensorSpec, start: int
) -> np.ndarray:
    """Rows from `start` on with scale·(B·A) added."""
    a = widened_tensor(pair.a)
    out = np.empty_like(rows)
    step = max(1, _STEP_WEIGHTS // rows.shape[1] // kernel.ROWS) * kernel.ROWS
    for i in range(0, len(rows), step):
        part = rows[i : i + step]
        b = widened_tensor(pair.b, start + i, start + i + len(part))
        total = kernel.low_rank(b, a, pair.scale)
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.add(as_floats(part), total)
        out[i : i + step] = as_stored(total, spec.dtype)
    return out
