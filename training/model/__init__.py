"""Model: sizes or a trained pipeline come in, the networks to train go out, with their loss and their average.

`build` makes condition encoder and decoder, fresh, inherited tensor by tensor (`inherit`) or with adapters (`lora`),
and their optimiser. `loss` is the velocity loss of a batch, `schedule` the learning rate of a step, `ema` the average
of the weights.
"""
