"""The training engine: loop, schedules, optimisers, checkpoints, health, hooks."""
