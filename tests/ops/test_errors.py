"""What a caller hears who gives what does not fit, and the two lists of moments being one."""

import subprocess
import sys

import pytest
import torch

from sparsecod_mcore import _C
from sparsecod_mcore.ops import NUM_MOMENTS, Moment, residual_add_moments, residual_add_moments_reference

X = torch.zeros(3, 8)
MOMENTS = torch.zeros(20, dtype=torch.float64)


def test_python_and_cpp_name_the_same_moments():
    assert [moment.name for moment in Moment] == _C.MOMENT_NAMES
    assert [int(moment) for moment in Moment] == list(range(NUM_MOMENTS))


@pytest.mark.parametrize("operator", [residual_add_moments, residual_add_moments_reference])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"branch": X.int()}, "branch is int32, but must be float32, bfloat16, float16 or float64"),
        ({"branch": X[0, 0]}, "branch has shape [], but must have shape [..., D]"),
        ({"residual": X[:2]}, "residual has shape [2, 8], but must have branch's shape [3, 8]"),
        ({"residual": X.bfloat16()}, "residual is bfloat16, but must have branch's dtype float32"),
        ({"residual": X.to("meta")}, "residual is on meta, but must be on branch's device cpu"),
        ({"bias": X}, "bias has shape [3, 8], but must have shape [8], branch's last dimension"),
        ({"bias": X[0, :3]}, "bias has shape [3], but must have shape [8], branch's last dimension"),
        ({"bias": X[0].double()}, "bias is float64, but must have branch's dtype float32"),
        ({"moments": MOMENTS[:19]}, "moments has shape [19], but must have shape [20]"),
        ({"moments": MOMENTS.view(1, 20)}, "moments has shape [1, 20], but must have shape [20]"),
        ({"moments": MOMENTS.float()}, "moments is float32, but must be float64"),
        ({"moments": MOMENTS.repeat(2)[::2]}, "moments has stride [2], but must be contiguous"),
        ({"moments": MOMENTS.to("meta")}, "moments is on meta, but must be on branch's device cpu"),
        ({"moments": MOMENTS.clone().requires_grad_()}, "moments requires a gradient, but must not"),
    ],
)
def test_arguments_that_do_not_fit(operator, given, told):
    arguments = {"branch": X, "residual": X, "moments": MOMENTS, "bias": None, **given}
    with pytest.raises(ValueError) as error:
        operator(**arguments)
    assert str(error.value) == told
    assert not MOMENTS.any()


def test_a_missing_extension_says_how_to_build_it():
    program = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "sparsecod_mcore._C":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing())
import sparsecod_mcore.ops
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith("ImportError: the compiled operators of sparsecod_mcore do not load")
    assert "python setup.py build_ext --inplace" in told
