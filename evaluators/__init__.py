"""What scores a network: the segmentation evaluator, and latency on each engine."""
