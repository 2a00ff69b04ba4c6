"""What is wrong with the data of a run."""


class DataError(ValueError):
    """Images or a VAE that are missing, cannot be read, or do not fit."""


class CacheError(DataError):
    """A latent cache that is missing, unfinished, or made with other settings."""
