"""Loops over text: calibrate and evaluate."""
