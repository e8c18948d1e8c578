"""FP8 and fused optimizers are had where they can be, and their absence is told; stand-ins take the GPU's part."""

from argparse import Namespace

import pytest

from sparsecod_mcore import platform

platform.prepare()

from megatron.core import optimizer  # noqa: E402

from sparsecod_mcore.config import build_parser  # noqa: E402
from sparsecod_mcore.errors import UserError  # noqa: E402
from sparsecod_mcore.train.hardware import check_fp8, unfused_adam  # noqa: E402

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


def arguments(*words: str) -> Namespace:
    args = build_parser().parse_args(["--transformer-impl", "transformer_engine", "--fp8-format", "hybrid", *words])
    assert args.fp8 == "hybrid"
    return args


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_recipes_of_hopper(recipe: str) -> None:
    check_fp8(arguments("--fp8-recipe", recipe), HOPPER)
    check_fp8(arguments("--fp8-recipe", recipe), BLACKWELL)
    with pytest.raises(UserError, match=rf"fp8_recipe {recipe} needs .*it can do: none"):
        check_fp8(arguments("--fp8-recipe", recipe), AMPERE)


def test_recipes_of_later_devices() -> None:
    check_fp8(arguments("--fp8-recipe", "mxfp8"), BLACKWELL)
    with pytest.raises(UserError, match=r"mxfp8 needs .*10\.0, this one has 9\.0; it can do: delayed, tensorwise, b"):
        check_fp8(arguments("--fp8-recipe", "mxfp8"), HOPPER)


def test_fp8_without_transformer_engine() -> None:
    with pytest.raises(UserError, match="fp8_format hybrid needs Transformer Engine"):
        check_fp8(arguments("--transformer-impl", "local"), None)
    check_fp8(build_parser().parse_args([]), None)


def test_an_optimizer_that_is_not_fused_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", True)
    assert "torch's AdamW" in (unfused_adam() or "")
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    assert unfused_adam() is None
