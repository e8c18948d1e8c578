"""Pretrain a language model while measuring its layers: torchrun examples/pretrain_cod.py --config CONFIG [flags]."""

from sparsecod_mcore.train.pretrain import main

if __name__ == "__main__":
    main()
