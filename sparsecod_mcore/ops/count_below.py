"""How many elements of tensors have a magnitude below thresholds: weight sparsity, Eq. 14.

The kernels are csrc/cpu/count_below.cpp and csrc/cuda/count_below.cu; csrc/common/thresholds.h says how they compare.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecod_mcore.ops.cuda_build import register_cuda_fallback

_OPERATOR = torch.ops.sparsecod.count_below.default


def count_below(tensors: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """Return for each tensor and threshold the number of elements with |x| < threshold, in one pass over all tensors.

    |x| and the threshold are compared as real numbers: neither is rounded to the other's format, and so the counts of
    a bfloat16 tensor are those of its float32 copy. NaN is not below anything. On CUDA the host does not wait.

    Args:
        tensors: one or more, of any shapes, strides and mixture of dtypes float32, bfloat16, float16, and on CPU
            float64; on one device. Those with gaps or overlaps in memory are copied.
        thresholds: 1 to 8 positive numbers, in any order.

    Returns:
        Counts [tensors, thresholds], int64, on the tensors' device.

    Raises:
        ValueError: names the argument that does not fit, what was given and what is accepted.
    """
    if not tensors:  # which torch would not know where to send
        raise ValueError("tensors is empty, but must hold at least one tensor")
    return _OPERATOR(tensors, thresholds)


def count_below_reference(tensors: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """`count_below` in plain PyTorch, for any device."""
    magnitudes = [tensor.detach().abs().double() for tensor in tensors]  # in which every format is exact
    return torch.stack([torch.stack([(x < threshold).sum() for threshold in thresholds]) for x in magnitudes])


register_cuda_fallback("count_below", count_below_reference)
