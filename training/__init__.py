"""Training recipes for TransDiff models."""
