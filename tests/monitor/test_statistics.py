"""From moments to statistics, and through the buffer that holds them."""

import pytest
import torch

from sparsecod_mcore.model.residual import ATTENTION_ADD, MLP_ADD
from sparsecod_mcore.monitor.buffer import MomentsBuffer
from sparsecod_mcore.monitor.statistics import STREAMS, first_non_finite, layer_statistics
from sparsecod_mcore.ops import residual_add_moments

NUM_LAYERS, TOKENS, WIDTH = 3, 17, 40


def filled_buffer() -> tuple[MomentsBuffer, dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    buffer = MomentsBuffer(2, NUM_LAYERS, "cpu")
    added = {}
    buffer.begin(7)
    for layer in range(NUM_LAYERS):
        for add in (ATTENTION_ADD, MLP_ADD):
            f, h = (torch.randn(TOKENS, WIDTH, generator=generator) * (layer + 1) + add for _ in range(2))
            moments = buffer.moments(layer, add)
            assert moments is not None
            residual_add_moments(f, h, moments)
            added[layer, add] = f.double(), h.double()
    buffer.end()
    return buffer, added


def test_named_statistics() -> None:
    buffer, added = filled_buffer()
    statistics = layer_statistics(buffer.moments_ILAM[0])
    for (layer, add), (f, h) in added.items():
        branch, output = (("attention", "after_attention"), ("mlp", "layer_output"))[add]
        y = f + h
        expected = {
            (branch, "variance"): f.var(-1, correction=0).mean(),
            (output, "variance"): y.var(-1, correction=0).mean(),
            (output, "shortcut_variance"): h.var(-1, correction=0).mean(),
            (output, "squared_mean"): y.mean(-1).pow(2).mean(),
            (branch, "max"): f.abs().max(),
        }
        for key, value in expected.items():
            torch.testing.assert_close(statistics[key][layer], value, rtol=1e-6, atol=0)
        split = statistics[output, "shortcut_variance"] + statistics[branch, "variance"]
        split += 2 * statistics[output, "covariance"]
        torch.testing.assert_close(split[layer], statistics[output, "variance"][layer], rtol=1e-6, atol=0)


def test_only_open_slots_measure() -> None:
    buffer, _ = filled_buffer()
    assert buffer.moments(0, ATTENTION_ADD) is None and buffer.iterations == [7]
    buffer.begin(8)
    second = buffer.moments(0, ATTENTION_ADD)
    assert second is not None and second.data_ptr() == buffer.moments_ILAM[1, 0, ATTENTION_ADD].data_ptr()
    buffer.end()
    with pytest.raises(AssertionError):
        buffer.begin(9)
    buffer.clear()
    assert not buffer.iterations and not buffer.moments_ILAM.any()


def test_first_non_finite_follows_the_forward_pass() -> None:
    statistics = {(stream, "non_finite"): torch.zeros(NUM_LAYERS) for stream in STREAMS}
    assert first_non_finite(statistics) is None
    statistics["attention", "non_finite"][2] = 5
    statistics["layer_output", "non_finite"][1] = 4
    statistics["mlp", "non_finite"][1] = 3
    assert first_non_finite(statistics) == (1, "mlp", 3)
