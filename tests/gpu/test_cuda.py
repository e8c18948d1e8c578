"""What only CUDA has: streams, graphs, sizes beyond 32 bits, and a host that does not wait."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsecod_mcore.ops import swiglu_jvp
from tests.gpu.operators import OPERATORS, Operator, to

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]


@pytest.fixture(params=OPERATORS, ids=lambda operator: operator.name)
def operator(request) -> Operator:
    return request.param


def arguments_of(operator: Operator, dtype: torch.dtype = torch.bfloat16) -> tuple:
    torch.manual_seed(0)
    return to(operator.arguments(lambda size: torch.randn(size).to(dtype), operator.shapes[2]), "cuda")


def assert_same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_it_runs_in_the_current_stream(operator):
    arguments = arguments_of(operator)
    expected = operator(*arguments)
    empty = tree_map_only(torch.Tensor, torch.zeros_like, arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # who runs in another stream sees zeros
        for x, content in zip(tree_leaves(empty), tree_leaves(arguments), strict=True):
            if isinstance(x, torch.Tensor):
                x.copy_(content)
        results = operator(*empty)
    stream.synchronize()
    assert_same(results, expected)


def test_the_host_does_not_wait(operator):
    arguments = arguments_of(operator)
    operator(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_float64_is_refused(operator):
    with pytest.raises(ValueError, match="float64"):
        operator(*arguments_of(operator, torch.float64))


def test_more_elements_than_32_bits_count():
    width, rows = 1024, (1 << 20) + 3  # 2^31 and some elements go in
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    gate_up = torch.empty(rows, 2 * width, dtype=torch.bfloat16, device="cuda").normal_()
    tangent = torch.empty_like(gate_up).normal_()
    results = swiglu_jvp(gate_up, tangent)
    for part in (slice(0, 5), slice(rows - 5, rows)):
        expected = swiglu_jvp(gate_up[part].contiguous(), tangent[part].contiguous())
        assert_same([x[part] for x in results], list(expected))


def test_it_can_be_captured_in_a_graph():
    torch.manual_seed(0)
    gate_up, tangent = torch.randn(2, 97, 256, device="cuda")
    expected = swiglu_jvp(gate_up, tangent)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = swiglu_jvp(gate_up, tangent)
    for x in results:
        x.zero_()
    graph.replay()
    assert_same(list(results), list(expected))
