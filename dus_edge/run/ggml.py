"""What llama-bench asks of ggml's libraries and llama-cpp-python has no names for."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class _ThreadpoolParams(ctypes.Structure):
    """`struct ggml_threadpool_params` of ggml/include/ggml.h."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class Ggml:
    """Devices, backends and pools of threads."""

    CPU, GPU, INTEGRATED_GPU, ACCELERATOR = range(4)  # enum ggml_backend_dev_type
    _POLL = 50  # ggml's default, and llama-bench's

    def __init__(self) -> None:
        import llama_cpp

        ending = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
        prefix = "" if sys.platform == "win32" else "lib"
        folder = Path(llama_cpp.__file__).parent / "lib"
        base, registry, llama = (
            ctypes.CDLL(str(folder / f"{prefix}{name}{ending}"))
            for name in ("ggml-base", "ggml", "llama")
        )
        self._base, self._registry, self._llama = base, registry, llama
        pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        for function, result, arguments in (
            (base.ggml_commit, text, []),
            (base.ggml_backend_dev_description, text, [pointer]),
            (base.ggml_backend_dev_type, ctypes.c_int, [pointer]),
            (base.ggml_backend_dev_backend_reg, pointer, [pointer]),
            (base.ggml_backend_reg_name, text, [pointer]),
            (base.ggml_backend_reg_get_proc_address, pointer, [pointer, text]),
            (base.ggml_threadpool_params_init, None, [pointer, ctypes.c_int]),
            (registry.ggml_backend_dev_count, size, []),
            (registry.ggml_backend_dev_get, pointer, [size]),
            (registry.ggml_backend_dev_by_type, pointer, [ctypes.c_int]),
            (registry.ggml_backend_reg_count, size, []),
            (registry.ggml_backend_reg_get, pointer, [size]),
            (llama.llama_attach_threadpool, None, [pointer, pointer, pointer]),
            (llama.llama_detach_threadpool, None, [pointer]),
        ):
            function.restype, function.argtypes = result, arguments

    def commit(self) -> str:
        """Of ggml, which is llama.cpp's."""
        return self._base.ggml_commit().decode()

    def devices(self, *kinds: int) -> str:
        """Names of the devices of these kinds."""
        n, get = self._registry.ggml_backend_dev_count(), self._registry.ggml_backend_dev_get
        found = [get(i) for i in range(n)]
        return ", ".join(
            self._base.ggml_backend_dev_description(device).decode()
            for device in found
            if self._base.ggml_backend_dev_type(device) in kinds
        )

    def backends(self) -> str:
        """``CPU``, or all others: ``CUDA``, ``Metal,BLAS``."""
        n, get = self._registry.ggml_backend_reg_count(), self._registry.ggml_backend_reg_get
        names = [self._base.ggml_backend_reg_name(get(i)).decode() for i in range(n)]
        return ",".join(name for name in names if name != "CPU") or "CPU"

    @contextlib.contextmanager
    def threadpool(self, context: Any, n_threads: int) -> Iterator[None]:
        """Attach threads that stay; without them a build without OpenMP starts some per token.

        Not done where the library's structure is not the one that is known here.
        """
        params = self._params(n_threads)
        cpu = self._registry.ggml_backend_dev_by_type(self.CPU)
        if params is None or not cpu:
            yield
            return
        backend = self._base.ggml_backend_dev_backend_reg(cpu)
        find = self._base.ggml_backend_reg_get_proc_address
        new = find(backend, b"ggml_threadpool_new")
        free = find(backend, b"ggml_threadpool_free")
        if not new or not free:
            yield
            return
        reference = ctypes.POINTER(_ThreadpoolParams)
        pool = ctypes.CFUNCTYPE(ctypes.c_void_p, reference)(new)(ctypes.byref(params))
        self._llama.llama_attach_threadpool(context, pool, None)
        try:
            yield
        finally:
            self._llama.llama_detach_threadpool(context)
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(free)(pool)

    def _params(self, n_threads: int) -> _ThreadpoolParams | None:
        """ggml's defaults; None if it does not fill the structure as we read it."""
        size = ctypes.sizeof(_ThreadpoolParams)
        room = (ctypes.c_uint8 * (4 * size))(*([0xAA] * (4 * size)))
        self._base.ggml_threadpool_params_init(room, n_threads)
        params = _ThreadpoolParams.from_buffer_copy(bytes(room)[:size])
        # Two bytes at the end only align the structure.
        untouched = all(byte == 0xAA for byte in room[size:])
        known = (params.n_threads, params.poll) == (n_threads, self._POLL)
        return params if untouched and known and not any(params.cpumask) else None
