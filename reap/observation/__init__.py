"""The drop-in patch: measure the experts of a model while it runs."""
