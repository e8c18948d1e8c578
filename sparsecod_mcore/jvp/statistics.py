"""From sums of probes to statistics: one exact reduction over every rank of the job, and then division.

Axes as in probes.py.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from sparsecod_mcore.jvp.probes import STREAMS, ProbeSums

type JacobianStatistics = dict[tuple[str, str], Tensor]  # (stream, statistic) -> [L]


def reduce_over_ranks(sums: ProbeSums, sequence_length: int, *, replicated: bool) -> tuple[ProbeSums, Tensor]:
    """Return the sums of all ranks, and how many sequences U of each layer were probed with noise of their own, [L].

    `squares` comes back with U = 2: sum and sum of squares over sequences of their tokens' mean; so its size does not
    grow with the job. `replicated`: another rank holds the very same tokens. Collective over all ranks.
    """
    total = ProbeSums(*(torch.zeros_like(tensor) if replicated else tensor.clone() for tensor in sums))
    # A sequence lies on the ranks that share its tokens: join them before anything is squared.
    group = parallel_state.get_tensor_and_context_parallel_group()
    dist.all_reduce(total.squares_LTU, group=group)
    means_LTU = total.squares_LTU / sequence_length
    held_L = (sums.tokens_L > 0).double()
    counts = dist.get_rank(group) == 0
    sequences_L = held_L * means_LTU.shape[-1] * counts
    total.squares_LTU = torch.stack([means_LTU.sum(-1), means_LTU.square().sum(-1)], -1) * counts
    flat = torch.cat([tensor.flatten() for tensor in (*total, sequences_L)])
    dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in (*total, sequences_L)])
    shaped = [piece.view(tensor.shape) for piece, tensor in zip(pieces, (*total, sequences_L), strict=True)]
    return ProbeSums(*shaped[:-1]), shaped[-1]


def jacobian_statistics(sums: ProbeSums, sequences_L: Tensor, *, along_residual: bool) -> JacobianStatistics:
    """What reduced sums say of J, and of J with one branch alone, J_attention and J_mlp; layers not probed are NaN.

    With J_bar the mean over tokens t of (J v)_t for v the same at all tokens, and u = (J - I) v:

    deviation        ||J_bar - I||_F / D, from E ||mean_t u_t||^2; of few probes a little low
    deviation_squared  ||J_bar - I||_F^2 / D^2, unbiased however few the probes
    diagonal         tr(J_bar) / D
    token_deviation  mean_t of E ||u_t||^2 / D for a v of each token's own
    residual_gain    1 + sum_t h_t . u_t / sum_t ||h_t||^2 along the residual stream, v = h
    residual_change  (sum_t ||u_t||^2 / sum_t ||h_t||^2)^(1/2) along it

    and for deviation, diagonal and token_deviation `..._error`, the standard error over probes; NaN of a single probe.
    """
    width = sums.shared_LRPD.shape[-1]
    tokens_L11 = sums.tokens_L[:, None, None]
    statistics: JacobianStatistics = {}
    for stream, name in enumerate(STREAMS):
        parts = slice(None) if stream == 0 else slice(stream - 1, stream)
        mean_LPD = sums.shared_LRPD[:, parts].sum(1) / tokens_L11
        norm, norm_error = norm_and_error(mean_LPD)
        trace, trace_error = trace_and_error(sums.products_LRP[:, parts].sum(1) / tokens_L11[..., 0])
        statistics[name, "deviation"] = norm / width
        statistics[name, "deviation_squared"] = norm.square() / width**2
        statistics[name, "deviation_error"] = norm_error / width
        statistics[name, "diagonal"] = 1 + trace / width
        statistics[name, "diagonal_error"] = trace_error / width
        total_L, total_of_squares_L = sums.squares_LTU[:, stream].unbind(-1)
        mean_L = total_L / sequences_L
        variance_L = (total_of_squares_L / sequences_L - mean_L.square()).clamp(min=0)
        error_L = (variance_L / (sequences_L - 1).where(sequences_L > 1, torch.nan)).sqrt()
        statistics[name, "token_deviation"] = mean_L / width
        statistics[name, "token_deviation_error"] = error_L / width
        if along_residual:
            norm_L = sums.residual_norms_L
            statistics[name, "residual_gain"] = 1 + sums.residual_LT[:, stream] / norm_L
            statistics[name, "residual_change"] = (sums.residual_squares_LT[:, stream] / norm_L).sqrt()
    return statistics


def norm_and_error(of_probes_PD: Tensor) -> tuple[Tensor, Tensor]:
    """||A||_F and its standard error, from A v [..., P, D] for P standard normal v."""
    square, error = trace_and_error(of_probes_PD.square().sum(-1))
    return square.sqrt(), error / (2 * square.sqrt())


def trace_and_error(of_probes_P: Tensor) -> tuple[Tensor, Tensor]:
    """tr(A) and its standard error, from v . A v [..., P]; the error of a single probe is NaN."""
    num_probes = of_probes_P.shape[-1]
    deviation = of_probes_P.std(-1) if num_probes > 1 else torch.full_like(of_probes_P[..., 0], torch.nan)
    return of_probes_P.mean(-1), deviation / num_probes**0.5
