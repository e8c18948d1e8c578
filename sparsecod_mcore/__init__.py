"""Pretraining with Megatron-Core that measures, inside its kernels, how variance builds up over depth."""

__version__ = "0.1.0"
