"""The paper's theorems as code: each law or bound, simulated under its own assumptions and without them."""
