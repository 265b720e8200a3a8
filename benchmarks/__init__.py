"""Measurements: each refuses what is not correct and prints ratios beside a named peer."""
