"""What the emulator claims to do and to catch, on kernels written for that (kernels/features.cu)."""

from functools import cache

import pytest
import torch

from tests.cuda_emulator.build import HERE, build
from tests.cuda_emulator.emulator import Emulator, LaunchError, garbage

INT32 = torch.int32


@cache
def emulator() -> Emulator:
    return Emulator(build(sources=[HERE / "kernels" / "features.cu"]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 1, 1), (7, 5, 3), (1024, 1, 1), (4, 4, 64), (2, 512, 1)])
def test_a_barrier_in_blocks_of_any_shape(shape):
    threads = shape[0] * shape[1] * shape[2]
    x, y = torch.arange(threads, dtype=INT32), garbage([threads], INT32)
    (result,) = emulator().launch("launch_rotate", [x, y, *shape], [y])
    assert torch.equal(result, x.roll(-1))


@pytest.mark.parametrize("shape", [(0, 1, 1), (1025, 1, 1), (33, 32, 1), (1, 1, 65), (1 << 16, 1 << 16, 1)])
def test_blocks_that_no_gpu_takes(shape):
    with pytest.raises(LaunchError, match="no such size"):
        emulator().launch("launch_rotate", [None, None, *shape], [])


@pytest.mark.parametrize("grid", [0, 65536])
def test_grids_that_no_gpu_takes(grid):
    with pytest.raises(LaunchError, match="no such size"):
        emulator().launch("launch_grid", [None, grid, 32], [])


@pytest.mark.parametrize("shape", [(64, 1), (16, 4), (8, 16)])
def test_shuffles_and_ballot_in_blocks_of_any_shape(shape):
    threads = shape[0] * shape[1]
    x = torch.randperm(threads, generator=torch.Generator().manual_seed(0)).to(INT32)
    y = garbage([5, threads], INT32)
    (result,) = emulator().launch("launch_shuffles", [x, y, *shape], [y])
    x_WL, lane = x.view(-1, 32), torch.arange(32)
    expected = [
        x_WL[:, [5]].expand(-1, 32),
        x_WL[:, lane ^ 3],
        x_WL[:, torch.where(lane + 2 < 32, lane + 2, lane)],
        x_WL[:, torch.where(lane % 16 >= 1, lane - 1, lane)],
        ((x_WL % 3 == 0).long() << lane).sum(-1, keepdim=True).expand(-1, 32).to(INT32),
    ]
    assert torch.equal(result, torch.stack(expected).view(5, -1).to(INT32))


def test_warp_collectives_need_whole_warps():
    x, y = torch.zeros(48, dtype=INT32), garbage([5, 48], INT32)
    with pytest.raises(LaunchError, match="__shfl_sync in a block of 48 threads, no multiple of 32"):
        emulator().launch("launch_shuffles", [x, y, 48, 1], [y])


@pytest.mark.parametrize("count", [1, 31, 33, 64])
def test_threads_that_have_left_do_not_hold_up_a_barrier(count):
    x, y = torch.arange(count, dtype=INT32), garbage([count], INT32)
    (result,) = emulator().launch("launch_some_leave", [x, y, 64, count], [y])
    assert torch.equal(result, x.flip(0))


MISTAKES = {  # in the order of kernels/features.cu
    "BARRIER_IN_A_BRANCH": "wait for others that never come",
    "DIFFERENT_BARRIERS": "stand at different barriers: .*features.cu:[0-9]+ and .*features.cu:[0-9]+",
    "BARRIER_AND_SHUFFLE": "wait for others that never come|stand at different barriers",
    "DIFFERENT_COLLECTIVES": "lanes of one warp diverge: one is at __(shfl|ballot)_sync, others at __",
    "READS_BEFORE_THE_START": "touches memory outside its tensors",
    "READS_PAST_THE_END": "touches memory outside its tensors",
    "WRITES_PAST_THE_END": "touches memory outside its tensors",
    "WRITES_JUST_PAST_THE_END": "wrote outside its tensors",
    "WRITES_ITS_INPUT": "an input was written",
    "WRITES_PAST_SHARED": "wrote past the end of its shared memory",
    "WRITES_PAST_DYNAMIC_SHARED": "wrote past the end of its shared memory",
    "INDEXES_PAST_AN_ARRAY": "features.cu:[0-9]+: index 64 is outside the array",
    "LOADS_MISALIGNED": "element.h:[0-9]+: misaligned access",
    "DECLARES_SHARED_TWICE": "shared memory is declared in lines [0-9]+ and [0-9]+, but must be once in a kernel",
    "RECURSES_FOREVER": "more stack than a thread has",
    "COPIES_OUTSIDE_SHARED": "cp.async of 16 bytes at .*, outside the block's shared memory",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(mistake):
    x, y = torch.ones(64), garbage([64], torch.float32)
    with pytest.raises(LaunchError, match=MISTAKES[mistake]):
        emulator().launch("launch_mistaken", [x, y, list(MISTAKES).index(mistake)], [y])


def test_a_launch_works_after_one_that_failed():
    x, y = torch.ones(64), garbage([64], torch.float32)
    for mistake in range(len(MISTAKES)):
        with pytest.raises(LaunchError):
            emulator().launch("launch_mistaken", [x, y, mistake], [y])
    (result,) = emulator().launch("launch_mistaken", [x, y, len(MISTAKES)], [y])
    assert torch.equal(result, torch.zeros(64))


def test_the_odd_bytes_after_a_tensor_must_keep_their_poison():
    y = garbage([3], INT32)  # 12 bytes: a fourth element would not leave the page
    x = torch.arange(4, dtype=INT32)
    with pytest.raises(LaunchError, match="wrote outside its tensors"):
        emulator().launch("launch_some_leave", [x, y, 32, 4], [y])


def test_a_copy_arrives_when_it_is_waited_for():
    x, y = torch.randn(32, 4), garbage([32, 4], torch.float32)
    (arrived,) = emulator().launch("launch_copies", [x, y, True], [y])
    assert torch.equal(arrived[:24], x[:24]) and not arrived[24:].any()
    (too_early,) = emulator().launch("launch_copies", [x, y, False], [y])
    assert too_early.isnan().all()


def test_groups_of_copies_arrive_in_their_order():
    x, y = torch.randn(2, 32, 4), garbage([2, 32, 4], torch.float32)
    (result,) = emulator().launch("launch_copies_in_groups", [x, y], [y])
    assert torch.equal(result[0], x[0]) and result[1].isnan().all()


def test_shared_memory_is_nan_before_it_is_written():
    y = torch.zeros(32)
    (result,) = emulator().launch("launch_reads_unwritten", [y], [y])
    assert result.isnan().all()


@pytest.mark.parametrize(("count", "ask"), [(1, False), (12288, False), (12289, True), (58112, True)])
def test_dynamic_shared_memory(count, ask):
    x, y = torch.randn(count), garbage([count], torch.float32)
    (result,) = emulator().launch("launch_through_dynamic", [x, y, count, ask], [y])
    assert torch.equal(result, x.flip(0))


def test_dynamic_shared_memory_over_the_limit():
    x = torch.zeros(1)
    with pytest.raises(LaunchError, match="49156 bytes of dynamic shared memory were not asked for"):
        emulator().launch("launch_through_dynamic", [x, x, 12289, False], [x])
    with pytest.raises(LaunchError, match="error 1"):
        emulator().launch("launch_through_dynamic", [x, x, 58113, True], [x])


def test_static_and_dynamic_shared_memory_share_one_limit():
    y = garbage([32], torch.float32)
    (result,) = emulator().launch("launch_static_and_dynamic", [y, 49152 - 4 * 4096], [y])
    assert torch.equal(result, torch.ones(32))
    with pytest.raises(LaunchError, match="16384 bytes of static and 32772 of dynamic shared memory, together at most"):
        emulator().launch("launch_static_and_dynamic", [y, 49152 - 4 * 4096 + 4], [y])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [False, True])
def test_tensor_core_products(dtype, columns):
    torch.manual_seed(0)
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    stored = b.T.contiguous() if columns else b
    (result,) = emulator().launch("launch_product", [a, stored, d, dtype, columns], [d])
    expected = d.double() + a.double() @ b.double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-5)


def test_the_last_block_sees_all_tickets():
    count, y = torch.zeros(1, dtype=INT32), garbage([1], INT32)
    result = emulator().launch("launch_ticket", [count, y, 37], [count, y])
    assert [x.item() for x in result] == [0, 37]


def test_the_same_tensor_twice_is_the_same_memory():
    x = torch.arange(64, dtype=INT32)
    (result,) = emulator().launch("launch_rotate", [x, x, 64, 1, 1], [x])
    assert torch.equal(result, x.roll(-1))
    assert torch.equal(x, torch.arange(64, dtype=INT32))


def test_results_that_depend_on_the_order_of_threads():
    x = torch.arange(64, dtype=INT32)
    with pytest.raises(LaunchError, match="result 0 depends on the order of threads"):
        emulator().launch("launch_rotate_in_place", [x], [x])
