"""Training, evaluation and checkpoints: everything that drives a device."""
