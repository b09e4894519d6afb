"""What a run tells: metrics.jsonl, TensorBoard, progress bars, the table row."""
