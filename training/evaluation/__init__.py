"""Parts of `training.evaluate`: sampling many images, features, metrics, references, reports, searches."""
