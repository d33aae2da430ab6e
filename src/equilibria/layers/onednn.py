"""oneDNN beside MKL, PyTorch's two libraries for products on a CPU: which is the quicker one on this processor.

MKL uses the AVX-512 instructions of Intel's processors alone. oneDNN uses those of AMD's processors as well, and takes
half the time on them (benchmarks/product.py).

Letters: N rows of x, in and out channels.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

from equilibria.torch_private import product_by_onednn


def _mkl_holds_back() -> bool:
    """True if MKL computes products for PyTorch on this processor, and does not use its AVX-512 instructions."""
    backends = torch.backends
    both = backends.mkl.is_available() and backends.mkldnn.is_available()
    return both and backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor() -> str:
    """A description of the processor that names its vendor."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return file.read(1024)  # the first of many equal processors
    except OSError:
        return platform.processor()


MKL_HOLDS_BACK = _mkl_holds_back()


@torch.library.custom_op(
    "equilibria::product", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
def compiled_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b by oneDNN, as one operator of a compiled graph."""
    return product_by_onednn(x, weight, bias)


@compiled_product.register_fake
def _shaped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty(len(x), len(weight))
