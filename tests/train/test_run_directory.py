"""A run directory belongs to one configuration, some of which may change as the run goes on."""

from pathlib import Path

import pytest

from sparsecod_mcore.config import read_config
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.train.run_directory import RunDirectory

SETTINGS = {"num_layers": 4, "lr": 1e-3, "train_iters": 10, "cod.stats_interval": 1, "cod.data": "text"}


def claimed(path: Path) -> RunDirectory:
    run = RunDirectory(path / "run")
    run.check(SETTINGS)
    run.claim(SETTINGS)
    return run


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"log_interval": 5, "save_interval": 7},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"cod.stats_interval": 7, "cod.run_dir": "elsewhere", "save_interval": 3},
    ],
)
def test_what_may_change(change: dict, tmp_path: Path) -> None:
    claimed(tmp_path).check(SETTINGS | change)


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"num_layers": 5}, {"cod.data": "other"}, {"swiglu": True}])
def test_what_makes_another_run(change: dict, tmp_path: Path) -> None:
    run = claimed(tmp_path)
    before = run.config.read_text()
    with pytest.raises(UserError, match=next(iter(change)).replace(".", r"\.")):
        run.check(SETTINGS | change)
    assert run.config.read_text() == before


def test_a_run_may_be_prolonged_when_its_schedule_is_overridden(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_iters was 10 and is 20"):
        claimed(tmp_path).check(SETTINGS | {"train_iters": 20})
    claimed(tmp_path).check(SETTINGS | {"train_iters": 20, "override_opt_param_scheduler": True})


def test_something_left_out_makes_another_run(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    with pytest.raises(UserError, match=r"lr was 0\.001 and is None"):
        run.check({key: value for key, value in SETTINGS.items() if key != "lr"})


def test_places_are_kept_as_seen_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = claimed(tmp_path)
    assert read_config(run.config)["cod.data"] == str(tmp_path / "text")
