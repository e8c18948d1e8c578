"""Jacobians of layers beside the usual way, one backward pass for each row: same layers, same tokens.

The usual way runs micro-batches of two sequences through the layer with a graph, then takes one gradient for every
output dimension; a share of the rows is timed, and all are counted. The matrix J_bar - I comes in closed form; its norm
from as many random directions, carried forward, as it takes to know it to 5 %. Ways run in turn; what is compared was
checked to agree.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Spread, machine, time_in_turn
from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.exchange.decoder import decoder_settings  # noqa: E402
from sparsecod_mcore.jvp.exact import deviation_sums  # noqa: E402
from sparsecod_mcore.jvp.layer import probe_branches  # noqa: E402
from sparsecod_mcore.model.build import build_model, evaluation_arguments  # noqa: E402
from sparsecod_mcore.scoring import parallel  # noqa: E402
from sparsecod_mcore.scoring.stack import Stack  # noqa: E402

ROWS, MATRIX, NORM = "rows, backward", "matrix, closed form", "norm to 5 %, forward"
MICRO_BATCH = 2
TIMED_ROWS = 32
ACCURACY = 0.05
RESULTS = Path(__file__).parent / "results"


def random_stack(width: int, length: int) -> Stack:
    """Two layers of a Llama with grouped queries, with weights as large as trained ones."""
    heads = max(4, width // 64)
    config = {
        "num_hidden_layers": 2, "hidden_size": width, "intermediate_size": 8 * width // 3 // 16 * 16,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": length,
        "rms_norm_eps": 1e-5, "vocab_size": 1024,
    }  # fmt: skip
    model = build_model(evaluation_arguments(decoder_settings(config), torch.float32))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.2 / width**0.5)
    return Stack(model)


def rows_by_backward(stack: Stack, layer: int, hidden_SBD: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The first rows of J_bar [D, D], one for each output dimension."""
    width = hidden_SBD.shape[-1]
    rotary = stack.rotary_embedding(hidden_SBD.shape[0])
    rows_DD = torch.zeros(num_rows, width, dtype=torch.float64)
    for part_SBD in hidden_SBD.split(MICRO_BATCH, 1):
        given = part_SBD.clone().requires_grad_()
        output, _ = stack.layers[layer](given, attention_mask=None, rotary_pos_emb=rotary)
        for row in range(num_rows):
            wanted = torch.zeros_like(output)
            wanted[..., row] = 1
            (gradient,) = torch.autograd.grad(output, given, wanted, retain_graph=True)
            rows_DD[row] += gradient.sum((0, 1), dtype=torch.float64)
    return rows_DD / hidden_SBD[..., 0].numel()


def probes_needed(deviation_DD: torch.Tensor) -> int:
    """How many v ~ N(0, I) make the standard error of the norm ||A||_F 5 % of it: Var ||A v||^2 = 2 ||A^T A||_F^2."""
    square = deviation_DD.square().sum()
    relative_variance = 2 * (deviation_DD.T @ deviation_DD).square().sum() / square.square()
    return math.ceil(relative_variance.item() / (2 * ACCURACY) ** 2)


def compare(width: int, length: int, sequences: int, seconds: float) -> dict[str, Any]:
    """Time one layer's Jacobian by each way."""
    stack = random_stack(width, length)
    hidden_SBD = stack.layer(0, stack.embed(torch.randint(0, stack.vocab_size, (sequences, length))))
    rotary = stack.rotary_embedding(length)

    def in_closed_form() -> torch.Tensor:
        return deviation_sums(stack.layers[1], hidden_SBD, rotary).T / hidden_SBD[..., 0].numel()

    deviation_DD = in_closed_form()
    torch.testing.assert_close(
        deviation_DD + torch.eye(width), rows_by_backward(stack, 1, hidden_SBD, width), rtol=0, atol=1e-4
    )
    num_probes = probes_needed(deviation_DD)
    shared_PD = torch.randn(num_probes, width)

    def norm_by_forward() -> None:
        for few_PD in shared_PD.split(16):
            probe_branches(stack.layers[1], hidden_SBD, few_PD, rotary_pos_emb=rotary)

    timed_rows = min(width, TIMED_ROWS)
    ways: dict[str, list[Callable[[], Any]]] = {
        ROWS: [lambda: rows_by_backward(stack, 1, hidden_SBD, timed_rows)],
        MATRIX: [in_closed_form],
        NORM: [norm_by_forward],
    }
    times = time_in_turn(ways, "cpu", seconds)
    times[ROWS] = [taken * width / timed_rows for taken in times[ROWS]]
    result: dict[str, Any] = {
        "width": width,
        "length": length,
        "sequences": sequences,
        "probes_for_5_percent": num_probes,
    }
    result["seconds"] = {way: vars(Spread.of(taken)) for way, taken in times.items()}
    for way in (MATRIX, NORM):
        ratios = Spread.of([slow / fast for slow, fast in zip(times[ROWS], times[way], strict=True)])
        result[f"{way}: times faster"] = vars(ratios)
        found = f"{ratios.median:.1f} [{ratios.low:.1f}, {ratios.high:.1f}] times faster than {ROWS}"
        note = f" ({num_probes} probes)" if way == NORM else ""
        print(f"width {width}, {sequences} x {length} tokens: {way} {found}{note}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each width")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    parallel.initialise()
    shapes = [compare(width, arguments.length, arguments.sequences, arguments.seconds) for width in arguments.widths]
    if arguments.save:
        path = RESULTS / "jacobian_matrix.json"
        path.write_text(
            json.dumps({"benchmark": "jacobian_matrix", **machine("cpu"), "shapes": shapes}, indent=2) + "\n"
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
