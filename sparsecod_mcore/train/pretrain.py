"""``examples/pretrain_cod.py``: from a command line to a trained model, on Megatron's own training loop."""

import contextlib
import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from torch.distributed.checkpoint import CheckpointException

from sparsecod_mcore import config
from sparsecod_mcore.errors import EXIT_USER_ERROR, UserError
from sparsecod_mcore.model.build import describe_model
from sparsecod_mcore.monitor.monitor import Monitor
from sparsecod_mcore.monitor.reduction import holds_replicated_tokens
from sparsecod_mcore.platform import has_gpu
from sparsecod_mcore.train import checkpoints, faults, hardware, input_checks, profiling, upstream, wandb_writer
from sparsecod_mcore.train.batches import build_datasets, forward_step
from sparsecod_mcore.train.divergence import TrainingDiverged
from sparsecod_mcore.train.hooks import TrainingHooks
from sparsecod_mcore.train.output import Say, leave_at_once, megatron_output
from sparsecod_mcore.train.probing import JacobianProbes
from sparsecod_mcore.train.run_directory import RunDirectory

# One process without a launcher is a job of one rank.
SINGLE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
EXIT_FAILED = 1
# Seconds that rank 0 is given to say an error before others say it: it may still be starting; when the run is
# interrupted every node speaks for itself, and its processes learn of it within moments of each other.
PATIENCE_AT_START, PATIENCE_INTERRUPTED = 30.0, 5.0


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; exit code 0 when done, 2 for a user's mistake, 1 for anything else."""
    if "RANK" not in os.environ:
        os.environ.update(SINGLE_PROCESS)
    try:
        pretrain(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        _leave(str(error), EXIT_USER_ERROR)
    except TrainingDiverged as error:
        _leave(str(error), EXIT_FAILED)
    except faults.RunInterrupted as error:
        _leave(str(error), EXIT_FAILED, one_of="LOCAL_RANK", patience=PATIENCE_INTERRUPTED)


def _leave(sentence: str, code: int, *, one_of: str = "RANK", patience: float = PATIENCE_AT_START) -> NoReturn:
    """Every rank has found the same; rank 0 (of all, or of each node) says it, and the launcher ends the others."""
    if os.environ.get(one_of, "0") == "0":
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's word to end is to be heard while waiting
        time.sleep(patience)
        print(f"error (rank {os.environ['RANK']}): {sentence}", file=sys.stderr, flush=True)
    leave_at_once(code)  # threads of the process group may be waiting for ranks that are gone


def pretrain(argv: Sequence[str]) -> None:
    """Parse, check, build and train. Raises `UserError` for what the user can mend, before anything is written."""
    argv = config.with_config(argv)
    args = _parse(argv)
    settings = config.explicit_settings(argv)
    run = RunDirectory(Path(args.cod_run_dir or f"runs/{Path(args.config or 'default').stem}"))
    for name, value in run.defaults().items():
        if not getattr(args, name):
            setattr(args, name, value)
    profiling.prepare(args)
    _prefer_own_checkpoint(args)
    input_checks.fill_in_data(args)
    input_checks.check_layout(args)
    hardware.check_fp8(args, hardware.capability())
    input_checks.check_data(args)
    run.check(settings)
    if (code := profiling.run_under_tool(args, run.path, argv)) is not None:
        sys.exit(code)
    with megatron_output(run.path, args.rank, verbose=args.cod_verbose) as say:
        validate(args)
        if args.rank == 0:
            run.claim(settings)
        if args.rank == 0 and has_gpu() and (note := hardware.unfused_adam()):
            say(note)
        upstream.mend()
        wandb_writer.install(say)
        set_global_variables(args)
        _train(args, run, say)


def _parse(argv: Sequence[str]) -> Namespace:
    program = sys.argv[0]
    try:
        sys.argv = [program, *argv]
        return parse_args(extra_args_provider=config.add_cod_arguments)
    finally:
        sys.argv = [program, *argv]


def _prefer_own_checkpoint(args: Namespace) -> None:
    """What a run has saved itself comes before what it started from, so that the same command goes on with it."""
    args.load = args.load or args.save
    if args.load != args.save and checkpoints.finished_iterations(Path(args.save)):
        args.load, args.ckpt_step = args.save, None
        args.finetune = args.no_load_optim = args.no_load_rng = False


def validate(args: Namespace) -> None:
    """Megatron's own validation, whose refusals are the user's to mend."""
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        # One hardware queue keeps collectives ahead of the matmuls that are to hide them; Megatron insists on it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        validate_args(args)
    except (AssertionError, ValueError) as error:
        failed = traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        reason = " ".join(str(error).split()) or failed
        raise UserError(f"Megatron refuses this configuration: {reason}") from error


def _train(args: Namespace, run: RunDirectory, say: Say) -> None:
    model_config = describe_model(args, training=True)
    hooks: list[TrainingHooks] = []

    def measure(model_chunks: list[MegatronModule]) -> list[MegatronModule]:
        """Runs once the model is built, when ranks, groups and device are known."""
        monitor = Monitor(
            args.num_layers,
            args.hidden_size,
            stats_interval=args.cod_stats_interval,
            kurtosis_interval=args.cod_kurtosis_interval,
            log_interval=args.log_interval,
            replicated=holds_replicated_tokens(args.sequence_parallel),
            device=torch.cuda.current_device(),
        )
        monitor.bind(model_chunks)
        if args.cod_profile is not None:
            profiling.name_ranges(model_chunks)
        if args.cod_jacobian_interval:
            replicated = holds_replicated_tokens(args.sequence_parallel)
            monitor.instruments = [JacobianProbes(args, model_chunks, replicated=replicated)]
        hooks.append(TrainingHooks(args, run, monitor, say))
        hooks[-1].install()
        return model_chunks

    model_config.pre_wrap_hooks.append(measure)
    try:
        training.pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            build_datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        iteration = getattr(args, "curr_iteration", -1) + 1  # Megatron counts those that are done
        if interruption := faults.interruption(error, Path(args.save), iteration):
            raise interruption from error
        raise
    finally:
        # A disk that is full for the log as well is not to hide the error that is on its way.
        failed = sys.exception() is not None and not isinstance(sys.exception(), SystemExit)
        with contextlib.suppress(*[OSError] if failed else []):
            for hook in hooks:
                hook.finish()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
