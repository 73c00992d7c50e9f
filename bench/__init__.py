"""Benchmarks: one suite per question, one row schema, peers beside us. See README.md."""
