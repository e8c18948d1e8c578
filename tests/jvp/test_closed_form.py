"""The closed form of the token-averaged Jacobian against all unit directions, which autograd has been held against."""

from typing import Any

import pytest
import torch

from sparsecod_mcore.jvp import closed_form, head_derivative
from sparsecod_mcore.jvp.closed_form import closed_form_sums, in_closed_form
from sparsecod_mcore.jvp.exact import directional_sums
from sparsecod_mcore.model.depth_control import DepthControl
from tests.jvp.models import GQA, MOE, MQA, random_model

S, B, D = 7, 3, 16

KNOWN: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": GQA,
    "mqa": MQA,
    "interleaved_rotary": {"rotary_interleaved": True},
    "wide_heads": {"kv_channels": 6},
    "scaled_softmax": {"softmax_scale": 0.3},
    "scaled_norms": {"control": DepthControl("layernorm_scaling"), "layers": 2},
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_layernorm": True},
    "layer_norm": {"normalization": "LayerNorm"},
    "biases": {"add_qkv_bias": True},
    "biases_everywhere": {"add_bias_linear": True},
    "sandwich_norm": {"control": DepthControl("sandwich_norm")},
    "moe": MOE,
}


@pytest.mark.parametrize("rotated", ["whole", "in part", "not"])  # heads
@pytest.mark.parametrize("name", KNOWN)
def test_closed_form_equals_all_directions(name: str, rotated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(**KNOWN[name])
    layer, angles = model.decoder.layers[-1], model.rotary_pos_emb(S)
    of_one_plane = angles[..., :2] if layer.config.rotary_interleaved else angles[..., [0, angles.shape[-1] // 2]]
    rotary = {"whole": angles, "in part": of_one_plane, "not": None}[rotated]
    for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
        torch.nn.init.uniform_(getattr(norm, "norm", norm).weight, 0.5, 1.5)
    hidden_SBD = torch.randn(S, B, D, dtype=torch.float64) * 2 + 0.5
    expected = directional_sums(layer, hidden_SBD, torch.eye(D, dtype=torch.float64), rotary)
    assert in_closed_form(layer)
    torch.testing.assert_close(closed_form_sums(layer, hidden_SBD, rotary), expected, rtol=1e-11, atol=1e-11)
    monkeypatch.setattr(closed_form, "ACTIVATIONS_AT_ONCE", 2 * 8 * S * 40)
    monkeypatch.setattr(head_derivative, "KEYS_AT_ONCE", 2)
    monkeypatch.setattr(closed_form, "QUERIES_AT_ONCE", 3)
    monkeypatch.setattr(closed_form, "NUMBERS_AT_ONCE", 200)
    monkeypatch.setattr(closed_form, "ROWS_AT_ONCE", 15)
    monkeypatch.setattr(closed_form, "PRODUCTS_AT_ONCE", 300)
    torch.testing.assert_close(closed_form_sums(layer, hidden_SBD, rotary), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_there_is_none(name: str) -> None:
    assert not in_closed_form(random_model(**UNKNOWN[name]).decoder.layers[0])


def test_half_precision_is_computed_in_single() -> None:
    model = random_model(dtype=torch.bfloat16)
    layer, rotary = model.decoder.layers[0], model.rotary_pos_emb(S)
    hidden_SBD = torch.randn(S, B, D, dtype=torch.bfloat16)
    expected = closed_form_sums(layer.double(), hidden_SBD.double(), rotary)
    found = closed_form_sums(layer.bfloat16(), hidden_SBD, rotary)
    assert ((found - expected).norm() / expected.norm()) < 0.02  # what values carry of bfloat16
