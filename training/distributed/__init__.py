"""Distributed: networks and their optimiser come in, the same work spread over several processes goes out.

`processes` starts accelerate and tells which of several processes this is, `sharding` (PyTorch's FSDP2) and `zero`
(DeepSpeed's ZeRO stage 2) split the state of training over them, and `interruption` lets Ctrl-C and SIGTERM end a run
where nothing is lost.
"""
