"""CUDA kernels without a GPU: their sources compiled as C++, run by the emulator beside this file."""
