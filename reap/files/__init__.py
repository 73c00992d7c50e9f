"""Bytes on disk, safely: whole files or none, checked headers, a model's folder."""
