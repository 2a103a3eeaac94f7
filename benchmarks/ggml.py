"""llama.cpp's matrix kernels, called one by one: the peer of the quantised products.

Of the package llama-cpp-python (the extra `llama`), which builds llama.cpp for this machine; only
its library of tensor operations (ggml) is used, by ctypes. Weights lie as llama.cpp lays them when
it loads a model: of 4 bits, eight rows side by side where the processor has AVX2.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from configs.checks import UserError

TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8}
"""Of ggml.h."""
REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"
"""The C++ name of ggml_backend_cpu_repack_buffer_type, which has no C one."""
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
        pointers += ("ggml_get_data", "ggml_backend_cpu_buffer_type")
        for name in (*pointers, "ggml_backend_alloc_ctx_tensors_from_buft"):
            getattr(self._base, name).restype = ctypes.c_void_p
        getattr(self._cpu, REPACKED).restype = ctypes.c_void_p
        self._base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda level, text, data: None
        )
        self._base.ggml_log_set(self._silence, None)
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
        num_outputs, num_rows = len(weights_NK[0]), len(x_RK)
        size = len(weights_NK) * (num_rows * num_outputs * 4 + 4096) + x_RK.nbytes + (8 << 20)
        context = ctypes.c_void_p(self._base.ggml_init(_InitParams(size, None, False)))
        x = self._tensor(context, "f32", x_RK.shape)
        ctypes.memmove(
            self._data(x), np.ascontiguousarray(x_RK, np.float32).ctypes.data, x_RK.nbytes
        )
        graph = ctypes.c_void_p(
            self._base.ggml_new_graph_custom(context, ctypes.c_size_t(4096), ctypes.c_bool(False))
        )
        product = None
        for weight in self._weights(weights_NK, kind):
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

    def _weights(self, weights_NK: Sequence[np.ndarray], kind: str) -> list[ctypes.c_void_p]:
        """The quantised matrices, in the kind of memory that llama.cpp would choose for them."""
        num_bytes = 4096 * len(weights_NK)  # of the descriptions alone: the data lie in the buffer
        context = ctypes.c_void_p(self._base.ggml_init(_InitParams(num_bytes, None, True)))
        weights = [self._tensor(context, kind, w_NK.shape) for w_NK in weights_NK]
        is_repacked = kind == "q4_0" and self._cpu.ggml_cpu_has_avx2()
        where = (
            getattr(self._cpu, REPACKED) if is_repacked else self._base.ggml_backend_cpu_buffer_type
        )
        self._base.ggml_backend_alloc_ctx_tensors_from_buft(context, ctypes.c_void_p(where()))
        for weight, w_NK in zip(weights, weights_NK, strict=True):
            rounded = ctypes.create_string_buffer(w_NK.size * BLOCK_BYTES[kind] // BLOCK)
            self._base.ggml_quantize_chunk(
                TYPES[kind],
                np.ascontiguousarray(w_NK, np.float32).ctypes.data_as(ctypes.c_void_p),
                rounded,
                ctypes.c_int64(0),
                *(ctypes.c_int64(size) for size in w_NK.shape),
                None,
            )
            size = ctypes.c_size_t(len(rounded))
            self._base.ggml_backend_tensor_set(weight, rounded, ctypes.c_size_t(0), size)
        return weights

    def _tensor(self, context, kind: str, shape: tuple[int, ...]) -> ctypes.c_void_p:
        rows, width = (ctypes.c_int64(size) for size in shape)
        return ctypes.c_void_p(self._base.ggml_new_tensor_2d(context, TYPES[kind], width, rows))

    def _data(self, tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._base.ggml_get_data(tensor))
