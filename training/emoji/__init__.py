"""Emoji in the hands of six groups of artists: a data set of drawings by class name, and what judges models of it."""
