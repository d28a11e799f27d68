"""Measures this machine for the planner: each rank its memory and products, all ranks together
their exchange, one of them the disk. `rank` runs on every rank, `machine` makes a topology of it.
"""
