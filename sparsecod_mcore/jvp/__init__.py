"""Forward-mode derivatives of Megatron's layers, and the statistics of their Jacobians that training measures.

Everywhere: S sequence positions of this rank, B batch, D hidden width, N heads, G query groups, H head width,
P tangents of one primal. A tangent has the shape of its primal behind a leading axis P.
"""

from sparsecod_mcore.jvp.dual import Dual
from sparsecod_mcore.jvp.layer import Branches, layer_branches, layer_jvp
from sparsecod_mcore.jvp.rules import jvp

__all__ = ["Branches", "Dual", "jvp", "layer_branches", "layer_jvp"]
