"""From a Hugging Face directory to a torch_dist checkpoint, and back: ``tools/convert_checkpoint.py``.

A converted checkpoint is a folder that Megatron loads from: ``release/`` and the tracker that names it. Beside them,
in ``hugging_face/``, is what Megatron has no place for and the way back needs: config.json, tokenizer, generation
config.
"""

import json
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sparsecod_mcore.data.atomic import whole_folder
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.exchange import megatron
from sparsecod_mcore.exchange.companions import (
    TOKENIZER_FILES,
    carry,
    carry_tokenizer,
    check_vocabulary,
    complete,
    tokenizer_of_run,
)
from sparsecod_mcore.exchange.decoder import Config, normalised
from sparsecod_mcore.exchange.families import Family, find_family
from sparsecod_mcore.exchange.hugging_face import HuggingFaceModel, settings_of
from sparsecod_mcore.exchange.safetensors_file import Group, write_sharded
from sparsecod_mcore.exchange.torch_dist import CONTENT, CheckpointTensors, write_checkpoint
from sparsecod_mcore.exchange.weights import Weight
from sparsecod_mcore.model.build import complete_arguments
from sparsecod_mcore.progress import ProgressLine
from sparsecod_mcore.train.checkpoints import TRACKER

DTYPES: dict[str, torch.dtype | None] = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
RELEASE, CARRIED = "release", "hugging_face"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be converted, and how."""

    model: Path
    out: Path
    to: Literal["megatron", "hf"] | None = None  # None: whichever `model` is not
    dtype: torch.dtype | None = None  # None: what it is stored in
    max_shard_size: int = 5 * 10**9  # bytes
    tokenizer: Path | None = None  # None: what belongs to the model


def convert(request: Request) -> None:
    """Convert, and say what was made. Raises `UserError`; then, or when interrupted, nothing is left behind."""
    checkpoint = megatron.find_model(request.model)
    kind = "hf" if checkpoint is not None else "megatron"
    if request.to not in (None, kind):
        what = "a Hugging Face directory" if checkpoint is None else "a torch_dist checkpoint"
        raise UserError(f"{request.model} is {what} already, and --to {request.to} is given")
    try:
        with whole_folder(request.out) as folder:
            made = (
                _to_megatron(request, folder) if checkpoint is None else _to_hugging_face(request, checkpoint, folder)
            )
    except OSError as error:  # a full disk, above all
        place = f": {error.filename}" if error.filename else ""
        raise UserError(f"{request.out} cannot be made ({error.strerror or error}{place})") from error
    print(f"{request.out}: {made}")


class _Progress(ProgressLine):
    """Counts bytes of weights as they are made."""

    def __init__(self, what: str, weights: Sequence[Weight], dtype: Callable[[Weight], torch.dtype]) -> None:
        super().__init__(what)
        sizes = [torch.Size(weight.shape).numel() * dtype(weight).itemsize for weight in weights if weight.names]
        self._all, self._done = sum(sizes), 0

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        self._done += tensor.nbytes
        self.show(min(self._done / self._all, 1.0))
        return tensor

    def amounts(self, seconds: float) -> str:
        size = f"{self._done / 1e9:,.2f} GB" if self._done >= 1e8 else f"{self._done / 1e6:,.2f} MB"
        return f"{size}, {self._done / 1e6 / seconds:,.0f} MB/s"


def _to_megatron(request: Request, folder: Path) -> str:
    source = HuggingFaceModel(request.model)
    if request.tokenizer is not None:
        check_vocabulary(request.tokenizer, source.settings["padded_vocab_size"])

    def dtype(weight: Weight) -> torch.dtype:
        return request.dtype or source.dtype(weight)

    kept = _common_dtype({dtype(weight) for weight in source.weights})
    common = {
        "args": complete_arguments(source.settings, kept),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": CONTENT,
    }
    with _Progress("converting", source.weights, dtype) as progress:

        def read(weight: Weight) -> torch.Tensor:
            return progress.count(source.read(weight, request.dtype))

        write_checkpoint(folder / RELEASE, source.weights, dtype, read, common)
    (folder / TRACKER).write_text(RELEASE)
    carried = folder / CARRIED
    carried.mkdir()
    carry(request.model, carried)
    (carried / "config.json").write_bytes((request.model / "config.json").read_bytes())
    if request.tokenizer is not None:
        carry_tokenizer(request.tokenizer, carried)
    return f"torch_dist checkpoint of {source.config['model_type']} in {_name(kept)}, which --load takes"


def _to_hugging_face(request: Request, checkpoint: Path, folder: Path) -> str:
    args = complete_arguments(vars(megatron.read_arguments(checkpoint)), torch.float32)
    family, config, carried = _family(args, checkpoint)
    tensors = CheckpointTensors(checkpoint)
    weights = list(family.weights(normalised(vars(args))))
    tensors.check(weights)
    tokenizer = request.tokenizer or (None if carried is not None else _tokenizer_of_run(args, checkpoint))
    if tokenizer is not None:
        check_vocabulary(tokenizer, args.vocab_size or args.padded_vocab_size)
    kept = _common_dtype({request.dtype or tensors.dtype(weight) for weight in weights if weight.names})

    def dtype(weight: Weight) -> torch.dtype:
        return request.dtype or (tensors.dtype(weight) if weight.names else kept)

    with _Progress("converting", weights, dtype) as progress:

        def make(weight: Weight) -> Sequence[torch.Tensor]:
            return weight.split(progress.count(tensors.read(weight).to(dtype(weight))))

        groups = [
            Group(weight.tensor_shapes(), dtype(weight), lambda weight=weight: make(weight))  # type: ignore[misc]
            for weight in weights
        ]
        write_sharded(folder, groups, request.max_shard_size)
    if carried is not None:
        carry(carried, folder)
    if tokenizer is not None:
        carry_tokenizer(tokenizer, folder)
    config |= {} if carried is not None else complete(folder, args)
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": _name(kept)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    without = "" if has_tokenizer else ", without a tokenizer (--tokenizer takes one)"
    return f"{family.architecture} in {_name(kept)}, which from_pretrained takes{without}"


def _family(args: Namespace, checkpoint: Path) -> tuple[Family, Config, Path | None]:
    """The model's family and configuration: those it came with, where they still describe it, and where they lie."""
    carried = checkpoint.parent / CARRIED
    if (carried / "config.json").is_file():
        family, config, settings = settings_of(carried / "config.json")
        if normalised(settings) == normalised(vars(args)):
            return family, config, carried
        raise UserError(f"{carried / 'config.json'} does not describe the model that {checkpoint} holds; remove it")
    family, config = find_family(vars(args))
    return family, config, None


def _tokenizer_of_run(args: Namespace, checkpoint: Path) -> Path | None:
    """The tokenizer.json that the run's data was made with, if it is still there."""
    named = tokenizer_of_run(checkpoint)
    path = named.tokenizer if named is not None else getattr(args, "cod_tokenizer", None)
    return Path(path) if path and Path(path).is_file() else None


def _common_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    """What a model is said to be in: the only type of its weights, or the widest."""
    found = torch.float16 if dtypes == {torch.float16} else torch.bfloat16
    return torch.float32 if dtypes - {found} else found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1}


def bytes_of(text: str) -> int:
    """The number of bytes that ``5GB`` means. Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    unit = (match[2] or "").upper() if match else ""
    size = int(float(match[1]) * (1 if unit == "B" else _UNITS[unit])) if match else 0
    if size < 1:
        raise UserError(f"a size of {text!r} is given; a number with KB, MB, GB or TB is accepted, such as 5GB")
    return size
