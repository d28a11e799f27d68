"""How often each Criteo value occurs, as a few fitted numbers, and quantile tables made of them.

Measured on a uniform sample of 123,425 rows of the Criteo Kaggle week; no value of the data
itself is kept. Of C1..C26: the share of missing values; the shares of the 1, 10, 100 and 1000
most frequent values among those present; and, for values of a lower rank, the exponent a of a
power law, frequency ~ rank^-a up to the full week's cardinality, chosen so that a sample of the
same size has the measured share of values seen once (the number of distinct values then agrees
within 3 % for the eight largest tables). Of I1..I13: the share of missing values, the share of
values of 0 or less among those present, and the 10, 25, 50, 75, 90, 99 and 100 % quantiles of
log(x + 1) of the positive ones. Features are taken as independent of each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardlab.presets import CRITEO_KAGGLE_CARDINALITIES

#: missing, top 1, top 10, top 100, top 1000, tail exponent (0: no value beyond the top 1000)
_SPARSE_FIT = (
    (0.000, 0.500, 0.909, 0.991, 1.000, 0.00),  # C1
    (0.000, 0.114, 0.404, 0.864, 1.000, 0.00),  # C2
    (0.035, 0.026, 0.106, 0.272, 0.449, 0.96),  # C3
    (0.035, 0.037, 0.173, 0.389, 0.624, 1.22),  # C4
    (0.000, 0.674, 0.979, 1.000, 1.000, 0.00),  # C5
    (0.123, 0.451, 1.000, 1.000, 1.000, 0.00),  # C6
    (0.000, 0.021, 0.088, 0.280, 0.669, 0.74),  # C7
    (0.000, 0.595, 0.956, 0.998, 1.000, 0.00),  # C8
    (0.000, 0.900, 1.000, 1.000, 1.000, 0.00),  # C9
    (0.000, 0.221, 0.277, 0.423, 0.714, 1.79),  # C10
    (0.000, 0.031, 0.134, 0.394, 0.826, 1.14),  # C11
    (0.035, 0.026, 0.122, 0.302, 0.486, 0.99),  # C12
    (0.000, 0.031, 0.152, 0.442, 0.879, 2.36),  # C13
    (0.000, 0.348, 0.984, 1.000, 1.000, 0.00),  # C14
    (0.000, 0.016, 0.092, 0.405, 0.847, 2.50),  # C15
    (0.035, 0.026, 0.124, 0.337, 0.544, 1.06),  # C16
    (0.000, 0.460, 1.000, 1.000, 1.000, 0.00),  # C17
    (0.000, 0.033, 0.216, 0.602, 0.959, 2.50),  # C18
    (0.442, 0.617, 0.725, 0.873, 0.995, 1.00),  # C19
    (0.442, 0.340, 1.000, 1.000, 1.000, 0.00),  # C20
    (0.035, 0.026, 0.124, 0.318, 0.512, 1.02),  # C21
    (0.761, 0.570, 1.000, 1.000, 1.000, 0.00),  # C22
    (0.000, 0.434, 0.995, 1.000, 1.000, 0.00),  # C23
    (0.035, 0.055, 0.307, 0.564, 0.791, 1.52),  # C24
    (0.442, 0.258, 0.931, 1.000, 1.000, 0.00),  # C25
    (0.442, 0.074, 0.260, 0.487, 0.758, 1.50),  # C26
)
_TOPS = (1, 10, 100, 1000)

#: missing, zero or less, and seven quantiles of log(x + 1) of the positive values
_DENSE_FIT = (
    (0.452, 0.424, 0.69, 0.69, 1.39, 1.95, 2.71, 3.97, 6.05),  # I1
    (0.000, 0.276, 0.69, 1.10, 2.64, 4.22, 5.71, 7.86, 9.24),  # I2
    (0.212, 0.005, 0.69, 1.10, 1.95, 2.89, 3.81, 5.38, 11.09),  # I3
    (0.214, 0.055, 0.69, 1.10, 1.79, 2.40, 3.00, 3.74, 5.86),  # I4
    (0.026, 0.019, 2.89, 6.12, 7.96, 9.23, 10.45, 12.76, 14.54),  # I5
    (0.223, 0.066, 1.61, 2.48, 3.64, 4.73, 5.69, 7.24, 11.62),  # I6
    (0.042, 0.226, 0.69, 1.10, 1.95, 2.83, 3.81, 5.54, 8.78),  # I7
    (0.001, 0.114, 1.10, 1.61, 2.30, 3.09, 3.61, 3.89, 7.43),  # I8
    (0.042, 0.032, 1.39, 2.56, 3.74, 4.74, 5.60, 6.92, 9.16),  # I9
    (0.452, 0.476, 0.69, 0.69, 0.69, 0.69, 1.10, 1.39, 2.08),  # I10
    (0.042, 0.236, 0.69, 0.69, 1.10, 1.61, 2.20, 3.40, 4.81),  # I11
    (0.767, 0.744, 0.69, 0.69, 0.69, 1.39, 2.20, 3.83, 5.27),  # I12
    (0.214, 0.064, 0.69, 1.10, 1.79, 2.48, 3.09, 3.93, 7.36),  # I13
)
_QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
_SMALLEST_POSITIVE = float(np.log(2))  # log(x + 1) of x = 1

#: Steps of the tables; a step is far below the sampling error of the fit.
RANK_STEPS = 1024
DENSE_STEPS = 4096
_TAIL_POINTS = 4096


def rank_quantiles() -> NDArray[np.float64]:
    """[26, RANK_STEPS + 1] ranks by cumulative share: the inverse of each feature's frequencies.

    Between two steps ranks lie evenly. The integer part 0 is a missing value, r the r-th most
    frequent one.
    """
    shares = np.arange(RANK_STEPS + 1) / RANK_STEPS
    table = np.empty((len(_SPARSE_FIT), len(shares)))
    for row, fit, values in zip(table, _SPARSE_FIT, CRITEO_KAGGLE_CARDINALITIES, strict=True):
        missing, tops, exponent = fit[0], fit[1:5], fit[5]
        head = min(values, _TOPS[-1])
        ranks = np.arange(1, head + 1)
        knots = np.minimum(_TOPS, head)
        held = np.interp(np.log(ranks), np.log(knots), tops)
        if values > head and exponent:
            edges = np.geomspace(head, values, _TAIL_POINTS)
            density = np.sqrt(edges[1:] * edges[:-1]) ** -exponent
            mass = np.cumsum(density * np.diff(edges))
            ranks = np.append(ranks, edges[1:])
            held = np.append(held, tops[-1] + (1 - tops[-1]) * mass / mass[-1])
        present = np.concatenate(([0], held / held[-1])) * (1 - missing)
        share = np.concatenate(([0], missing + present))
        # Rank r takes [r, r + 1); what is missing takes [0, 1). The end itself is left out.
        ends = np.concatenate(([0, 1], ranks + 1))
        row[:] = np.minimum(np.interp(shares, share, ends), np.nextafter(ends[-1], 0))
    return table


def dense_quantiles() -> NDArray[np.float32]:
    """[13, DENSE_STEPS] values log(x + 1) of whole numbers x, by cumulative share."""
    table = np.zeros((len(_DENSE_FIT), DENSE_STEPS), np.float32)
    shares = (np.arange(DENSE_STEPS) + 0.5) / DENSE_STEPS
    for row, (missing, zero, *quantiles) in zip(table, _DENSE_FIT, strict=True):
        positive = (1 - missing) * (1 - zero)
        place = 1 - (1 - shares) / positive  # below 0: missing or zero
        logs = np.interp(place, _QUANTILES, [_SMALLEST_POSITIVE, *quantiles])
        row[:] = np.where(place > 0, np.log1p(np.round(np.expm1(logs))), 0)
    return table
