"""Training of TransDiff models: images come in, a pipeline folder goes out.

The commands are `training.cache_latents`, `training.train`, `training.evaluate` and `training.plan`, and to prepare
data `training.split_images` and `training.train_vae`. `trainer` is the training loop, and `dry_run` describes a run
without running it. They stand on folders that import downwards only: `outputs` may import `distributed`, that `model`,
that `data`, that `settings`. `evaluation` measures a finished model, `digits` and `emoji` make and judge the bundled
ones, `bundle` puts these into the package, and `experiments` are the studies of docs/experiments.md.
"""

# Before any module of this package imports diffusers, whose import writes what `upstream_messages` leaves out.
import transdiff_pipelines as transdiff_pipelines
