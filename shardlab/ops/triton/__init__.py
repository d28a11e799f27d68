"""Triton faces of the ops: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1."""
