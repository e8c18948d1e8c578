"""Pretrain a language model while measuring its layers: torchrun examples/pretrain_cod.py --config CONFIG [flags]."""

if __name__ == "__main__":
    # Here, not at the top: the processes that write checkpoints import this file, and need nothing of the training.
    from sparsecod_mcore.train.pretrain import main

    main()
