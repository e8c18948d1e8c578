"""Evaluations to compare with: lm-eval's own model class on the same weights, and items of files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsecod_mcore.evaluation.results import Evaluation, Item
from sparsecod_mcore.evaluation.run import Request, evaluate_model
from tests.evaluation.conftest import Example


def of_lm_eval(model: Example, **options: Any) -> HFLM:
    """The model as lm-eval and transformers have it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model.tokenizer), bos_token="<s>", eos_token="<|endoftext|>")
    # Not from_pretrained, which makes tensors without memory: rotary frequencies stay so where the CPU stands in for a
    # device, since factories of tensors are then not those that transformers knows.
    llama = LlamaForCausalLM(LlamaConfig.from_pretrained(model.hugging_face)).eval()
    load_model(llama, model.hugging_face / "model.safetensors")
    return HFLM(llama, tokenizer=tokenizer, batch_size=16, **options)


def evaluate(model: Path, out: Path, tasks: Sequence[str], **options: Any) -> Evaluation:
    return evaluate_model(Request(model=str(model), tasks=tasks, out=out, **options))


def items_of(out: Path) -> list[Item]:
    return [Item(**json.loads(line)) for line in (out / "items.jsonl").read_text().splitlines()]


def assert_same_items(found: Sequence[Item], expected: Sequence[Item], tolerance: float) -> None:
    """All equal, log-likelihoods within an absolute tolerance."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, rel=0, abs=tolerance)
        assert (one.task, one.item, one.right, one.characters) == (
            other.task,
            other.item,
            other.right,
            other.characters,
        )
        assert (one.metrics, one.is_greedy) == (other.metrics, other.is_greedy)
