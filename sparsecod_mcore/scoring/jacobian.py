"""How far each layer's token-averaged Jacobian is from the identity, from the first sequences."""

import torch

from sparsecod_mcore.jvp.closed_form import closed_form_sums, in_closed_form
from sparsecod_mcore.jvp.directions import Noise
from sparsecod_mcore.jvp.exact import directional_sums
from sparsecod_mcore.jvp.layer import rehearse
from sparsecod_mcore.jvp.statistics import norm_and_error, trace_and_error
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.results import Jacobian, LayerJacobian
from sparsecod_mcore.scoring.score import Measured, Options, Score
from sparsecod_mcore.scoring.stack import Stack


class JacobianScore(Score):
    """J̄ − I as a matrix, in closed form or by all unit vectors; or its norm and trace from random directions.

    Axes: K directions, D hidden width.
    """

    name = "jacobian"

    def __init__(self, stack: Stack, options: Options) -> None:
        super().__init__(stack, options)
        self.num_probes = options.jacobian_probes
        for layer in stack.layers:
            rehearse(layer)

    def _directions(self, layer: int) -> torch.Tensor:
        width = self.stack.hidden_size
        if self.num_probes is None:
            return torch.eye(width, dtype=self.stack.dtype, device=self.stack.device)
        noise = Noise(self.options.seed, 0, layer, self.stack.device, self.stack.dtype)
        return noise.shared(self.num_probes, width)

    def result(self, measured: Measured) -> Jacobian:
        tokens_NT = measured.tokens_NT[: self.options.jacobian_sequences]
        hidden_SBD = self.stack.embed(tokens_NT[:, :-1].to(self.stack.device))
        layers = []
        for layer in range(self.num_layers):
            mean_KD = self._sums(layer, hidden_SBD) / hidden_SBD[..., 0].numel()
            layers.append(self._exact(mean_KD) if self.num_probes is None else self._estimate(layer, mean_KD))
            hidden_SBD = self.stack.layer(layer, hidden_SBD)
        return Jacobian(
            sequences=len(tokens_NT),
            method="exact" if self.num_probes is None else "probes",
            probes=self.num_probes,
            layers=layers,
        )

    def _sums(self, layer: int, hidden_SBD: torch.Tensor) -> torch.Tensor:
        """Sums over tokens of (J - I) v, [K, D]; each worker takes its share of the sequences, or of the directions."""
        directions_KD = self._directions(layer)
        own = slice(parallel.worker(), None, parallel.workers())
        sums_KD = torch.zeros(directions_KD.shape, dtype=torch.float64, device=hidden_SBD.device)
        module, rotary = self.stack.layers[layer], self.stack.rotary_embedding(hidden_SBD.shape[0])
        if self.num_probes is None and in_closed_form(module):
            if hidden_SBD[:, own].numel():
                sums_KD += closed_form_sums(module, hidden_SBD[:, own], rotary)
        elif len(directions_KD[own]):
            sums_KD[own] = directional_sums(module, hidden_SBD, directions_KD[own], rotary)
        parallel.sum_over_workers(sums_KD)
        return sums_KD

    def _exact(self, mean_KD: torch.Tensor) -> LayerJacobian:
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
