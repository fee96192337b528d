"""``token-pruning sweep``: methods and strengths for one task, explored with Optuna."""
