"""The two ways that the benchmark of scoring compares find the same."""

import pytest
import torch

from benchmarks import scoring


def test_both_ways_find_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    stack = scoring.random_stack(layers=3, width=64, length=8)
    tokens_NT = torch.randint(1024, (10, 9), generator=torch.Generator().manual_seed(0))
    plain = scoring.Turn.take(lambda: scoring.Plain(stack, tokens_NT).score())
    ours = scoring.Turn.take(lambda: scoring.by_engine(stack, tokens_NT))
    assert len(plain.figures["jacobian"]) == 3 * 64**2
    result = scoring.compare([plain], [ours])
    assert result["largest_relative_difference"] < 1e-5
    parts = result["parts"]
    assert list(parts) == ["whole", "interventions", "linear fits", "Jacobians"]
    for way in ("plain", "engine"):
        whole, *others = (part["seconds"][way][0] for part in parts.values())
        assert whole == pytest.approx(sum(others)) and min(others) > 0
    assert "interventions  plain" in capsys.readouterr().out
