"""Ops: one signature each, several faces (reference, native, triton); see `registry`."""
