"""Profiles: ranges named by layer and sub-module, taken by torch's profiler or by a tool around the process.

``--cod-profile torch`` is Megatron's profiler with a summary in the run directory. ``nsys`` and ``dlprof`` start this
very command again under the tool, which records steps --profile-step-start to --profile-step-end, and then print what
the tool found.
"""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from sparsecod_mcore import platform
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.report.profile import Kernel, profile_table, read_nsys_kernels

UNDER = "SPARSECOD_PROFILED_BY"  # tells the command that it runs under the tool
# What a range is opened for, in a layer: the names that a profile is read by.
SUB_MODULES = (
    "self_attention",
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp",
    "mlp.router",
    "mlp.experts",
    "mlp.shared_experts",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def prepare(args: Namespace) -> None:
    """Turn ``cod.profile`` into Megatron's flags. Raises `UserError` for what cannot be had here."""
    if args.cod_profile is None:
        return
    if args.cod_profile != "torch":
        if not platform.has_gpu():
            raise UserError(f"cod.profile {args.cod_profile} needs a GPU; torch profiles without one as well")
        _tool(args.cod_profile)
    args.profile, args.use_pytorch_profiler = True, args.cod_profile == "torch"
    if args.cod_profile == "dlprof":
        _init_dlprof()


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None and name == "dlprof":
        raise UserError("dlprof is not on PATH: NVIDIA publishes it no more for images with Hopper; use nsys, whose "
                        "ranges have the names that dlprof reads")  # fmt: skip
    if found is None:
        raise UserError(f"{name} is not on PATH; NVIDIA's PyTorch containers bring it")
    return found


def _init_dlprof() -> None:
    """Have DLProf's own markers around torch's functions, where its plugin is installed."""
    try:
        import nvidia_dlprof_pytorch_nvtx as plugin
    except ImportError:
        return
    plugin.init()


def run_under_tool(args: Namespace, run: Path, argv: Sequence[str]) -> int | None:
    """Run this command again under nsys or DLProf, print a summary, and return its exit code; None if not asked to."""
    name = args.cod_profile
    if name not in ("nsys", "dlprof") or UNDER in os.environ:
        return None
    if args.profile_ranks and args.rank not in args.profile_ranks:
        return None
    folder = run / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"rank-{args.rank}"
    done = subprocess.run(
        [*_around(_tool(name), name, report), sys.executable, sys.argv[0], *argv],
        env={**os.environ, UNDER: name},
        check=False,
    )
    if done.returncode == 0 and name == "nsys":
        kernels = kernels_of_nsys(_tool(name), report.with_suffix(".nsys-rep"))
        print(f"\n{keep_summary(kernels, report.with_suffix('.txt'))}\nkept in {report}.txt", flush=True)
    return done.returncode


def _around(tool: str, name: str, report: Path) -> list[str]:
    """The tool's command line, up to the program."""
    if name == "nsys":
        flags = ["--trace=cuda,nvtx", "--sample=none", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
        return [tool, "profile", *flags, "--force-overwrite=true", f"--output={report}"]
    return [tool, "--mode=pytorch", "--reports=summary,detail", "--force=true", f"--output_path={report}"]


def kernels_of_nsys(tool: str, report: Path) -> list[Kernel]:
    """What nsys says of every kernel in `report`."""
    command = [tool, "stats", "--report=cuda_gpu_kern_sum", "--format=csv", "--force-export=true", str(report)]
    return read_nsys_kernels(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def keep_summary(kernels: Sequence[Kernel], path: Path) -> str:
    """The kernels that take most of the time, as a table that is also kept under `path`."""
    table = profile_table(kernels)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table + "\n")
    return table


def name_ranges(model_chunks: Sequence[Any]) -> None:
    """Open a range around the forward pass of every layer and sub-module: ``layer_003``, ``layer_003/mlp``.

    torch's profiler shows them, and makes them NVTX ranges for tools around the process. Backward passes have ranges of
    torch's own, which carry the number of the forward operation they belong to.
    """
    for chunk in model_chunks:
        for layer in chunk.decoder.layers:
            for name, module in _named(layer):
                _open_around(name, module)


def _named(layer: TransformerLayer) -> Iterator[tuple[str, torch.nn.Module]]:
    number = f"layer_{layer.layer_number - 1:03d}"
    yield number, layer
    modules = dict(layer.named_modules())
    for name in SUB_MODULES:
        if name in modules:
            yield f"{number}/{name}", modules[name]


def _open_around(name: str, module: torch.nn.Module) -> None:
    opened: list[torch.profiler.record_function] = []

    def enter(*_: Any) -> None:
        opened.append(torch.profiler.record_function(name))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter, prepend=True)
    module.register_forward_hook(leave)


def kernels_of_torch(profiler: torch.profiler.profile) -> list[Kernel]:
    """What torch's profiler counted for every operator, without those it calls; on the device, else on the CPU."""
    events = profiler.key_averages()
    on_device = any(event.self_device_time_total for event in events)
    return [
        Kernel(event.key, (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3, event.count)
        for event in events
        if not event.is_user_annotation
    ]
