"""Profiles become a table that says what takes the time and what the statistics take of it."""

from sparsecod_mcore.report.profile import Kernel, profile_table, read_nsys_kernels, statistics_share

# As `nsys stats` prints it, talk and all.
NSYS = """Generating SQLite file rank-0.sqlite from rank-0.nsys-rep
Processing [rank-0.sqlite] with [cuda_gpu_kern_sum.py]...

Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
75.0,3000000,30,100000.0,100000.0,90000,110000,1000.0,"void gemm<float, (int)4>(Params)"
25.0,1000000,10,100000.0,100000.0,90000,110000,1000.0,"void sparsecod::cuda::add_rows<__nv_bfloat16, 4>(Rows)"
"""


def test_nsys() -> None:
    kernels = read_nsys_kernels(NSYS)
    assert [(kernel.milliseconds, kernel.calls) for kernel in kernels] == [(3.0, 30), (1.0, 10)]
    assert statistics_share(kernels) == 0.25
    assert read_nsys_kernels("no kernels were recorded\n") == []


def test_table() -> None:
    kernels = [Kernel(f"aten::op{i}", float(i), i) for i in range(30)] + [Kernel("sparsecod::residual", 65.0, 3)]
    lines = profile_table(kernels).splitlines()
    assert len(lines) == 17 and lines[1].endswith("3  sparsecod::residual") and lines[2].endswith("aten::op29")
    assert lines[1].split()[:2] == ["65.00", "13.0%"]
    assert lines[-1].strip() == "500.00 ms in all, 13.0% of it in this project's statistics"
    assert statistics_share([]) == 0.0
