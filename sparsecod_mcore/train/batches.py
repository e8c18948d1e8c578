"""From indexed datasets to the model's loss: what one microbatch is and what is reported of it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split

# What each end of the pipeline needs; a stage in the middle needs nothing.
FIRST_STAGE_KEYS = ("tokens", "position_ids")
LAST_STAGE_KEYS = ("labels", "loss_mask")


def keys_of_stage(vp_stage: int | None) -> tuple[str, ...]:
    """What of a microbatch this pipeline stage (of this virtual stage) reads."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    # Multi-token prediction embeds tokens again behind the last layer.
    reads_tokens = first or (last and get_args().mtp_num_layers)
    return (FIRST_STAGE_KEYS if reads_tokens else ()) + (LAST_STAGE_KEYS if last else ())


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None, training: bool
) -> dict[str, torch.Tensor]:
    """This rank's part [B, S] of the next microbatch: broadcast from TP rank 0, split over context parallel ranks."""
    keys = keys_of_stage(vp_stage)
    if not keys:
        return {}
    args = get_args()
    device = torch.cuda.current_device()
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        batch = {key: sample[key].to(device, non_blocking=True) for key in keys}
    else:
        shape = (args.micro_batch_size if training else args.eval_micro_batch_size, args.seq_length)
        batch = {
            key: torch.empty(shape, dtype=torch.float32 if key == "loss_mask" else torch.int64, device=device)
            for key in keys
        }
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        for key in keys:
            torch.distributed.broadcast(
                batch[key],
                parallel_state.get_tensor_model_parallel_src_rank(),
                group=parallel_state.get_tensor_model_parallel_group(),
            )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())


def loss_of_tokens(
    loss_mask_BS: torch.Tensor | None, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of next-token cross-entropies, number of tokens, and what is reported: both, to weigh ranks by tokens.

    Megatron divides the sum by the tokens; a pair in the report is summed over microbatches and ranks before division.
    """
    assert loss_mask_BS is not None  # only the last stage has a loss
    mask_BS = loss_mask_BS.float()
    loss = (losses_BS.float() * mask_BS).sum()
    num_tokens = mask_BS.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: GPTModel
) -> tuple[torch.Tensor, partial[Any]]:
    """One microbatch through this stage: the stage's output, and the loss function for the last stage."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"), model.training)
    output = model(
        batch.get("tokens"),
        batch.get("position_ids"),
        None,  # the core attention is causal by itself
        labels=batch.get("labels"),
        loss_mask=batch.get("loss_mask"),
    )
    return output, partial(loss_of_tokens, batch.get("loss_mask"))


def build_datasets(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> list[GPTDataset | None]:
    """Train, validation and test datasets of fixed-length sequences, cut from the concatenated documents."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )

    def needed_here() -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0 and bool(keys_of_stage(vp_stage))

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, needed_here, config).build()


# Every rank builds what it needs, rather than TP rank 0 alone on behalf of all.
build_datasets.is_distributed = True  # type: ignore[attr-defined]
