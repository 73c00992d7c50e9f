"""A plan applied to the files of a model."""
