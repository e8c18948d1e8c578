"""Two processes save one Hugging Face model at several parallel layouts, in Megatron's own way.

Arguments: OUT, then NAME:TENSOR:PIPELINE:EXPERT=HF_DIR for each. Where the pipeline has one stage, the logits of
OUT/tokens.pt are left in OUT/NAME.logits.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sparsecod_mcore import platform

platform.prepare()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_tensor_model_parallel_region,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.training.models.gpt import GPTModelBuilder  # noqa: E402

from sparsecod_mcore.exchange.hugging_face import HuggingFaceModel  # noqa: E402
from sparsecod_mcore.exchange.megatron_model import load_parameters  # noqa: E402
from sparsecod_mcore.model.build import describe_model, evaluation_arguments  # noqa: E402
from sparsecod_mcore.model.norm import AllHeadsRMSNorm  # noqa: E402
from sparsecod_mcore.scoring.stack import Stack  # noqa: E402
from tests.exchange.megatron_side import stack_logits  # noqa: E402


def main(out: str, *jobs: str) -> None:
    dist.init_process_group("gloo")
    for job, source in (argument.split("=") for argument in jobs):
        name, tensor, pipeline, expert = job.split(":")
        parallel_state.initialize_model_parallel(int(tensor), int(pipeline), expert_model_parallel_size=int(expert))
        model_parallel_cuda_manual_seed(1)
        if int(tensor) > 1:
            check_norm()
        save(Path(out) / name, HuggingFaceModel(Path(source)), int(pipeline))
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def check_norm() -> None:
    """The norm of all heads, each rank's of its own, against one of the whole: output, and every gradient."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    generator = torch.Generator().manual_seed(2)
    x_SBNH, factor_SBNH = torch.randn(2, 5, 3, 4, 6, generator=generator, dtype=torch.float64)
    weight_D = torch.randn(24, generator=generator, dtype=torch.float64).requires_grad_()
    x_SBD = x_SBNH.flatten(2).requires_grad_()
    y_SBD = torch.nn.functional.rms_norm(x_SBD, (24,), weight_D, 1e-6)
    (y_SBD * factor_SBNH.flatten(2)).sum().backward()
    settings = TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=4)
    norm = AllHeadsRMSNorm(settings, 6, 1e-6, heads=4).double()
    norm.weight.data.copy_(weight_D.data)
    own_SBNH = x_SBNH.chunk(size, 2)[rank].clone().requires_grad_()
    found_SBNH = norm(own_SBNH)
    (found_SBNH * factor_SBNH.chunk(size, 2)[rank]).sum().backward()
    torch.testing.assert_close(found_SBNH.flatten(2), y_SBD.chunk(size, 2)[rank])
    torch.testing.assert_close(own_SBNH.grad.flatten(2), x_SBD.grad.chunk(size, 2)[rank])
    dist.all_reduce(norm.weight.grad)  # as Megatron does of all that is called q_layernorm or k_layernorm
    torch.testing.assert_close(norm.weight.grad, weight_D.grad)


def save(folder: Path, source: HuggingFaceModel, pipeline: int) -> None:
    args = evaluation_arguments(source.settings, torch.float32)
    args.pipeline_model_parallel_size = pipeline
    args.pipeline_dtype = torch.float32
    config = describe_model(args)
    config.finalize()
    model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    load_parameters(model, source)
    if pipeline == 1:
        logits_BSV = stack_logits(Stack(model.eval()), torch.load(folder.parent / "tokens.pt"))
        logits_BSV = gather_from_tensor_model_parallel_region(logits_BSV)
        if dist.get_rank() == 0:
            torch.save(logits_BSV.detach(), folder.with_suffix(".logits.pt"))
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "args": args}, str(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
