"""Megatron's torch_dist checkpoints, of any parallel layout, loaded without trusting them.

Such a checkpoint holds pickles: ``.metadata``, which names the tensors' places, and the arguments of the run.
PyTorch opens the first without restriction, so `read_metadata` goes through it beforehand; all else is loaded with
``weights_only``, whatever the caller asks for.
"""

import os
import pickle
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.safe_globals import register_safe_globals
from torch.distributed.checkpoint.api import CheckpointException

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.train import checkpoints
from sparsecod_mcore.train.checkpoint_metadata import read_metadata


@contextmanager
def opening(checkpoint: Path, tensor: str = "") -> Iterator[None]:
    """``torch.load`` in this process builds plain values and Megatron's own classes of settings, nothing else.

    What PyTorch's checkpointing warns of is between Megatron and PyTorch. Raises `UserError` for what goes wrong
    meanwhile, naming `tensor`: damaged pickles fail in any way.
    """
    register_safe_globals()
    try:
        with patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:  # no Exception; holds what failed by rank
        failed, _ = next(iter(error.failures.values()))
        raise _told(checkpoint, tensor, failed) from error
    except Exception as error:
        raise _told(checkpoint, tensor, error) from error


def _told(checkpoint: Path, tensor: str, error: BaseException) -> UserError:
    if isinstance(error, pickle.UnpicklingError):  # whose text tells how to load it all the same
        return UserError(f"{checkpoint} is refused: a pickle of it is damaged, or holds more than plain values")
    reason, _, _ = " ".join(str(error).split()).partition(". ")
    if isinstance(error, CheckpointingException):
        return UserError(f"{checkpoint} does not fit its own arguments: {reason}")
    what = f"{tensor} of {checkpoint}" if tensor else str(checkpoint)
    return UserError(f"{what} cannot be loaded ({type(error).__name__}: {reason})")


def find_model(path: Path) -> Path | None:
    """The torch_dist checkpoint that `path` means; None where it is a Hugging Face directory instead."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; a run's directory, a checkpoint or a Hugging Face directory is wanted")
    checkpoint = find_checkpoint(path)
    if checkpoint is None and not (path / "config.json").exists():
        raise UserError(
            f"{path} is no model: it holds neither a torch_dist checkpoint nor the config.json of a "
            "Hugging Face directory"
        )
    return checkpoint


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at `path`: itself, or the newest whole one of a folder of them or of a run. None if none is there.

    Raises `UserError` if there are checkpoints, but none that can be read.
    """
    if _is_checkpoint(path):
        return _undamaged(path)
    for folder in (path / "checkpoints", path):
        choice = checkpoints.newest_whole(folder)
        if choice.iteration is not None:
            return checkpoints.iteration_directory(folder, choice.iteration)
        if choice.damaged is not None:
            raise UserError(f"{choice.damaged}, and there is no older whole checkpoint in {folder}")
        release = folder / "release"
        if _is_checkpoint(release):
            return _undamaged(release)
    return None


def _is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint, whole or not. Hugging Face directories may have a metadata.json too."""
    return (folder / "metadata.json").exists() and not (folder / "config.json").exists()


def _undamaged(checkpoint: Path) -> Path:
    damage = checkpoints.damage(checkpoint)
    if damage is not None:
        raise UserError(damage)
    return checkpoint


def read_arguments(checkpoint: Path) -> Namespace:
    """The arguments that the model was trained with."""
    read_metadata(checkpoint)
    with opening(checkpoint):
        arguments = load_common_state_dict(checkpoint).get("args")
    if not isinstance(arguments, Namespace):
        raise UserError(f"{checkpoint} holds no arguments of a training run, so its model is unknown")
    return arguments


def load_weights(model: GPTModel, checkpoint: Path) -> None:
    """Copy the checkpoint's weights into `model`, whose layout may be another. Collective over all ranks."""
    read_metadata(checkpoint)
    with opening(checkpoint):
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=load_common_state_dict(checkpoint))
        state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata or {})}, str(checkpoint))
    model.load_state_dict(state["model"], strict=True)
