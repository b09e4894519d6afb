"""What a run tells: metrics.jsonl, TensorBoard, progress bars, words."""
