"""The output of a run: metrics.jsonl, TensorBoard, progress bars, text."""
