"""The paper's runs as configurations, what they take, and families of runs: see docs/experiments.md."""
