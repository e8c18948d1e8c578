"""The norm and the core attention of the local spec."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.model.attention import SDPACoreAttention, zigzag_positions  # noqa: E402
from sparsecod_mcore.model.norm import RMSNorm  # noqa: E402


def test_rms_norm_against_float64() -> None:
    config: Any = SimpleNamespace(
        params_dtype=torch.float32, sequence_parallel=True, layernorm_zero_centered_gamma=False
    )
    norm = RMSNorm(config, 40, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 3, 40) * 10 + 5
    expected = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert norm.weight.sequence_parallel is True


@pytest.mark.parametrize(("size", "length"), [(1, 8), (2, 8), (4, 64)])
def test_zigzag_deals_every_position_once_and_the_triangle_evenly(size: int, length: int) -> None:
    held = [zigzag_positions(length, size, rank) for rank in range(size)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(length))
    assert len({int((positions + 1).sum()) for positions in held}) == 1


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_attention_against_float64(heads: int, groups: int) -> None:
    config: Any = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0)
    groups_of_ranks: Any = SimpleNamespace(cp=None)
    attention = SDPACoreAttention(config, 1, None, "self", pg_collection=groups_of_ranks)
    q = torch.randn(9, 2, heads, 16)
    k, v = (torch.randn(9, 2, groups, 16) for _ in range(2))
    repeat = heads // groups
    scores = torch.einsum("sbnh,tbnh->bnst", q.double(), k.double().repeat_interleave(repeat, 2)) / 4
    scores.masked_fill_(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bnst,tbnh->sbnh", scores.softmax(-1), v.double().repeat_interleave(repeat, 2))
    torch.testing.assert_close(attention(q, k, v).double(), expected.flatten(2), rtol=1e-5, atol=1e-6)
