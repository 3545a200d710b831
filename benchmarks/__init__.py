"""Benchmarks: each file measures one claim and writes its rows to `results/<name>.json`."""
