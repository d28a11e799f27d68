"""Optimisers of table rows: SGD, Adagrad, RowWiseAdagrad, Adam, RowWiseAdam."""

from shardlab.optim.rules import SGD, Adagrad, Adam, RowOptimizer, RowWiseAdagrad, RowWiseAdam

__all__ = ["SGD", "Adagrad", "Adam", "RowOptimizer", "RowWiseAdagrad", "RowWiseAdam"]
