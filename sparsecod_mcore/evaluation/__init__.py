"""Models on benchmarks: lm-eval's tasks with the checkpoint as it is, and perplexity on held-out text."""
