"""Light retraining of what was pruned, and 2:4 sparsity."""
