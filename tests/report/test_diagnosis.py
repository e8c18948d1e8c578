"""Advice follows from the figures, with its evidence."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sparsecod_mcore import demo
from sparsecod_mcore.report.diagnosis import Advice, diagnose
from sparsecod_mcore.report.gather import Run, gather
from sparsecod_mcore.report.page.evaluation import evaluation_rows
from sparsecod_mcore.report.page.scales import number
from sparsecod_mcore.report.published import PUBLISHED, counterpart
from sparsecod_mcore.report.recipe import next_ingredients
from sparsecod_mcore.report.shares import growth_of
from sparsecod_mcore.scoring.results import EffectiveDepth, Fit, Skip, Usefulness
from tests.report.example_runs import write_example_run
from tests.scoring.example_scores import example_scores


def scored(increases: list[float], skips: list[float], name: str = "run") -> Run:
    layers = len(increases)
    effective = sum(increase > 0.1 for increase in increases)
    scores = dataclasses.replace(
        example_scores(layers=layers),
        usefulness=Usefulness(scored=Fit.of(increases)),
        effective_depth=EffectiveDepth(effective=effective, wasted=layers - effective),
        skip=Skip(loss=[2.5] * layers, relative_loss_increase=skips),
        jacobian=None,
        moe=None,
    )
    return Run(name=name, path=Path(name), scores=scores)


def titles(advice: list[Advice]) -> list[str]:
    assert all(one.evidence and one.uncertainty for one in advice)
    return [one.title for one in advice]


def test_cheap_layers_could_be_dropped() -> None:
    [advice] = diagnose([scored([0.5, 0.05, 0.3, 0.02], [0.9, 0.008, 0.2, -0.002])])
    assert advice.title == "Layers 3 and 1 could be dropped"
    assert "A linear map can stand in for 1 and 3" in advice.text
    assert advice.evidence.startswith(
        "Rise of the loss without the layer, cheapest first: layer 3: −0.2 %, layer 1: 0.8 %"
    )
    [advice] = diagnose([scored([0.5, 0.6], [0.9, 0.05])])
    assert (
        advice.title == "No layer can be dropped for free"
        and "layer 1: without it the loss rises by 5 %" in advice.text
    )


def test_runs_are_compared_by_the_share_of_layers_at_work() -> None:
    naive, recipe = scored([0.5, 0.05, 0.05, 0.05], [1.0] * 4, "naive"), scored([0.5] * 3 + [0.05], [1.0] * 4, "recipe")
    first = diagnose([naive, recipe])[0]
    assert (first.run, first.title) == ("", "recipe uses its depth best")
    assert "75 % of its layers" in first.text and "naive 25 %" in first.text
    assert diagnose([naive, naive])[0].title == "The runs use their depth alike"


def test_what_the_variance_grows_by(tmp_path: Path) -> None:
    [run] = gather([write_example_run(tmp_path / "run", layers=4, steps=20, scores=False)])
    growth = growth_of(run)
    assert growth is not None
    assert growth.shares_P == pytest.approx([0.3, 0.7, 0.1, -0.1])
    assert growth.shares_PL.sum() == pytest.approx(1)
    [advice] = [one for one in diagnose([run]) if one.title.startswith("Variance grows")]
    assert advice.title.endswith("the largest part through the MLPs' own output")
    assert "40 % comes with the adds of attention and 60 % with those of the MLPs" in advice.text
    run.series["layer_output", "covariance"].values_IL[:] = np.nan
    assert growth_of(run) is None


def test_near_identity_and_uneven_experts_are_named() -> None:
    scores = example_scores(layers=4)
    assert scores.jacobian is not None and scores.moe is not None
    layers = [
        dataclasses.replace(found, deviation=d) for found, d in zip(scores.jacobian.layers, (1, 1, 1, 0.1), strict=True)
    ]
    experts = {
        at: dataclasses.replace(found, balance=0.2 if at == "2" else 0.9) for at, found in scores.moe.layers.items()
    }
    scores = dataclasses.replace(
        scores,
        jacobian=dataclasses.replace(scores.jacobian, layers=layers),
        moe=dataclasses.replace(scores.moe, layers=experts),
    )
    found = titles(diagnose([Run(name="run", path=Path("run"), scores=scores)]))
    assert "Layer 3 hardly changes its input" in found and "Routers of layer 2 use few of their experts" in found


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, ["a mixture of experts", "more weight decay", "longer sequences", "grouped queries"]),
        ({"num_experts": 8, "weight_decay": 3.0}, ["less weight decay", "longer sequences", "grouped queries"]),
        ({"num_experts": 8, "seq_length": 8192, "weight_decay": 0.1}, ["shorter sequences", "grouped queries"]),
        (
            {"num_experts": 8, "seq_length": 4096, "weight_decay": 0.1, "group_query_attention": True}
            | {"num_query_groups": 2},
            [],
        ),
    ],
)
def test_what_to_try_next(changes: dict[str, Any], steps: list[str]) -> None:
    config = {"num_attention_heads": 8, "seq_length": 512, "weight_decay": 0.0} | changes
    found = next_ingredients(config)
    assert sorted(step for step in steps) == sorted(
        next(step for step in steps if ingredient.step.startswith(step)) for ingredient in found
    )
    assert [one.usefulness_gain for one in found] == sorted((one.usefulness_gain for one in found), reverse=True)
    [advice] = diagnose([Run(name="run", path=Path("run"), config=config)])
    assert advice.title == f"Try next: {found[0].step}" if found else "All ingredients" in advice.title


def test_the_demos_models_differ_by_the_recipe() -> None:
    settings = {name: yaml.safe_load((demo.REPOSITORY / path).read_text()) for name, path in demo.MODELS.items()}
    assert len(next_ingredients(settings["naive"])) == 4
    [ingredient] = next_ingredients(settings["recipe"])  # 256 tokens are still short
    assert ingredient.step.startswith("longer sequences") and settings["recipe"]["seq_length"] == 256
    tokens = [found["seq_length"] * found["global_batch_size"] * found["train_iters"] for found in settings.values()]
    assert len(set(tokens)) == 1 and len({found["num_layers"] for found in settings.values()}) == 1


def test_a_run_that_repeats_one_of_the_papers_is_found(tmp_path: Path) -> None:
    [run] = gather([write_example_run(tmp_path / "run", layers=2, steps=2, scores=False)])
    assert counterpart(run) is None
    for published in PUBLISHED:
        run.config = dict(published.settings)
        run.log.steps[-1]["tokens"] = int(published.tokens * 1.01)
        found = counterpart(run)
        assert found is not None and set(found.settings.items()) >= set(published.settings.items()) - {
            ("num_query_groups", 16)
        }
        beside = {cell.published for row in evaluation_rows([run]) for cell in row.cells}
        assert f"paper: {number(published.figures['perplexity'])} ({published.place})" in beside
    run.log.steps[-1]["tokens"] = int(published.tokens * 1.2)
    assert counterpart(run) is None
