"""Hugging Face directories, read in memory: ``config.json`` and ``*.safetensors``. Pickles are never opened."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparsecod_mcore.data.json_file import read_json
from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.exchange import llama

# A family is a module with MODEL_TYPES, settings(config) and weights(config).
FAMILIES: dict[str, ModuleType] = {model_type: family for family in (llama,) for model_type in family.MODEL_TYPES}

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Derived from the configuration, and kept by older files all the same.
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)


class HuggingFaceModel:
    """One directory's configuration, and its tensors by name."""

    def __init__(self, directory: Path) -> None:
        """Raises `UserError` unless the directory holds a supported family in safetensors."""
        self.directory = directory
        self.config = read_json(directory / "config.json")
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UserError(
                f"{directory}: model_type {model_type!r} is not supported, {', '.join(FAMILIES)} are"
                f"{nearest(str(model_type), FAMILIES)}"
            )
        self._family = FAMILIES[model_type]
        try:
            self.settings: dict[str, Any] = self._family.settings(self.config)
        except UserError as error:
            raise UserError(f"{directory / 'config.json'}: {error}") from None
        except KeyError as error:
            raise UserError(f"{directory / 'config.json'} lacks {error}") from None
        self.files = [directory / "config.json", *self._weight_files()]

    def _weight_files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise UserError(f"{index} is damaged: its weight_map does not name a file for each tensor")
            files = sorted({self.directory / name for name in weight_map.values()})
            if any(file.parent != self.directory for file in files):
                raise UserError(f"{index} names files outside of its directory")
        else:
            files = sorted(self.directory.glob("*.safetensors"))
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{missing[0]} is missing, and {index.name} names it")
        if files:
            return files
        pickles = sorted(path.name for pattern in _PICKLES for path in self.directory.glob(pattern))
        if pickles:
            raise UserError(
                f"{self.directory / pickles[0]} is a pickle, which can run code when it is opened, and is refused; "
                "save the model as safetensors"
            )
        raise UserError(f"{self.directory} holds no *.safetensors beside its config.json")

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter of Megatron's, unsharded, one at a time. Raises `UserError` for missing or unknown tensors."""
        with ExitStack() as stack:
            file_of: dict[str, Any] = {}
            for path in self.files[1:]:
                try:
                    file = stack.enter_context(safe_open(path, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{path} is no whole safetensors file ({error})") from None
                file_of |= dict.fromkeys(file.keys(), file)
            unused = {name for name in file_of if not name.endswith(_NOT_WEIGHTS)}
            if self.config.get("tie_word_embeddings"):
                unused.discard("lm_head.weight")
            for weight in self._family.weights(self.config):
                missing = [name for name in weight.sources if name not in file_of]
                if missing:
                    raise UserError(f"{self.directory} lacks the tensor {missing[0]}")
                unused -= set(weight.sources)
                yield weight.name, weight.merge(*(file_of[name].get_tensor(name) for name in weight.sources))
        if unused:
            raise UserError(f"{self.directory} has a tensor {min(unused)}, which its config.json does not account for")


def load_parameters(model: torch.nn.Module, source: HuggingFaceModel, rank: int, size: int) -> None:
    """Copy `source` into Megatron's local `model`, of which this is tensor-parallel `rank` of `size`.

    Parameters say themselves how they are cut: `partition_stride` equal blocks along `partition_dim`, each of which is
    cut into `size`.
    """
    targets = dict(model.named_parameters())
    for name, full in source.parameters():
        target = targets.pop(name)
        if getattr(target, "tensor_model_parallel", False) and size > 1:
            dim, stride = target.partition_dim, target.partition_stride  # type: ignore[attr-defined]
            blocks = full.chunk(size * stride, dim)
            full = torch.cat(blocks[rank::size], dim)
        if full.shape != target.shape:
            raise UserError(
                f"{source.directory}: {name} has the shape {list(full.shape)}, config.json implies {list(target.shape)}"
            )
        target.data.copy_(full)
    assert not targets, sorted(targets)
