"""Runs every operator on CUDA once per dtype, on a small input: what compute-sanitizer watches. No test by itself.

Inputs are made on the CPU, so that hardly any kernels but ours run, and compared with nothing.
"""

import torch

from tests.gpu.operators import LAYOUTS, OPERATORS, to


def main() -> None:
    torch.manual_seed(0)
    for operator in OPERATORS:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (LAYOUTS[0], LAYOUTS[-1]):
                arguments = operator.arguments(lambda size, dtype=dtype: torch.randn(size).to(dtype), operator.small)
                operator(*to(arguments, "cuda", layout))
        torch.cuda.synchronize()
        print(operator.name, flush=True)


if __name__ == "__main__":
    main()
