"""Data: images and their labels come in, training batches go out.

`sources` lists the images of a folder (`folders`) or a Hugging Face dataset as `examples` with a class each
(`labels`), `decoding` turns one of them into pixels, and `vae` pixels into latents. Training reads either a
`latent_cache`, which `training.cache_latents` wrote, or the images themselves (`image_dataset`), of which some may be
`held_out`; `batches` draws groups from either, with every random number keyed on the position in the data. `splits`
divides images into those to train on, to tune on and to report on.
"""
