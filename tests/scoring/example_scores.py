"""Scores of a made-up model, with every section filled."""

import math

import numpy as np

from sparsecod_mcore.scoring import results

STREAMS = ("attention", "after_attention", "mlp", "layer_output")


def example_scores(layers: int = 4, heads: int = 2, width: int = 16, experts: int = 4) -> results.Scores:
    """The same for the same sizes; shaped like those of a model whose late layers do little."""
    random = np.random.default_rng(0)
    depth_L = np.linspace(0.0, 1.0, layers)

    def by_layer(first: float, last: float, *inner: int) -> list:
        trend = (first + (last - first) * depth_L).reshape(-1, *[1] * len(inner))
        return (trend * np.exp(0.1 * random.standard_normal((layers, *inner)))).tolist()

    def pairs(scale: float) -> list[list[float]]:
        return np.triu(scale * random.random((layers, layers)) * np.exp(-2 * depth_L)[:, None], 1).tolist()

    def below(first: float, last: float, *inner: int) -> dict[str, list]:
        values = np.clip(by_layer(first, last, *inner), 0, 1)
        shares = (0.6, 0.7, 0.8, 1.0)
        return {
            str(threshold): (share * values).tolist()
            for threshold, share in zip(results.SPARSITY_THRESHOLDS, shares, strict=True)
        }

    def mean(figures: dict[str, list]) -> dict[str, float]:
        return {threshold: float(np.mean(values_L)) for threshold, values_L in figures.items()}

    def attention(entropy: float) -> results.AttentionAtLength:
        entropy_LH, causal, full = by_layer(entropy, entropy / 2, heads), below(0.4, 0.8), below(0.7, 0.9)
        return results.AttentionAtLength(
            sequences=8,
            entropy_mean=float(np.mean(entropy_LH)),
            entropy=np.mean(entropy_LH, axis=1).tolist(),
            entropy_heads=entropy_LH,
            sparsity_causal_mean=mean(causal),
            sparsity_causal=causal,
            sparsity_causal_heads=below(0.4, 0.8, heads),
            sparsity_full_mean=mean(full),
            sparsity_full=full,
        )

    def jacobian(layer: int) -> results.LayerJacobian:
        matrix = np.eye(width) * (0.4 + 0.6 * depth_L[layer]) + 0.1 * random.standard_normal((width, width))
        matrix *= 1 - 0.3 * depth_L[layer]
        off_diagonal = matrix - np.diag(np.diag(matrix))
        return results.LayerJacobian(
            deviation=float(np.linalg.norm(matrix - np.eye(width)) / width),
            off_diagonal=float(np.linalg.norm(off_diagonal) / math.sqrt(width**2 - width)),
            diagonal_mean=float(np.diag(matrix).mean()),
            diagonal_std=float(np.diag(matrix).std()),
            frobenius=float(np.linalg.norm(matrix)),
            spectral=float(np.linalg.norm(matrix, 2)),
            matrix=matrix.tolist(),
        )

    def experts_of() -> results.LayerExperts:
        frequency_E = random.dirichlet([5.0] * experts)
        return results.LayerExperts(
            selection_frequency=frequency_E.tolist(),
            balance=float(1 - frequency_E.std() / frequency_E.mean()),
            loss=3.0,
            relative_loss_increase=0.5,
        )

    tensors = {
        f"decoder.layers.{layer}.mlp.linear_fc1.weight": results.TensorSparsity(
            layer=layer, parameters=100, sparsity={"0.01": 0.07}
        )
        for layer in range(layers)
    }
    effective = (3 * layers) // 4
    increases_L = [0.5 if layer < effective else 0.04 for layer in range(layers)]
    causal = pairs(1.0)
    return results.Scores(
        provenance=results.Provenance(
            model="models/example",
            model_sha256="0" * 64,
            data="tokens.npy",
            data_sha256="1" * 64,
            tokens=512,
            dtype="float32",
            device="cpu",
            seed=0,
            options={},
            versions={"torch": "2.11.0"},
        ),
        layers=layers,
        sequences=8,
        length=64,
        loss=2.5,
        causal=results.Causal(matrix=causal, score=float(np.mean(causal))),
        permutation=results.Permutation(
            matrix=pairs(6.0),
            score=1.0,
            interval=results.Interval(low=0.1, high=1.9, confidence=0.95, pairs=5),
        ),
        usefulness=results.Usefulness(
            scored=results.Fit.of(increases_L), held_out=results.Fit.of([1.2 * x for x in increases_L])
        ),
        effective_depth=results.EffectiveDepth(effective=effective, wasted=layers - effective),
        skip=results.Skip(loss=by_layer(4.0, 2.6), relative_loss_increase=by_layer(0.6, 0.04)),
        similarity=results.Similarity(matrix=np.exp(-np.abs(depth_L[:, None] - depth_L)).tolist()),
        jacobian=results.Jacobian(sequences=8, method="exact", layers=[jacobian(layer) for layer in range(layers)]),
        moe=results.Experts(layers={str(layer): experts_of() for layer in range(1, layers)} or {"0": experts_of()}),
        weight_sparsity=results.WeightSparsity(
            parameters=100 * layers, model=mean(below(0.02, 0.1)), layers=below(0.02, 0.1), tensors=tensors
        ),
        attention=results.Attention(lengths={"64": attention(2.0), "256": attention(3.0)}),
        moments=results.Moments(
            sequences=8,
            length=64,
            embedding={"variance": 0.06},
            streams={stream: {"variance": by_layer(0.2, 3.0), "kurtosis": by_layer(3.4, 3.3)} for stream in STREAMS},
        ),
    )
