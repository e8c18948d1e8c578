"""What the device and the libraries for it can do."""

from argparse import Namespace

import torch

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.platform import has_gpu

# Dense bfloat16 peak in FLOP/s by name fragment, from the vendor's data sheets.
PEAK_BF16_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
}


# Of Transformer Engine's recipes, the first compute capability that has the instructions for it.
FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def check_fp8(args: Namespace, capability: tuple[int, int] | None) -> None:
    """Raise `UserError` where FP8 is asked for and cannot be had; `capability` is the GPU's, None without one."""
    if args.fp8 is None:
        return
    if args.transformer_impl != "transformer_engine":
        raise UserError(f"fp8_format {args.fp8} needs Transformer Engine, which is not installed for a GPU here")
    needed = FP8_CAPABILITY.get(args.fp8_recipe)
    if capability is not None and needed is not None and capability < needed:
        offered = ", ".join(name for name, least in FP8_CAPABILITY.items() if capability >= least) or "none"
        raise UserError(
            f"fp8_recipe {args.fp8_recipe} needs a GPU of compute capability {needed[0]}.{needed[1]}, this one has "
            f"{capability[0]}.{capability[1]}; it can do: {offered}"
        )


def capability() -> tuple[int, int] | None:
    """The GPU's compute capability, None without one."""
    return torch.cuda.get_device_capability() if has_gpu() else None


def unfused_adam() -> str | None:
    """What to say where Adam steps parameter by parameter: Megatron falls back on torch's without a word."""
    from megatron.core import optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return None
    return "note: the optimizer is torch's AdamW; neither Transformer Engine's fused Adam nor Apex's is installed"


def peak_flops() -> float | None:
    """Peak dense bfloat16 FLOP/s of this process's device, or None where it is unknown (and MFU is n/a)."""
    if not has_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for fragment, peak in PEAK_BF16_FLOPS.items() if fragment in name), None)
