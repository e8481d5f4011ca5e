"""What a run tells: rows, TensorBoard, the console, where its time goes."""
