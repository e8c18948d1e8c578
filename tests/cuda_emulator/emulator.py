"""Runs launchers of csrc/cuda in the emulator: on guarded memory, in several orders of threads, to the same bits."""

import ctypes
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.cuda_emulator.build import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS = (0, 1, 7)  # forward, reverse, shuffled by this seed
POISON = 0xFF
ALIGNMENT = 16

_libc = ctypes.CDLL(None, use_errno=True)


class Scratch:
    """Memory for a kernel's own use, of so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size


class LaunchError(Exception):
    """A launch that failed, or results that depend on the order in which threads run."""


class Guarded:
    """Memory that ends where touching more fails the launch, but for up to 15 bytes that must keep their poison."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        pages = -(-max(size, 1) // page) + 2
        self.mapping = mmap.mmap(-1, pages * page)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        for guard in (first, first + (pages - 1) * page):
            assert _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        self.size = size
        self.end = (pages - 1) * page
        self.start = (self.end - size) // ALIGNMENT * ALIGNMENT
        self.mapping[page : self.end] = bytes([POISON]) * (self.end - page)
        self.address = first + self.start

    def write(self, tensor: Tensor) -> None:
        ctypes.memmove(self.address, tensor.data_ptr(), self.size)

    def read(self, like: Tensor) -> Tensor:
        before, after = self.mapping[mmap.PAGESIZE : self.start], self.mapping[self.start + self.size : self.end]
        if set(before + after) - {POISON}:
            raise LaunchError("wrote outside its tensors")
        result = torch.empty_like(like, memory_format=torch.contiguous_format)
        ctypes.memmove(result.data_ptr(), self.address, self.size)
        return result


class Emulator:
    """The launchers of one build of the kernels."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self.library = library or build()
        self.library.sparsecod_emulator_message.restype = ctypes.c_char_p

    def launch(self, launcher: str, arguments: Sequence[object], results: Sequence[Tensor]) -> list[Tensor]:
        """Call a launcher in every order, and return what it left in `results`.

        Arguments are tensors (contiguous ones, copied to guarded memory and passed as pointers), None (a null
        pointer), Scratch, a torch.dtype, int (64 bits), float (32 bits), or ctypes values. Those that are among
        `results` are written; their content is passed in. The stream comes last, by itself.
        """
        runs = [self._launch_in_order(order, launcher, arguments, results) for order in ORDERS]
        for order, run in zip(ORDERS[1:], runs[1:], strict=True):
            for i, (found, expected) in enumerate(zip(run, runs[0], strict=True)):
                if not torch.equal(_bits(found), _bits(expected)):
                    raise LaunchError(f"{launcher}: result {i} depends on the order of threads ({order})")
        return runs[0]

    def _launch_in_order(
        self, order: int, launcher: str, arguments: Sequence[object], results: Sequence[Tensor]
    ) -> list[Tensor]:
        memory: dict[int, Guarded] = {}
        scratch: list[Guarded] = []

        def passed(argument: object) -> object:
            match argument:
                case Tensor():
                    assert argument.is_contiguous(), "launchers take contiguous tensors, or strides as numbers"
                    if id(argument) not in memory:
                        memory[id(argument)] = Guarded(argument.numel() * argument.element_size())
                        memory[id(argument)].write(argument)
                    return ctypes.c_void_p(memory[id(argument)].address)
                case Scratch():
                    scratch.append(Guarded(argument.size))
                    return ctypes.c_void_p(scratch[-1].address)
                case None:
                    return ctypes.c_void_p(None)
                case torch.dtype():
                    return ctypes.c_int(DTYPES[argument])
                case bool():
                    return ctypes.c_bool(argument)
                case int():
                    return ctypes.c_int64(argument)
                case float():
                    return ctypes.c_float(argument)
            return argument

        function: Callable[..., int] = getattr(self.library, launcher)
        self.library.sparsecod_emulator_set_order(order)
        code = function(*map(passed, arguments), ctypes.c_void_p(None))
        if code != 0:
            raise LaunchError(f"{launcher}: {self.library.sparsecod_emulator_message().decode()} (error {code})")
        for argument in arguments:
            if isinstance(argument, Tensor) and not any(argument is result for result in results):
                unchanged = memory[id(argument)].read(argument)
                if not torch.equal(_bits(unchanged), _bits(argument)):
                    raise LaunchError(f"{launcher}: an input was written")
        return [memory[id(result)].read(result) for result in results]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def garbage(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A result before it is written: NaN, or -1."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.full([size], POISON, dtype=torch.uint8).view(dtype).view(*shape)
