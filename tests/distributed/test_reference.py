"""What training reports equals what float64 makes of the activations themselves."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from tests.distributed.jobs import Data
from tests.distributed.programs import train_around

pytestmark = pytest.mark.distributed

# Keeps, of step 3, what goes into and comes out of every sub-layer, and what goes into the final norm.
KEEP = """
import numpy as np, torch
kept = {}

def keep(name, value):
    kept.setdefault(name, []).append(value.detach().double().flatten(0, -2).numpy())

def around(iteration, model, layers, run):
    if iteration != 2:
        return run()
    handles = []
    for layer in layers:
        number = layer.layer_number - 1
        handles += [
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, n=number: keep(f"input/{n}", kwargs["hidden_states"]), with_kwargs=True
            ),
            layer.self_attention.register_forward_hook(lambda m, args, out, n=number: keep(f"attention/{n}", out[0])),
            layer.pre_mlp_layernorm.register_forward_pre_hook(
                lambda m, args, n=number: keep(f"after_attention/{n}", args[0])
            ),
            layer.mlp.register_forward_hook(lambda m, args, out, n=number: keep(f"mlp/{n}", out[0])),
        ]
    final = model[0].module.decoder.final_layernorm
    handles.append(final.register_forward_pre_hook(lambda m, args: keep("h_L", args[0])))
    result = run()
    for handle in handles:
        handle.remove()
    np.savez("ACTIVATIONS", **{name: np.concatenate(values) for name, values in kept.items()})
    return result
"""


def moments(x_TD: np.ndarray) -> dict[str, float]:
    centred_TD = x_TD - x_TD.mean(-1, keepdims=True)
    variance_T = (centred_TD**2).mean(-1)
    fourth_T = (centred_TD**4).mean(-1)
    return {
        "variance": variance_T.mean(),
        "squared_mean": (x_TD.mean(-1) ** 2).mean(),
        "fourth_moment": fourth_T.mean(),
        "kurtosis": (fourth_T / variance_T**2).mean(),
        "max": np.abs(x_TD).max(),
        "tokens": len(x_TD),
        "non_finite": (~np.isfinite(x_TD)).sum(),
    }


def dimension_kurtosis(x_TD: np.ndarray) -> np.ndarray:
    """Eq. 19."""
    centred_TD = x_TD - x_TD.mean(0)
    return (centred_TD**4).mean(0) / (centred_TD**2).mean(0) ** 2


def covariance(f_TD: np.ndarray, h_TD: np.ndarray) -> float:
    return float(((f_TD - f_TD.mean(-1, keepdims=True)) * (h_TD - h_TD.mean(-1, keepdims=True))).mean())


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_statistics_match_float64(model: str, tmp_path: Path, dense_config: Path, moe_config: Path, data: Data) -> None:
    config = {"dense": dense_config, "moe": moe_config}[model]
    path = tmp_path / "activations.npz"
    program = KEEP.replace("ACTIVATIONS", str(path))
    job = train_around(program, tmp_path / "run", config, data, "--cod-jacobian-interval", 0)
    assert job.returncode == 0, job.errors[-3000:]
    reported = {key[1:]: value for key, value in job.statistics().items() if key[0] == 3}
    kept = np.load(path)
    expected: dict[tuple[int, str, str], float] = {}
    scale: dict[tuple[int, str, str], float] = {}
    dimensions: dict[tuple[int, str], tuple[np.ndarray, ...]] = {}
    for layer in range(4):
        f, after, g = (kept[f"{stream}/{layer}"] for stream in ("attention", "after_attention", "mlp"))
        h = kept[f"input/{layer}"]
        # The sums are compared with float64 sums of what was added: measured before rounding.
        streams = {"attention": f, "mlp": g, "after_attention": h + f, "layer_output": after + g}
        for stream, x_TD in streams.items():
            expected |= {(layer, stream, name): value for name, value in moments(x_TD).items()}
        for stream, branch, shortcut in (("after_attention", f, h), ("layer_output", g, after)):
            expected[layer, stream, "shortcut_variance"] = moments(shortcut)["variance"]
            expected[layer, stream, "covariance"] = covariance(branch, shortcut)
            kurtosis_D = dimension_kurtosis(streams[stream])
            expected[layer, stream, "dimension_kurtosis"] = kurtosis_D.mean()
            expected[layer, stream, "max_dimension_kurtosis"] = kurtosis_D.max()
            dimensions[layer, stream] = (streams[stream].mean(0), streams[stream].var(0), kurtosis_D)
            scale[layer, stream, "covariance"] = (branch.var(-1) * shortcut.var(-1)).mean() ** 0.5
    assert reported.keys() == expected.keys()
    for key, value in expected.items():
        assert abs(reported[key] - value) <= 1e-5 * scale.get(key, value), (key, reported[key], value)
    table = job.dimensions(3)
    assert len(table) == 64 * len(dimensions)
    for (layer, stream), moments_of in dimensions.items():
        rows = table.filter((pc.field("layer") == layer) & (pc.field("stream") == stream))
        assert rows["dimension"].to_pylist() == list(range(64))
        mean_D, variance_D, kurtosis_D = moments_of
        np.testing.assert_allclose(rows["mean"], mean_D, rtol=0, atol=1e-5 * variance_D.max() ** 0.5)
        np.testing.assert_allclose(rows["variance"], variance_D, rtol=1e-5)
        np.testing.assert_allclose(rows["kurtosis"], kurtosis_D, rtol=1e-5)
    last = moments(kept["h_L"])["variance"]
    assert abs(reported[3, "layer_output", "variance"] - last) <= 1e-5 * last
