"""Outputs: a run's weights and numbers come in, files and reports go out.

`checkpoints` are written so that what has the final name is complete, `metrics` are metrics.jsonl, pictures and speed,
`validation` measures the loss on held-out images, `trackers` report to TensorBoard and others, `card` writes the model
card and `publish` uploads the finished pipeline.
"""
