"""A run whose numbers stop being finite stops, and says in which layer and stream that began."""

from pathlib import Path

import pytest

from tests.distributed.jobs import Data
from tests.distributed.programs import train_around

pytestmark = pytest.mark.distributed

POISON = """
def around(iteration, model, layers, run):
    for layer in layers:
        if iteration == 2 and layer.layer_number - 1 == {layer}:
            layer.get_submodule("{module}").weight.data[0, 0] = float("inf")
    return run()
"""


@pytest.mark.parametrize(
    ("module", "layer", "stream", "flags", "processes"),
    [
        ("mlp.linear_fc2", 2, "mlp", (), 1),
        ("self_attention.linear_proj", 3, "attention", ("--pipeline-model-parallel-size", 2), 2),
        ("mlp.linear_fc2", 1, "mlp", ("--clip-grad", 0.0), 1),
    ],
)
def test_names_the_first_layer_and_stream(
    module: str, layer: int, stream: str, flags: tuple, processes: int,
    tmp_path: Path, dense_config: Path, data: Data,
) -> None:  # fmt: skip
    poison = POISON.format(module=module, layer=layer)
    job = train_around(poison, tmp_path, dense_config, data, *flags, "--save-interval", 2, processes=processes)
    assert job.returncode == 1
    said = job.complaint()
    assert "iteration 3" in said and f"layer {layer}, stream {stream} " in said
    assert [path.name for path in (job.run / "checkpoints").glob("iter_*")] == ["iter_0000002"]
    counts = {key: value for key, value in job.statistics().items() if key[3] == "non_finite" and value}
    assert min(counts)[:2] == (3, layer)
    assert sorted(job.losses()) == [1, 2, 3]
