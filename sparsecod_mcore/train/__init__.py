"""Glue to ``megatron.training.pretrain``. Importing it readies the platform, which must precede Megatron's import."""

from sparsecod_mcore import platform

platform.prepare()
