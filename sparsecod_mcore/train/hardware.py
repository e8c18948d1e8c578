"""Peak matmul rates that model FLOPs utilisation is counted against."""

import torch

# Dense bfloat16 peak in FLOP/s by name fragment, from the vendor's data sheets.
PEAK_BF16_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
}


def peak_flops() -> float | None:
    """Peak dense bfloat16 FLOP/s of this process's device, or None where it is unknown (and MFU is n/a)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for fragment, peak in PEAK_BF16_FLOPS.items() if fragment in name), None)
