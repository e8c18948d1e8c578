"""One vocabulary for YAML and command line, and a refusal that helps."""

from pathlib import Path

import pytest

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore import config  # noqa: E402
from sparsecod_mcore.errors import UserError  # noqa: E402

CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))


def settings(*argv: object) -> dict:
    return config.explicit_settings(config.with_config([str(word) for word in argv]))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_read_back_as_they_are(path: Path) -> None:
    read = settings("--config", path)
    assert {key: read[key] for key in config.read_config(path)}.keys() == read.keys()
    assert read["hidden_size"] == config.read_config(path)["hidden_size"]


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "lr: 3e-4\ncod: {stats_interval: 5}\n")
    read = settings("--config", path, "--lr", "1e-3", "--cod-stats-interval", 2)
    assert read == {"lr": 1e-3, "cod.stats_interval": 2}


def test_switches_by_flag_and_by_meaning(tmp_path: Path) -> None:
    """``disable_bias_linear: true`` and ``add_bias_linear: false`` are the same, and so are their opposites."""
    for text, expected in (
        ("disable_bias_linear: true", {"disable_bias_linear": True}),
        ("add_bias_linear: false", {"disable_bias_linear": True}),
        ("disable_bias_linear: false", {}),
        ("add_bias_linear: true", {}),
    ):
        assert settings("--config", write(tmp_path / "c.yaml", text)) == expected


def test_numbers_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "lr: 3e-4\nmoe_aux_loss_coeff: [0.01, 0.02]\ntrain_data_path: [a, b]\nseed: 7\n")
    assert settings("--config", path) == {
        "lr": 3e-4,
        "moe_aux_loss_coeff": [0.01, 0.02],
        "train_data_path": ["a", "b"],
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_layer: 3", "did you mean 'num_layers'"),
        ("cod: {stat_interval: 1}", "did you mean 'cod.stats_interval'"),
        ("swiglu: 7", "swiglu is a switch"),
        ("a: [", "not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("lr: abc", "--lr"),
        ("cod: {stats_interval: -1}", "-1 is given"),
        ("cod: {jacobian_probes: 0}", "0 is given, 1 or more is accepted"),
        ("cod: {jacobian_directions: up}", "'noise', 'residual'"),
        ("cod: {depth_control: mixln}", "did you mean 'mix_ln'"),
        ("cod: {depth_control: pre_norm}", "none, layernorm_scaling, scaled_init, mix_ln, deepnorm, sandwich_norm are"),
        ("cod: {mix_ln_share: 0}", "0 is given, more than 0 and at most 1 is accepted"),
        ("cod: {skip_non_finite: -1}", "-1 is given, 0 or more is accepted"),
        ("cod: {profile: nsight}", "'torch', 'nsys', 'dlprof'"),
        ("position_embedding_type: rop", "rop"),
    ],
)
def test_refusals_name_the_mistake(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(UserError) as refusal:
        settings("--config", path)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_refusals_of_the_command_line() -> None:
    with pytest.raises(UserError, match="did you mean '--num-layers'"):
        settings("--num-layer", 3)
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        settings("--config", "nowhere.yaml")


def test_help_is_given() -> None:
    """Some of Megatron's own texts are such that argparse fails on them."""
    assert "--cod-stats-interval" in config.build_parser().format_help()
