"""The exponential in lanes, against float64."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fPIC", "-shared")
LANES = (1, 4, 8, 16)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    shared_object = tmp_path_factory.mktemp("exponential") / "exponential_lanes.so"
    includes = [f"-I{HERE.parents[1] / 'csrc' / 'cpu'}", *(f"-isystem{path}" for path in include_paths())]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *includes, str(HERE / "exponential_lanes.cpp")]
    subprocess.run([*command, "-o", str(shared_object)], check=True)
    library = ctypes.CDLL(str(shared_object))
    library.exponential_in_lanes.restype = ctypes.c_bool
    return library


def exponential(library, lanes, x):
    y = torch.empty_like(x)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y))
    if not library.exponential_in_lanes(lanes, *pointers, ctypes.c_int64(x.numel())):
        pytest.skip(f"this processor has no {lanes} lanes of float32")
    return y


@pytest.mark.parametrize("lanes", LANES)
def test_error_is_at_most_one_unit_in_the_last_place(library, lanes):
    patterns = torch.arange(-(2**31), 2**31 - 4096, 4093)  # of all finite floats, and between those that matter
    x = torch.cat([patterns.to(torch.int32).view(torch.float32), torch.linspace(-105, 90, 2**20)])
    x = x[x.isfinite()]
    x = x[: len(x) // 16 * 16].contiguous()
    found, exact = exponential(library, lanes, x), x.double().exp()
    overflows = exact > torch.finfo(torch.float32).max * (1 + 2**-25)
    assert found[overflows].isposinf().all()
    exponent = torch.frexp(exact).exponent.clamp(min=-125)  # of subnormals too
    unit = torch.ldexp(torch.ones_like(exact), exponent - 24)
    error = (found.double() - exact).abs() / unit
    assert error[~overflows].max() <= 1


@pytest.mark.parametrize("lanes", LANES)
def test_special_values(library, lanes):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 88.72, 88.73, -103.9, -104.1, 1e30, -1e30, 1e-40])
    x = torch.cat([x, torch.tensor([-1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32), x[:1]])
    torch.testing.assert_close(exponential(library, lanes, x), x.exp(), rtol=2**-22, atol=0, equal_nan=True)
