"""CPU as a first-class platform: what Megatron asks of ``torch.cuda`` without asking whether there is one.

`prepare` patches nothing where a CUDA device exists. Elsewhere it stands the CPU in for "the current device", so that
one Megatron, one launcher and one command line serve both. ``torch.cuda.is_available()`` stays False: torch itself
never takes a CUDA path. Each function of `CPU_PATCHES` mends one need and has a test that shows the need.
"""

import functools
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch.jit._builtins import _find_builtin, _register_builtin
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")


def has_gpu() -> bool:
    """Whether a CUDA device is there: decides between nccl and gloo."""
    return torch.cuda.is_available()


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's specs and fusions can be had; elsewhere the local spec is used."""
    return has_gpu() and find_spec("transformer_engine") is not None


class _InstantStream:
    """Stands for streams and events: CPU work is done when the call returns, so waiting is a no-op."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "_InstantStream":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = wait = synchronize = record = _nothing

    def record_event(self, *args: Any) -> "_InstantStream":
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def stand_in_for_the_device() -> None:
    """Device queries, streams and memory figures answer for one device, the CPU."""
    stream = _InstantStream()
    # Large enough a capability that no Megatron feature is refused for the device's age.
    properties = SimpleNamespace(major=9, minor=0, name="cpu", total_memory=0, multi_processor_count=1)
    answers: dict[str, Any] = {
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "current_device": lambda: CPU,
        "get_device_properties": lambda *args, **kwargs: properties,
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "synchronize": lambda *args, **kwargs: None,
        "Stream": _InstantStream,
        "Event": _InstantStream,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": lambda given: stream if given is None else given,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def place_tensors_on_cpu() -> None:
    """``.cuda()`` and ``device="cuda"`` in tensor factories mean the CPU, and nothing is pinned (a driver would)."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs.pop("pin_memory", None)
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        # TorchScript knows factories by identity; torch.func.jvp scripts its decompositions.
        if (operator := _find_builtin(factory)) is not None:
            _register_builtin(make, operator)
        return make

    _device_constructors()  # ``with torch.device(…)`` knows factories by identity, and looks them up once
    for name in ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "arange"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def name_types_as_cuda() -> None:
    """Megatron's optimizers compare ``tensor.type()`` with names such as ``torch.cuda.FloatTensor``."""
    plain_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]


def leave_fusions_uncompiled() -> None:
    """No compiled fusions: 40 s of compiler a process, and 2 s for importing it, which Megatron's decorators do."""
    if "megatron.core.jit" in sys.modules:  # too late: they are compiled functions, which this keeps from compiling
        torch._dynamo.config.disable = True
    compile_function = torch.compile
    torch.compile = lambda model=None, **options: model or (lambda function: function)  # type: ignore[assignment]
    try:
        import megatron.core.jit as jit
        import megatron.core.transformer.moe.router  # noqa: F401  compiles without asking jit
    finally:
        torch.compile = compile_function
    jit.disable_jit_fuser()


def keep_random_state_on_cpu() -> None:
    """The CPU generator takes the device generator's part; upstream's lazy CUDA call would silently never run."""
    import megatron.core.tensor_parallel.random as parallel_random

    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state.cpu())
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))  # type: ignore[assignment]
    parallel_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    parallel_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def give_split_sizes_to_gloo() -> None:
    """gloo's all-to-all wants integers for split sizes; upstream makes them of CUDA tensors only."""
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def as_host_value(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = as_host_value


def skip_fusion_warm_up() -> None:
    """The warm-up of compiled fusions, of which there are none, draws random numbers, differing by TP size."""
    import megatron.training.training as training

    training.set_jit_fusion_options = lambda *args, **kwargs: None


def allow_no_cuda() -> None:
    """Megatron has this door; ``pretrain`` does not pass it on."""
    import megatron.training.training as training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)


def keep_random_state_around_data_iterators() -> None:
    """A DataLoader draws its seed from the CPU generator, on TP rank 0 alone: TP ranks would drop out differently."""
    import megatron.training.training as training

    build = training.build_train_valid_test_data_iterators

    @functools.wraps(build)
    def build_and_restore(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return build(*args, **kwargs)

    training.build_train_valid_test_data_iterators = build_and_restore


# Order matters: Megatron reads torch.cuda while it is imported, so the device comes first.
CPU_PATCHES: tuple[Callable[[], None], ...] = (
    stand_in_for_the_device,
    place_tensors_on_cpu,
    name_types_as_cuda,
    leave_fusions_uncompiled,
    keep_random_state_on_cpu,
    give_split_sizes_to_gloo,
    skip_fusion_warm_up,
    allow_no_cuda,
    keep_random_state_around_data_iterators,
)

# What Megatron needs to be told where Transformer Engine is not installed; a flag given by the user wins.
LOCAL_DEFAULTS: dict[str, Any] = {
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
}


def hush_absent_gpu() -> None:
    """Every module of Megatron warns that the GPU's libraries are absent; where no GPU is, that is no news."""
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine).*", category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """A module that seems not to be installed, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


@functools.cache
def prepare() -> None:
    """Make this process able to run Megatron: call before anything else touches ``megatron``. Idempotent."""
    # Megatron's timers import wandb wherever it is, 2 s in every process, to compare writers with a module that is
    # never one of ours.
    with _absent("wandb"):
        if not has_gpu():
            hush_absent_gpu()
            for patch in CPU_PATCHES:
                patch()
        import megatron.core.timers  # noqa: F401
