"""Measurements of speed: ratios within one interleaved run on one machine,
never a test that times.
"""
