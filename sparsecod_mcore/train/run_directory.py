"""The run directory: one run's configuration, checkpoints, statistics and logs, and that they belong together."""

import glob
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from sparsecod_mcore.config import read_config
from sparsecod_mcore.errors import UserError

OVERRIDE = "override_opt_param_scheduler"
# What may change when a run goes on: how it is spread over processes, logged, saved and stopped.
FREE_TO_CHANGE = (
    OVERRIDE,
    "cod.run_dir",
    "cod.stats_interval",
    "cod.kurtosis_interval",
    "cod.jacobian_*",
    "cod.verbose",
    "cod.skip_non_finite",
    "cod.profile",
    "micro_batch_size",
    "num_workers",
    "distributed_backend",
    "transformer_impl",
    "sequence_parallel",
    "num_layers_per_virtual_pipeline_stage",
    "tp_comm_overlap",
    "attention_backend",
    "verify_integrity",
    "data_cache_path",
    "exit_*",
    "save_*",
    "load*",
    "no_load*",
    "no_save*",
    "ckpt_*",
    "dist_ckpt_*",
    "async_*",
    "use_persistent_ckpt_worker",
    "finetune",
    "pretrained_checkpoint",
    "skip_train",
    "full_validation",
    "rerun_mode",
    "ddp_*",
    "nccl_*",
    "num_dataset_builder_threads",
    "log_*",
    "no_log*",
    "eval_*",
    "tensorboard_*",
    "wandb_*",
    "profile*",
    "timing_log*",
    "recompute_*",
    "overlap_*",
    "manual_gc*",
    "use_distributed_optimizer",
    "*_parallel_size",
    "*_parallel_degree",
    "distributed_timeout_*",
)

PLACES = ("cod.data", "cod.tokenizer")


class RunDirectory:
    """Paths inside one run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.stats = path / "stats"
        self.dimensions = path / "dimensions"
        self.tensorboard = path / "tensorboard"
        self.log = path / "log.jsonl"

    def defaults(self) -> dict[str, Any]:
        """Megatron's output flags, for those that the user did not set."""
        return {
            "save": str(self.checkpoints),
            "tensorboard_dir": str(self.tensorboard),
            "wandb_save_dir": str(self.path),
            "data_cache_path": str(self.path / "cache"),
        }

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse `settings` (by key) that make another run than the one whose configuration is stored here."""
        if not self.config.exists():
            return
        stored, given = _located(read_config(self.config)), _located(settings)
        # Megatron keeps a schedule's length with its state, and lets it change only when told so.
        free = FREE_TO_CHANGE + (("train_iters", "lr_decay_iters") if given.get(OVERRIDE) else ())
        changed = sorted(
            key
            for key in stored.keys() | given.keys()
            if stored.get(key) != given.get(key)
            and not any(fnmatchcase(key, pattern) for pattern in free)
            and not (key in PLACES and stored.get(key) and given.get(key) and _is_moved(stored[key], given[key]))
        )
        if changed:
            shown = ", ".join(f"{key} was {stored.get(key)!r} and is {given.get(key)!r}" for key in changed[:3])
            hint = f" (--{OVERRIDE.replace('_', '-')} lets a run be prolonged)" if "train_iters" in changed else ""
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{self.path} belongs to a run with another configuration ({shown}{more}); "
                "give the same configuration to go on with it, or another --cod-run-dir" + hint
            )

    def claim(self, settings: dict[str, Any]) -> None:
        """Store `settings` as this run's resolved configuration (the latest, if it went on with free changes)."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.config.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(yaml.safe_dump(nest(_located(settings)), sort_keys=False))
        temporary.replace(self.config)


def nest(settings: dict[str, Any]) -> dict[str, Any]:
    """The form that a configuration file has: this project's keys in a ``cod:`` block."""
    own = {key.removeprefix("cod."): value for key, value in settings.items() if key.startswith("cod.")}
    megatron = {key: value for key, value in settings.items() if not key.startswith("cod.")}
    return megatron | ({"cod": own} if own else {})


def _located(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the places of data and tokenizer absolute: the same, from wherever they are named."""
    places = {key: os.path.abspath(settings[key]) for key in PLACES if settings.get(key)}
    return settings | places


def _is_moved(before: str, now: str) -> bool:
    """Whether files (a whole name, or how several begin) seem to be elsewhere now: gone, and of the same name there."""
    place = Path(before)
    return place.name == Path(now).name and not any(place.parent.glob(f"{glob.escape(place.name)}*"))
