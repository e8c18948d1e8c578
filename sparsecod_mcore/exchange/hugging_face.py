"""Hugging Face directories, read: ``config.json`` and ``*.safetensors``. Pickles are never opened."""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from sparsecod_mcore.data.json_file import read_json
from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.exchange.decoder import Settings
from sparsecod_mcore.exchange.families import BY_MODEL_TYPE, Family
from sparsecod_mcore.exchange.weights import Shape, Weight

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors call them

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Derived from the configuration, and kept by older files all the same.
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class StoredTensor(NamedTuple):
    """Where a tensor is, and what its file says of it."""

    path: Path
    shape: Shape
    dtype: str


def settings_of(config_file: Path) -> tuple[Family, dict[str, Any], Settings]:
    """A ``config.json``, its family, and what it means. Raises `UserError` for what is not supported."""
    config = read_json(config_file)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
        raise UserError(
            f"{config_file.parent}: model_type {model_type!r} is not supported, {', '.join(BY_MODEL_TYPE)} are"
            f"{nearest(str(model_type), BY_MODEL_TYPE)}"
        )
    family = BY_MODEL_TYPE[model_type]
    try:
        return family, config, family.settings(config)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from None
    except KeyError as error:
        raise UserError(f"{config_file} lacks {error}") from None


class HuggingFaceModel:
    """One directory's configuration, and its tensors, read one weight of Megatron's at a time."""

    def __init__(self, directory: Path) -> None:
        """Raises `UserError` unless the directory holds a supported family in safetensors."""
        self.directory = directory
        self.family, self.config, self.settings = settings_of(directory / "config.json")
        self.files = [directory / "config.json", *self._weight_files()]

    def _weight_files(self) -> list[Path]:
        index, single = (self.directory / f"model.safetensors{more}" for more in (".index.json", ""))
        if single.exists():  # as transformers has it, whatever else lies there
            return [single]
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

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name; of their content nothing is read."""
        found: dict[str, StoredTensor] = {}
        for path in self.files[1:]:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (it is no mapping)
                        part = file.get_slice(name)
                        if name in found:
                            raise UserError(f"{found[name].path} and {path} both hold the tensor {name}")
                        found[name] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is no whole safetensors file ({error})") from None
        return found

    @cached_property
    def weights(self) -> list[Weight]:
        """Every weight, once it is known that the files hold just these, in the shapes that config.json implies."""
        weights = list(self.family.weights(self.settings))
        unused = {name for name in self.tensors if not name.endswith(_NOT_WEIGHTS)}
        for weight in weights:
            for name, shape in weight.tensor_shapes().items():
                if name not in self.tensors:
                    untied = ", and its config.json does not tie it to the embedding" if name == _OUTPUT else ""
                    raise UserError(f"{self.directory} lacks the tensor {name}{untied}")
                stored = self.tensors[name]
                if stored.shape != shape:
                    raise UserError(
                        f"{stored.path}: {name} has the shape {list(stored.shape)}, config.json implies {list(shape)}"
                    )
                if stored.dtype not in DTYPES:
                    raise UserError(f"{stored.path}: {name} is of type {stored.dtype}; {', '.join(DTYPES)} are read")
            unused -= set(weight.tensors)
        if self.settings["untie_embeddings_and_output_weights"] is False and _OUTPUT in unused:
            self._check_tied()
            unused.discard(_OUTPUT)
        if unused:
            name = min(unused)
            raise UserError(
                f"{self.tensors[name].path} has a tensor {name}, which its config.json does not account for"
            )
        return weights

    def _check_tied(self) -> None:
        if not torch.equal(self._read(_OUTPUT), self._read(_EMBEDDING)):
            raise UserError(
                f"{self.tensors[_OUTPUT].path}: {_OUTPUT} differs from {_EMBEDDING}, "
                "to which config.json ties it (tie_word_embeddings)"
            )

    def _read(self, name: str) -> torch.Tensor:
        # A file is opened for one tensor: what is mapped of it is let go with the tensor.
        with safe_open(self.tensors[name].path, framework="pt") as file:
            return file.get_tensor(name)

    def dtype(self, weight: Weight) -> torch.dtype:
        """Of all tensors of `weight`. Raises `UserError` if they differ."""
        dtypes = {self.tensors[name].dtype: name for name in weight.tensors}
        if len(dtypes) > 1:
            mixed = " and ".join(f"{name} of type {dtype}" for dtype, name in sorted(dtypes.items()))
            raise UserError(f"{self.directory} has {mixed}, which Megatron keeps in one tensor; --dtype makes them one")
        return DTYPES[next(iter(dtypes))]

    def read(self, weight: Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor of Megatron's, whole; each of its parts is brought to `dtype` first."""
        parts = [self._read(name) for name in weight.tensors]
        return weight.merge(*(part if dtype is None else part.to(dtype) for part in parts))
