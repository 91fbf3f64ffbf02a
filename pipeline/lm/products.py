"""Matrix products at the full width of a CPU's registers.

PyTorch gives products in fp32 to MKL, which on AMD's processors keeps to AVX2, and convolutions to oneDNN, which takes
AVX-512 where it is. A linear layer is a convolution of one pixel, so a large one runs as that there: the same sums in
another order, in half the time.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LEAST_ROWS, _LEAST_WORK = 512, 1 << 25  # the latter in multiplications; smaller products would gain nothing
_PIXELS = 16  # of an image; PyTorch leaves single images to MKL if it has one thread
_STEP = 64


class Linear(torch.nn.Linear):
    """A linear layer that multiplies by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def widen(model: torch.nn.Module) -> None:
    """Has every linear layer of the model multiply by `linear`, in place."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear, but for rounding. input: (…, K). weight: (N, K). bias: (N,). Returns (…, N)."""
    num_rows = input.numel() // input.shape[-1]
    if num_rows < _LEAST_ROWS or num_rows * weight.numel() < _LEAST_WORK or not (is_wide(input) and is_wide(weight)):
        return functional.linear(input, weight, bias)
    rows = fill_up(input.reshape(num_rows, -1))
    images = rows.view(-1, 1, _PIXELS, rows.shape[1]).permute(0, 3, 1, 2)  # (…, K, 1, pixels), channels last
    output = torch.conv2d(images, weight[..., None, None], bias).permute(0, 2, 3, 1).reshape(len(rows), -1)
    return output[:num_rows].view(*input.shape[:-1], -1)


def is_wide(tensor: Any) -> bool:
    """Whether its products are made that way; tensor: or a model."""
    is_plain = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_plain and _is_wider_than_mkl()


def rounded(num_rows: int) -> int:
    """Up to an eighth more than many rows: oneDNN makes a kernel for every number that it meets, and keeps it."""
    if num_rows < _LEAST_ROWS:
        return num_rows
    step = max(_STEP, (1 << num_rows.bit_length()) // 32)
    return -(-num_rows // step) * step


def fill_up(rows: Tensor) -> Tensor:
    """With rows of zeros, to such a number."""
    missing = rounded(len(rows)) - len(rows)
    return functional.pad(rows, (0, 0, 0, missing)) if missing else rows


@cache
def _is_wider_than_mkl() -> bool:
    cpus = Path("/proc/cpuinfo")
    is_amd = cpus.is_file() and "AuthenticAMD" in cpus.read_text()
    return is_amd and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
