"""The digits data set, its small VAE, and the quality measures of the bundled digits."""
