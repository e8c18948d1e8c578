"""How far each layer's token-averaged Jacobian is from the identity, from the first sequences."""

import torch

from sparsecod_mcore.jvp.directions import Noise
from sparsecod_mcore.jvp.exact import deviation_sums, directional_sums
from sparsecod_mcore.jvp.statistics import norm_and_error, trace_and_error
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.results import Jacobian, LayerJacobian
from sparsecod_mcore.scoring.score import Chunk, Measured, Options, Score
from sparsecod_mcore.scoring.stack import Stack


class JacobianScore(Score):
    """J̄ − I as a matrix, by one forward-mode pass for all unit vectors; or its norm and trace from random directions.

    Axes: L layers, K directions, D hidden width.
    """

    name = "jacobian"

    def __init__(self, stack: Stack, options: Options) -> None:
        super().__init__(stack, options)
        self.num_probes = options.jacobian_probes
        directions = self.num_probes or stack.hidden_size
        self.sums_LKD = torch.zeros(
            stack.num_layers, directions, stack.hidden_size, dtype=torch.float64, device=stack.device
        )
        self.tokens = torch.zeros((), dtype=torch.float64, device=stack.device)

    def held_bytes(self) -> int:
        return self.sums_LKD.nbytes

    def observe(self, chunk: Chunk, layer: int, before_SBD: torch.Tensor, after_SBD: torch.Tensor) -> None:
        wanted = self.options.jacobian_sequences - chunk.begin
        if wanted <= 0:
            return
        hidden_SBD = before_SBD[:, :wanted]
        megatron_layer = self.stack.layers[layer]
        rotary = self.stack.rotary_embedding(hidden_SBD.shape[0])
        if self.num_probes is None:
            self.sums_LKD[layer] += deviation_sums(megatron_layer, hidden_SBD, rotary)
        else:
            self.sums_LKD[layer] += directional_sums(megatron_layer, hidden_SBD, self._directions(layer), rotary)
        if layer == 0:
            self.tokens += hidden_SBD[..., 0].numel()

    def _directions(self, layer: int) -> torch.Tensor:
        assert self.num_probes is not None
        noise = Noise(self.options.seed, 0, layer, self.stack.device, self.stack.dtype)
        return noise.shared(self.num_probes, self.stack.hidden_size)

    def gather(self) -> None:
        parallel.sum_over_workers(self.sums_LKD)
        parallel.sum_over_workers(self.tokens)

    def result(self, measured: Measured) -> Jacobian:
        mean_LKD = self.sums_LKD / self.tokens
        of_layer = self._exact if self.num_probes is None else self._estimate
        return Jacobian(
            sequences=min(self.options.jacobian_sequences, len(measured.tokens_NT)),
            method="exact" if self.num_probes is None else "probes",
            probes=self.num_probes,
            layers=[of_layer(layer, mean_KD) for layer, mean_KD in enumerate(mean_LKD)],
        )

    def _exact(self, layer: int, mean_KD: torch.Tensor) -> LayerJacobian:
        deviation_DD = mean_KD.T  # of row k, which is (J̄ − I) e_k, column k
        width = len(deviation_DD)
        jacobian_DD = deviation_DD + torch.eye(width, dtype=deviation_DD.dtype, device=deviation_DD.device)
        off_diagonal_DD = deviation_DD - deviation_DD.diagonal().diag()
        return LayerJacobian(
            deviation=deviation_DD.norm().item() / width,
            off_diagonal=off_diagonal_DD.norm().item() / (width**2 - width) ** 0.5,
            diagonal_mean=jacobian_DD.diagonal().mean().item(),
            diagonal_std=jacobian_DD.diagonal().std().item(),
            frobenius=jacobian_DD.norm().item(),
            spectral=torch.linalg.matrix_norm(jacobian_DD, 2).item(),
            matrix=jacobian_DD.tolist(),
        )

    def _estimate(self, layer: int, mean_KD: torch.Tensor) -> LayerJacobian:
        width = mean_KD.shape[-1]
        norm, norm_error = norm_and_error(mean_KD)
        trace, trace_error = trace_and_error((self._directions(layer).double() * mean_KD).sum(-1))
        return LayerJacobian(
            deviation=norm.item() / width,
            deviation_error=norm_error.item() / width,
            diagonal_mean=1 + trace.item() / width,
            diagonal_mean_error=trace_error.item() / width,
        )
