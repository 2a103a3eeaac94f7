"""llama.cpp's matrix kernels, called one by one: the peer of the quantised products.

Of the package llama-cpp-python (the extra `llama`), which builds llama.cpp for this machine; only
its library of tensor operations (ggml) is used, by ctypes.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from configs.checks import UserError

TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8}
"""Of ggml.h."""
BLOCK, BLOCK_BYTES = 32, {"q4_0": 18, "q8_0": 34}
"""Weights of a block, and its bytes with the float16 scale."""


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


class Ggml:
    """The library, with a pool of threads that lives as long as this."""

    def __init__(self, threads: int) -> None:
        """Raises:
        UserError: llama-cpp-python is not installed.
        """
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise UserError('comparing with llama.cpp needs it: pip install ".[llama]"')
        folder = Path(spec.origin).parent / "lib"
        names = ("libggml-base.so", "libggml-cpu.so")
        self._base, self._cpu = (
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names
        )
        pointers = ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph_custom")
        for name in (*pointers, "ggml_get_data"):
            getattr(self._base, name).restype = ctypes.c_void_p
        self._base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._cpu.ggml_threadpool_new.restype = ctypes.c_void_p
        self._cpu.ggml_threadpool_params_default.restype = _ThreadpoolParams
        self._cpu.ggml_graph_plan.restype = _Plan
        self._threads = threads
        params = self._cpu.ggml_threadpool_params_default(threads)
        self._pool = ctypes.c_void_p(self._cpu.ggml_threadpool_new(ctypes.byref(params)))
        self._kept: list = []

    def products(
        self, x_RK: np.ndarray, weights_NK: Sequence[np.ndarray], kind: str
    ) -> Callable[[], np.ndarray]:
        """A call that multiplies x with every weight in turn; it returns the last product [R, N].

        Args:
          kind: "q8_0" or "q4_0".
        """
        num_outputs, num_inputs = weights_NK[0].shape
        num_rows = x_RK.shape[0]
        size = sum(w.size for w in weights_NK) * BLOCK_BYTES[kind] // BLOCK
        size += len(weights_NK) * (num_rows * num_outputs * 4 + 4096) + x_RK.nbytes + (8 << 20)
        context = ctypes.c_void_p(self._base.ggml_init(_InitParams(size, None, False)))
        x = self._tensor(context, "f32", num_inputs, num_rows)
        ctypes.memmove(
            self._data(x), np.ascontiguousarray(x_RK, np.float32).ctypes.data, x_RK.nbytes
        )
        graph = ctypes.c_void_p(
            self._base.ggml_new_graph_custom(context, ctypes.c_size_t(4096), ctypes.c_bool(False))
        )
        product = None
        for w_NK in weights_NK:
            weight = self._tensor(context, kind, num_inputs, num_outputs)
            self._base.ggml_quantize_chunk(
                TYPES[kind],
                np.ascontiguousarray(w_NK, np.float32).ctypes.data_as(ctypes.c_void_p),
                self._data(weight),
                ctypes.c_int64(0),
                ctypes.c_int64(num_outputs),
                ctypes.c_int64(num_inputs),
                None,
            )
            product = ctypes.c_void_p(self._base.ggml_mul_mat(context, weight, x))
            self._base.ggml_build_forward_expand(graph, product)
        plan = self._cpu.ggml_graph_plan(graph, self._threads, self._pool)
        work = ctypes.create_string_buffer(max(plan.work_size, 1))
        plan.work_data = ctypes.addressof(work)
        self._kept.append((context, graph, plan, work))
        data = self._data(product)
        result_RN = np.ctypeslib.as_array(
            ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), (num_rows, num_outputs)
        )

        def run() -> np.ndarray:
            status = self._cpu.ggml_graph_compute(graph, ctypes.byref(plan))
            if status != 0:
                raise RuntimeError(f"ggml_graph_compute failed with status {status}")
            return result_RN

        return run

    def _tensor(self, context, kind: str, width: int, rows: int) -> ctypes.c_void_p:
        sizes = (ctypes.c_int64(width), ctypes.c_int64(rows))
        return ctypes.c_void_p(self._base.ggml_new_tensor_2d(context, TYPES[kind], *sizes))

    def _data(self, tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._base.ggml_get_data(tensor))
