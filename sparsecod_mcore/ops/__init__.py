"""Operators of the namespace `sparsecod`: each a compiled kernel, and beside it the same in plain PyTorch."""

import torch  # noqa: F401  the extension links to its libraries

try:
    import sparsecod_mcore._C  # noqa: F401  registers the operators
except ImportError as error:
    raise ImportError(
        f"the compiled operators of sparsecod_mcore do not load ({error}): build them with `make build`, "
        "or with `python setup.py build_ext --inplace` in the source tree"
    ) from error

from sparsecod_mcore.ops.attention_stats import attention_stats, attention_stats_reference
from sparsecod_mcore.ops.count_below import count_below, count_below_reference
from sparsecod_mcore.ops.flash_attention_jvp import (
    SharedTangents,
    flash_attention_jvp,
    flash_attention_jvp_reference,
)
from sparsecod_mcore.ops.probe_moments import (
    NUM_PROBE_MOMENTS,
    ProbeMoment,
    probe_moments,
    probe_moments_reference,
)
from sparsecod_mcore.ops.residual_add_moments import (
    NUM_COLUMN_SUMS,
    NUM_MOMENTS,
    ColumnSum,
    Moment,
    residual_add_moments,
    residual_add_moments_reference,
)
from sparsecod_mcore.ops.rms_norm_jvp import rms_norm_jvp, rms_norm_jvp_reference
from sparsecod_mcore.ops.swiglu_jvp import swiglu_jvp, swiglu_jvp_reference

__all__ = [
    "NUM_COLUMN_SUMS",
    "NUM_MOMENTS",
    "NUM_PROBE_MOMENTS",
    "ColumnSum",
    "Moment",
    "ProbeMoment",
    "SharedTangents",
    "attention_stats",
    "attention_stats_reference",
    "count_below",
    "count_below_reference",
    "flash_attention_jvp",
    "flash_attention_jvp_reference",
    "probe_moments",
    "probe_moments_reference",
    "residual_add_moments",
    "residual_add_moments_reference",
    "rms_norm_jvp",
    "rms_norm_jvp_reference",
    "swiglu_jvp",
    "swiglu_jvp_reference",
]
