"""Experiments on the models in `models/`: raw JSON, figures and RESULTS.md from one command."""
