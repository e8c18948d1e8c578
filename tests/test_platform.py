"""Each CPU patch: what upstream does without it, and that it mends that. A Megatron upgrade shows here what changed."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

from sparsecod_mcore import platform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no stand-in")

# Per patch: code that fails without it and succeeds with it. Earlier patches are applied in both cases.
NEEDS = {
    "stand_in_for_the_device": """
        torch.cuda.set_device(0); torch.cuda.synchronize()
        assert torch.cuda.current_device() == torch.device("cpu") and torch.cuda.device_count() == 1
        with torch.cuda.stream(torch.cuda.Stream()): torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
        assert torch.cuda.get_device_properties(0).major and torch.cuda.memory_stats()["any"] == 0
    """,
    "place_tensors_on_cpu": """
        for make in (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn):
            assert make(2, device="cuda").device.type == "cpu"
        assert torch.tensor([1], device="cuda").cuda().device.type == "cpu" and torch.nn.Linear(1, 1).cuda()
        torch.func.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))  # scripts functions that call factories
    """,
    "name_types_as_cuda": """
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    """,
    "leave_fusions_uncompiled": """
        import inspect, sys
        assert torch.compile.__module__ == "torch"
        from megatron.core.fusions.fused_bias_swiglu import swiglu
        from megatron.core.transformer.moe.router import InferenceTopKRouter
        from megatron.core.fusions import fused_cross_entropy
        assert inspect.isfunction(swiglu) and "torch._inductor" not in sys.modules
    """,
    "keep_random_state_on_cpu": """
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        tracker = CudaRNGStatesTracker(); tracker.add("apart", 5)
        torch.manual_seed(1); before = torch.rand(3); torch.manual_seed(1)
        with tracker.fork("apart"): inside = torch.rand(3)
        assert torch.equal(torch.rand(3), before) and not torch.equal(inside, before)
        torch.manual_seed(5); assert torch.equal(torch.rand(3), inside)
    """,
    "give_split_sizes_to_gloo": """
        from megatron.core.transformer.moe import token_dispatcher
        sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 4]), as_numpy=True)
        assert type(sizes).__module__ == "numpy" and sizes.tolist() == [3, 4]
    """,
    "skip_fusion_warm_up": """
        import megatron.training.training as training
        torch.manual_seed(1); before = torch.get_rng_state()
        training.set_jit_fusion_options(tp_size=1)
        assert torch.equal(torch.get_rng_state(), before)
    """,
    "allow_no_cuda": """
        import functools, megatron.training.training as training
        assert training.initialize_megatron.keywords == {"allow_no_cuda": True}
    """,
    "keep_random_state_around_data_iterators": """
        import megatron.training.training as training
        torch.manual_seed(1); before = torch.get_rng_state()
        training.get_args = lambda: None
        training.build_train_valid_test_data_loaders = lambda provider: (torch.rand(1), 1 / 0)
        try: training.build_train_valid_test_data_iterators(None)
        except ZeroDivisionError: pass
        assert torch.equal(torch.get_rng_state(), before)
    """,
}


def run_with_patches(code: str, patches: list[str]) -> subprocess.CompletedProcess[str]:
    calls = "\n".join(f"platform.{name}()" for name in patches)
    program = f"import torch\nfrom sparsecod_mcore import platform\n{calls}\n{inspect.cleandoc(code)}\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=os.getcwd()
    )


@pytest.mark.parametrize("name", NEEDS)
def test_patch_is_needed_and_mends(name: str) -> None:
    names = [patch.__name__ for patch in platform.CPU_PATCHES]
    earlier = names[: names.index(name)]
    assert run_with_patches(NEEDS[name], earlier).returncode != 0, "upstream no longer needs this patch"
    done = run_with_patches(NEEDS[name], [*earlier, name])
    assert done.returncode == 0, done.stderr


def test_every_patch_has_its_test() -> None:
    assert [patch.__name__ for patch in platform.CPU_PATCHES] == list(NEEDS)


def test_torch_still_knows_that_there_is_no_gpu() -> None:
    done = run_with_patches("platform.prepare()\nassert not torch.cuda.is_available()", [])
    assert done.returncode == 0, done.stderr


def test_fusions_that_were_imported_before_are_left_uncompiled_too() -> None:
    program = """
        import sys
        import torch
        from megatron.core.fusions.fused_bias_swiglu import swiglu
        from sparsecod_mcore import platform
        platform.prepare()
        x = torch.randn(3, 8)
        assert torch.equal(swiglu(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])
        assert torch._dynamo.config.disable and not torch._dynamo.utils.counters["stats"]
    """
    done = run_with_patches(program, [])
    assert done.returncode == 0, done.stderr[-2000:]
