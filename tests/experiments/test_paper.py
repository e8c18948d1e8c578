"""The paper's runs: the table, the files written from it, and what Megatron makes of them, agree with the paper."""

from pathlib import Path

import pytest
import yaml

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.experiments.arguments import planned_arguments  # noqa: E402
from sparsecod_mcore.experiments.budgets import matched_steps, matched_width  # noqa: E402
from sparsecod_mcore.experiments.config_files import CONFIGS, all_files  # noqa: E402
from sparsecod_mcore.experiments.paper import LEARNING_RATES, PAPER_RUNS  # noqa: E402
from sparsecod_mcore.experiments.parameters import count_parameters  # noqa: E402
from sparsecod_mcore.experiments.plan import Plan, describe, machine_of, make_plan  # noqa: E402
from sparsecod_mcore.experiments.remarks import remarks_on  # noqa: E402
from sparsecod_mcore.experiments.runs import settings_of  # noqa: E402
from tests.conftest import REPOSITORY  # noqa: E402
from tests.experiments.meta_models import build_on_meta  # noqa: E402

RUNS = {run.name: run for run in PAPER_RUNS}
GROUPS = {
    "depth_control": 4,
    "weight_decay": 5,
    "sequence_length": 6,
    "grouped_query_attention": 3,
    "mixture_of_experts": 5,
    "ablation": 6,
    "block_variance": 2,
}


@pytest.fixture(scope="module")
def published() -> dict:
    path = REPOSITORY.parent / "shared" / "paper" / "tables.yaml"
    if not path.exists():
        pytest.skip(f"the paper's figures are not at {path}")
    return yaml.safe_load(path.read_text())


def paper(name: str) -> Path:
    return CONFIGS / "paper" / f"{name}.yaml"


def test_the_files_are_those_of_the_tables() -> None:
    written = dict(all_files())
    for folder in {path.parent for path in written}:
        assert set(folder.glob("*.yaml")) == {path for path in written if path.parent == folder}
    changed = [path.name for path, text in written.items() if path.read_text() != text]
    assert not changed, "tools/write_configs.py writes them anew"


def test_every_group_has_its_runs() -> None:
    assert {group: sum(run.group == group for run in PAPER_RUNS) for group in GROUPS} == GROUPS
    assert len(RUNS) == sum(GROUPS.values())


def test_runs_that_the_paper_reports_in_several_tables_are_one() -> None:
    for same in (("sequence_length_4096", "gqa_g1", "dense_1b"), ("depth_16", "ablation_1_l16")):
        first, *others = (settings_of(RUNS[name]) for name in same)
        assert all(other == first for other in others), same


def test_the_table_says_what_the_paper_says(published: dict) -> None:
    """Every shape and budget, group by group."""
    keys = {
        "layers": "num_layers", "hidden": "hidden_size", "ffn": "ffn_hidden_size", "heads": "num_attention_heads",
        "seq_len": "seq_length", "global_batch": "global_batch_size", "weight_decay": "weight_decay",
        "experts": "num_experts", "top_k": "moe_router_topk", "steps": "train_iters",
        "load_balance_loss": "moe_aux_loss_coeff", "router_z_loss": "moe_z_loss_coeff",
    }  # fmt: skip
    names = {
        "depth_control": lambda row: f"depth_{row['layers']}",
        "weight_decay": lambda row: f"weight_decay_{row['weight_decay']:g}",
        "sequence_length": lambda row: f"sequence_length_{row['seq_len']}",
        "grouped_query_attention": lambda row: f"gqa_g{row['group_size']}",
        "mixture_of_experts": lambda row: {
            "Dense-400M": "dense_400m", "MoE-2BA400M": "moe_2b_a400m", "Dense-1B": "dense_1b",
            "MoE-7BA1B": "moe_7b_a1b_table7",
        }[row["name"]],
    }  # fmt: skip
    rows = [
        (name_of(row), published[group]["fixed"] | row)
        for group, name_of in names.items()
        for row in published[group]["runs"]
    ]
    block = published["block_variance"]["fixed"]
    rows += [(f"block_variance_{layers}", block | {"layers": layers}) for layers in block["layers"]]
    models, fixed = published["ablation"]["models"], published["ablation"]["fixed"]
    rows += [
        ("ablation_1_l16", fixed | models["dense_L16"]),
        ("ablation_2_l32", fixed | models["dense_L32"]),
        ("ablation_5_gqa_moe", {"tokens": fixed["tokens"], **models["moe_L32"]}),
    ]
    for name, row in rows:
        settings = settings_of(RUNS[name])
        mine = settings | {"num_query_groups": settings.get("num_query_groups", settings["num_attention_heads"])}
        for key, value in row.items():
            if key in keys and not (key in ("load_balance_loss", "router_z_loss") and "experts" not in row):
                assert mine[keys[key]] == value, (name, key)
        if "kv_heads" in row:
            assert mine["num_query_groups"] == row["kv_heads"], name
        if "tokens" in row:
            step = mine["global_batch_size"] * mine["seq_length"]
            assert abs(mine["train_iters"] * step - float(row["tokens"])) <= step / 2, name
    assert settings_of(RUNS["moe_2b_a400m"])["moe_shared_expert_intermediate_size"] == 1536
    common = published["common"]
    for run in PAPER_RUNS:
        settings = settings_of(run)
        assert [settings["adam_beta1"], settings["adam_beta2"]] == common["optimizer"]["betas"]
        assert settings["adam_eps"] == common["optimizer"]["eps"] and settings["clip_grad"] == 1.0
        assert settings["lr_warmup_iters"] == common["schedule"]["warmup_steps"]
        assert settings["min_lr"] == pytest.approx(settings["lr"] * common["schedule"]["min_lr_ratio"])
        assert settings["lr"] in LEARNING_RATES


@pytest.fixture(scope="module")
def arguments() -> dict[str, object]:
    """Megatron's validated arguments of every configuration that is written from a table."""
    return {f"{path.parent.name}/{path.stem}": planned_arguments(path) for path, _ in all_files()}


def test_every_config_is_valid_and_its_model_is_as_large_as_counted(arguments: dict) -> None:
    """Megatron validates all; of equal models one is built."""
    built = {}
    for name, args in arguments.items():
        counted = count_parameters(args)
        architecture = (counted, args.num_layers, args.hidden_size, args.num_attention_heads, args.num_query_groups)
        if architecture in built:
            continue
        model = build_on_meta(args)
        assert all(parameter.is_meta for parameter in model.parameters()), name
        built[architecture] = sum(parameter.numel() for parameter in model.parameters())
        assert built[architecture] == counted.total, name
    assert len(built) > 20


def test_parameters_are_those_published(arguments: dict) -> None:
    """Counted as the paper does, with one embedding; what does not agree is exactly what docs/experiments.md lists."""
    expected = {
        "depth_12": 0.9, "depth_16": 1.2, "depth_24": 1.7, "depth_32": 2.3, "weight_decay_0.1": 1.2,
        "sequence_length_8192": 1.2, "moe_2b_a400m": 2, "moe_7b_a1b": 7, "moe_7b_a1b_table7": 13,
    }  # fmt: skip
    for name, billions in expected.items():
        total = count_parameters(arguments[f"paper/{name}"]).published_total
        assert round(total / 1e9, 0 if isinstance(billions, int) else 1) == billions, name
    for name, millions in (("gqa_g1", 1176), ("gqa_g4", 1076), ("gqa_g16", 1051)):
        assert count_parameters(arguments[f"paper/{name}"]).published_total // 1e6 == millions
    active = {"moe_7b_a1b": 1.2, "ablation_5_gqa_moe_1152": 1.2, "moe_7b_a1b_table7": 2.0, "moe_2b_a400m": 0.4}
    for name, billions in active.items():
        assert round(count_parameters(arguments[f"paper/{name}"]).published_active / 1e9, 1) == billions, name
    odd = {
        name
        for name in RUNS
        if any("published" in remark for remark in remarks_on(paper(name), arguments[f"paper/{name}"]))
    }
    assert odd == {
        "dense_400m", "moe_2b_a400m", "moe_7b_a1b_table7",
        "ablation_2_l32", "ablation_3_long_context", "ablation_4_weight_decay", "ablation_5_gqa_moe",
    }  # fmt: skip
    narrow = [
        name for name in RUNS if "head dimension 70" in " ".join(remarks_on(paper(name), arguments[f"paper/{name}"]))
    ]
    assert narrow == ["ablation_5_gqa_moe"]


@pytest.fixture(scope="module")
def gqa() -> list[Plan]:
    return [make_plan(paper(f"gqa_g{group}"), [], machine_of("h100", 8, 0.4)) for group in (1, 4, 16)]


def test_gqa_budgets_are_equal_flops(gqa: list[Plan]) -> None:
    """The published tokens (5.0, 5.35, 5.6B) are equal FLOPs within 1.5 %, and `--match` finds the rest."""
    first, *others = gqa
    assert [round(plan.tokens / 1e9, 2) for plan in gqa] == [5.0, 5.35, 5.6]
    for plan in others:
        assert abs(plan.flops.total / first.flops.total - 1) < 0.015
        steps = matched_steps(plan, first, "flops")
        assert steps * plan.flops.total / plan.args.train_iters == pytest.approx(first.flops.total, rel=1e-3)
        assert steps != plan.args.train_iters


def test_sequence_lengths_have_equal_tokens(arguments: dict) -> None:
    tokens = [
        args.train_iters * args.global_batch_size * args.seq_length
        for name, args in arguments.items()
        if name.startswith("paper/sequence_length")
    ]
    assert len(tokens) == 6 and max(tokens) / min(tokens) < 1.0005


def test_micro_and_small_budgets_match(arguments: dict) -> None:
    """Equal FLOPs of grouped queries, equal active parameters of experts and of the ladder's steps."""
    machine = machine_of("A100", 1, 0.3)
    for size in ("micro", "small"):
        one, two, three = (
            make_plan(CONFIGS / size / f"gqa_g{group}.yaml", ["--tensor-model-parallel-size", "1"], machine)
            for group in (1, 4, 8)
        )
        for plan in (two, three):
            assert plan.flops.total == pytest.approx(one.flops.total, rel=0.002)
        dense, experts = (count_parameters(arguments[f"{size}/moe_{kind}"]) for kind in ("dense", "experts"))
        assert experts.active - experts.router == dense.total and experts.total > 1.5 * dense.total
        ladder = [count_parameters(args).active for name, args in arguments.items() if f"{size}/ablation" in name]
        assert len(ladder) == 5 and max(ladder) / min(ladder) < 1.06


def test_a_plan_in_words(gqa: list[Plan]) -> None:
    text = describe(gqa[1])
    for said in (
        "as published (one embedding): 1.076B",
        "5.35B in 5102 steps of 256 x 4096",
        "attention at length 4096",
    ):
        assert said in text
    table7 = make_plan(paper("moe_7b_a1b_table7"), [], machine_of("H200", 16, 0.35))
    assert "published 7B, counted 13.26B with one embedding" in describe(table7)
    wanted = matched_width(table7, gqa[0])
    assert wanted == 1024  # OLMoE's width makes its active parameters those of the dense model
