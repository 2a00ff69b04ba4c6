"""Distributed: a model and its optimiser come in, the same work spread over several processes goes out.

`processes` starts accelerate and tells which of several processes this is. An `engine` has the model and AdamW in
training, whole on every process; `fsdp2` (PyTorch's FSDP2) and `zero2` (DeepSpeed's ZeRO stage 2) are engines that
split them. `interruption` lets Ctrl-C and SIGTERM end a run where nothing is lost.
"""
