"""Which settings learn best? Sweeps: Optuna studies over runs, pruned, retried, and tracked in MLflow."""
