"""Readies the platform before any test of this folder imports Megatron."""

from sparsecod_mcore import platform

platform.prepare()
