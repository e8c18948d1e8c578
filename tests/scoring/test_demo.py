"""The demo's scores are those of the weights that it has."""

from dataclasses import replace
from pathlib import Path

from sparsecod_mcore import demo
from sparsecod_mcore.scoring.provenance import hash_files
from sparsecod_mcore.scoring.results import write_scores
from tests.scoring.example_scores import example_scores


def test_scores_of_other_weights_are_out_of_date(tmp_path: Path) -> None:
    model, scores = tmp_path / "model", tmp_path / "scores" / "scores.json"
    model.mkdir()
    (model / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, '
        '"num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 97, "max_position_embeddings": 64}'
    )
    weights = model / "model.safetensors"
    weights.write_bytes(b"as they were")
    assert not demo._are_of_present_weights(scores, model)
    example = example_scores()
    provenance = replace(example.provenance, model_sha256=hash_files(model.iterdir()))
    write_scores(scores.parent, replace(example, provenance=provenance))
    assert demo._are_of_present_weights(scores, model)
    weights.write_bytes(b"as they are")
    assert not demo._are_of_present_weights(scores, model)
