"""Plans agree with Megatron's own helpers, and what cannot be planned is refused in one sentence."""

from argparse import Namespace
from copy import copy
from pathlib import Path

import pytest

from sparsecod_mcore import platform

platform.prepare()

from megatron.training.theoretical_memory_usage import (  # noqa: E402
    compute_activation_memory_without_sp,
    compute_weight_and_optimizer_memory,
)

from sparsecod_mcore.errors import UserError  # noqa: E402
from sparsecod_mcore.experiments.amounts import agrees, in_words  # noqa: E402
from sparsecod_mcore.experiments.arguments import planned_arguments  # noqa: E402
from sparsecod_mcore.experiments.config_files import CONFIGS  # noqa: E402
from sparsecod_mcore.experiments.flops import count_flops  # noqa: E402
from sparsecod_mcore.experiments.gpus import gpu_of  # noqa: E402
from sparsecod_mcore.experiments.layouts import Layout, layout_of, suggest_layout, with_layout  # noqa: E402
from sparsecod_mcore.experiments.memory import estimate_memory  # noqa: E402
from sparsecod_mcore.experiments.parameters import count_parameters  # noqa: E402
from sparsecod_mcore.experiments.plan import describe, machine_of, make_plan  # noqa: E402
from sparsecod_mcore.train.hardware import PEAK_BF16_FLOPS  # noqa: E402

DENSE, MOE = CONFIGS / "paper" / "dense_1b.yaml", CONFIGS / "paper" / "moe_2b_a400m.yaml"


@pytest.fixture(scope="module")
def dense() -> Namespace:
    return planned_arguments(DENSE)


@pytest.fixture(scope="module")
def moe() -> Namespace:
    return planned_arguments(MOE)


def test_parameters_are_those_that_megatron_counts(dense: Namespace, moe: Namespace) -> None:
    for args in (dense, moe):
        plain = copy(args)
        plain.use_distributed_optimizer = False  # 18 bytes a parameter, on one GPU that has all
        assert compute_weight_and_optimizer_memory(plain) == 18 * count_parameters(args).total


def test_flops_are_six_to_a_parameter_and_those_of_attention(dense: Namespace, moe: Namespace) -> None:
    for args in (dense, moe):
        count, flops = count_parameters(args), count_flops(args)
        products = count.active - count.embedding - count.norms - count.router
        causal_attention = 6 * args.num_layers * args.seq_length * args.kv_channels * args.num_attention_heads
        assert flops.per_token == pytest.approx(6 * products + causal_attention, rel=1e-12)
        assert flops.attention_share == pytest.approx(causal_attention / flops.per_token)
        assert flops.total == flops.per_token * args.train_iters * args.global_batch_size * args.seq_length
    assert count_flops(moe).per_token < 6 * count_parameters(moe).total / 3  # active experts only


def test_memory_against_megatrons(dense: Namespace) -> None:
    """Weights are Megatron's figure; activations of a dense model are within its range, and cut as they should be."""
    memory = estimate_memory(dense)
    assert memory.weights_and_optimizer == compute_weight_and_optimizer_memory(copy(dense))
    theirs = compute_activation_memory_without_sp(copy(dense), num_microbatches=None)
    assert 0.5 < memory.activations / theirs < 1.5
    layout = layout_of(dense)
    shorter = with_layout(dense, type(layout)(data=1, micro_batch=layout.micro_batch // 2))
    assert estimate_memory(shorter).activations == memory.activations / 2
    context = estimate_memory(with_layout(dense, type(layout)(context=2, data=1, micro_batch=layout.micro_batch)))
    assert context.activations == memory.activations / 2
    # The optimizer's 12 bytes a parameter are spread over context-parallel ranks too.
    assert context.weights_and_optimizer == memory.weights_and_optimizer * (6 + 12 / 2) / 18
    recomputed = with_layout(dense, type(layout)(data=1, micro_batch=layout.micro_batch, recompute=True))
    assert estimate_memory(recomputed).activations < memory.activations / 2


@pytest.mark.parametrize(
    ("name", "kind", "gpus"),
    [
        ("depth_32", "H100", 8),
        ("sequence_length_8192", "H100", 64),
        ("moe_7b_a1b_table7", "H100", 64),
        ("ablation_5_gqa_moe", "H200", 16),
    ],
)
def test_suggested_layouts_are_valid_to_megatron(name: str, kind: str, gpus: int) -> None:
    plan = make_plan(CONFIGS / "paper" / f"{name}.yaml", [], machine_of(kind, gpus, 0.4))
    assert plan.memory.total <= plan.machine.gpu.memory
    layout = plan.layout
    assert layout.tensor * layout.pipeline * layout.context * layout.data == gpus
    assert plan.args.global_batch_size % (layout.data * layout.micro_batch) == 0
    assert plan.gpu_hours == plan.flops.total / (plan.machine.gpu.peak * 0.4) / 3600


def test_a_given_layout_is_planned_as_it_is() -> None:
    flags = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"]
    plan = make_plan(DENSE, flags, machine_of("H100", 8, 0.4))
    assert plan.given and (plan.layout.tensor, plan.layout.pipeline, plan.layout.data) == (2, 2, 2)
    assert plan.layout_flags[:4] == ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    assert plan.layout_flags[4:] == ("--sequence-parallel", "--micro-batch-size", "4")
    assert "at 40% MFU, without anything waited for" in describe(plan)


def test_a_layout_may_be_given_by_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "cut.yaml"
    path.write_text(f"{DENSE.read_text()}  kurtosis_interval: 0\ntensor_model_parallel_size: 2\n")
    plan = make_plan(path, [], machine_of("H100", 8, 0.4))
    assert plan.given and (plan.layout.tensor, plan.layout.data) == (2, 4)
    assert plan.layout_flags == (
        "--tensor-model-parallel-size",
        "2",
        "--micro-batch-size",
        "4",
    )  # not sequence parallel


def test_vocabularies_are_padded_for_the_ranks_that_share_them(dense: Namespace) -> None:
    cut = with_layout(dense, Layout(tensor=8, data=1, micro_batch=1))
    assert (dense.padded_vocab_size, cut.padded_vocab_size) == (50304, 51200)
    assert with_layout(cut, Layout(data=1, micro_batch=1)).padded_vocab_size == 50304


def test_a_layout_that_does_not_fit_is_remarked_on() -> None:
    flags = ["--tensor-model-parallel-size", "1", "--micro-batch-size", "32"]
    plan = make_plan(DENSE, flags, machine_of("A100", 8, 0.4))
    assert "does not fit" in plan.remarks[-1]


def refusal(path: Path, *flags: str, kind: str = "H100", gpus: int = 8, mfu: float = 0.4) -> str:
    with pytest.raises(UserError) as refused:
        make_plan(path, flags, machine_of(kind, gpus, mfu))
    return str(refused.value)


def test_refusals() -> None:
    assert refusal(DENSE, kind="H10") == (
        "GPU kind H10 is given, one of A100, H100 PCIe, H100, H200, B200, GB200 is accepted (did you mean 'H100'?)"
    )
    assert refusal(DENSE, gpus=0) == "--gpus 0 is given, 1 or more is accepted"
    assert refusal(DENSE, mfu=1.5) == "--mfu 1.5 is given, above 0 and up to 1 is accepted"
    assert "3 GPUs can not share 16 heads, 16 layers and a global batch of 256" in refusal(DENSE, gpus=3)
    assert "no layout of 1 A100 fits" in refusal(CONFIGS / "paper" / "moe_7b_a1b.yaml", kind="a100", gpus=1)
    assert refusal(DENSE, "--log-interval", "0") == "--log-interval 0 is given, 1 or more is accepted"
    assert "num_attention_heads 16 is not divisible by" in refusal(DENSE, "--tensor-model-parallel-size", "3", gpus=6)
    assert "8 processes are not divisible by" in refusal(DENSE, "--pipeline-model-parallel-size", "16")
    assert "Megatron refuses this configuration" in refusal(
        DENSE, "--tensor-model-parallel-size", "2", "--micro-batch-size", "3"
    )
    assert "is no flag of this program (did you mean '--train-iters'?)" in refusal(DENSE, "--train-itters", "5")
    assert "--vocab-size N does" in refusal(CONFIGS / "micro.yaml")
    assert "models with qk_layernorm are not planned for" in refusal(DENSE, "--qk-layernorm")


def test_every_known_gpu_has_a_peak() -> None:
    assert {gpu_of(kind).peak for kind in PEAK_BF16_FLOPS} == set(PEAK_BF16_FLOPS.values())


def test_amounts() -> None:
    assert [in_words(count) for count in (999, 1000, 999_999, 1_176_832_000)] == ["999", "1k", "1M", "1.177B"]
    assert agrees("1.2B", 1.176e9) and agrees("1.176B", 1.1768e9) and agrees("400M", 400.4e6)
    assert not agrees("1.2B", 1.28e9) and not agrees("7B", 13.2e9) and not agrees("400M", 359e6)


def test_the_cheapest_cut_is_suggested(moe: Namespace) -> None:
    """One GPU's worth of model is not cut; nothing is recomputed that need not be."""
    layout, memory = suggest_layout(moe, 8, gpu_of("H200"))
    assert (layout.tensor, layout.pipeline, layout.context, layout.recompute) == (1, 1, 1, False)
    assert memory.total < gpu_of("H200").memory
