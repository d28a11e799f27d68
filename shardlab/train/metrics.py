"""Quality of click predictions: AUC, logloss, normalised entropy (NE), calibration.

    AUC          chance that a positive scores above a negative (ties count half)
    logloss      mean binary cross-entropy, in nats
    NE           logloss / entropy of the label rate: below 1 beats a constant
    calibration  mean prediction / label rate: 1 is neither over- nor under-confident

AUC comes from counts of positives and negatives per score bin. With one bin per distinct score
it is exact; with fixed bins, pairs inside one bin count half, an error of at most half their
share of all pairs. Counts of ranks add up, so every metric is global after one sum over ranks.

Source: NE and calibration as in He et al., "Practical Lessons from Predicting Clicks on Ads at
Facebook", ADKDD 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shardlab.train.collected import Collected

#: Sums a tensor over all ranks in place.
Reduce = Callable[[Tensor], object]

_LOGIT_LIMIT = 16.0  # sigmoid(16) is 1 - 1.1e-7: beyond it, fp32 probabilities do not differ


@dataclass(frozen=True)
class BinaryMetrics:
    """Metrics of a set of predictions; NaN where undefined (no rows, or one class only)."""

    rows: int
    auc: float
    logloss: float
    ne: float
    calibration: float
    label_rate: float


@dataclass(frozen=True)
class ScoreSums:
    """Sums over predictions, from which all but AUC follows."""

    rows: float
    labels: float
    predictions: float
    loss: float

    def metrics(self, auc: float) -> BinaryMetrics:
        """Means and ratios of the sums."""
        if not self.rows:
            return BinaryMetrics(0, auc, math.nan, math.nan, math.nan, math.nan)
        rate, logloss = self.labels / self.rows, self.loss / self.rows
        entropy = label_entropy(rate)
        return BinaryMetrics(
            rows=round(self.rows), auc=auc, logloss=logloss,
            ne=logloss / entropy if entropy else math.nan,
            calibration=self.predictions / self.labels if self.labels else math.nan,
            label_rate=rate)


def label_entropy(rate: float) -> float:
    """Entropy in nats of a label that is 1 with probability ``rate``: a constant's logloss."""
    if not 0.0 < rate < 1.0:
        return 0.0
    return -rate * math.log(rate) - (1.0 - rate) * math.log1p(-rate)


def sum_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """The four sums of `ScoreSums` as fp64 [4], in its order, of logits [n] and labels [n]."""
    logits, labels = logits.float(), labels.float()
    loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    sums = [labels, torch.sigmoid(logits), loss]
    return torch.stack([logits.new_full((), logits.numel(), dtype=torch.float64),
                        *(values.sum(dtype=torch.float64) for values in sums)])


def bin_scores_(counts: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Adds scores to counts of negatives and positives per bin of the logit, in place.

    Bins have equal width over logits [-16, 16); what lies outside falls into the end bins, and
    NaN into the middle (the logloss of the same scores is NaN and tells).

    Args:
        counts: [2, bins] of negatives and positives, fp32 (exact up to 2^24) or int64.
        logits: [n] floating point.
        labels: [n]; above 0.5 is a positive.
    """
    bins = counts.shape[1]
    scaled = (logits.float().nan_to_num(nan=0.0) + _LOGIT_LIMIT) * (bins / (2.0 * _LOGIT_LIMIT))
    places = scaled.clamp_(0, bins - 1).long()
    places += (labels > 0.5) * bins
    # Integer-valued sums: exact in any order, so this is deterministic on every device.
    counts.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=counts.dtype))


def auc_of_counts(counts: Tensor) -> float:
    """AUC of negatives and positives per ascending score bin, [2, bins]; NaN with one class."""
    # CUDA has a deterministic cumsum for integers only; the host sums fading counts.
    negatives, positives = counts.double().cpu() if counts.is_floating_point() else counts
    pairs = float(negatives.sum()) * float(positives.sum())
    if not pairs:
        return math.nan
    below = negatives.cumsum(0).double() - 0.5 * negatives.double()
    return float((positives.double() * below).sum()) / pairs


def exact_auc(logits: Tensor, labels: Tensor) -> float:
    """Rank AUC of logits [n] and labels [n] (above 0.5: positive), ties counting half."""
    values, places = torch.unique(logits, return_inverse=True)
    places = places + (labels > 0.5) * values.numel()
    return auc_of_counts(torch.bincount(places, minlength=2 * values.numel()).view(2, -1))


class WindowMetrics:
    """Metrics of the training batches since the last flush, with a running AUC.

    AUC is over a window that fades: each flush keeps `KEEP` of the older counts, so about the
    last 1 / (1 - KEEP) = 10 flushes speak. Steps only collect; the work is done at a flush, on
    the tensors' device, without waiting for it in between.

    Args:
        device: device of logits and labels.
        reduce: sums a tensor over all ranks in place; every rank flushes at the same steps.
    """

    KEEP = 0.9
    BINS = 1 << 16
    _FORGOTTEN = 1e-6  # a fading count below this is dropped
    _MAX_PENDING = 1 << 20  # rows collected before they are binned early, to bound memory

    def __init__(self, device: torch.device, reduce: Reduce) -> None:
        self._reduce = reduce
        self._history = torch.zeros(2, self.BINS, device=device)
        self._counts = torch.zeros_like(self._history)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._pending = Collected(2, device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Takes one batch: logits [b] and labels [b]."""
        self._pending.add(logits, labels)
        if self._pending.rows >= self._MAX_PENDING:
            self._bin_pending()

    def _bin_pending(self) -> None:
        if self._pending.rows:
            bin_scores_(self._counts, *self._pending.all())
            self._sums += sum_scores(*self._pending.all())
            self._pending.clear()

    def flush(self) -> BinaryMetrics:
        """Metrics over all ranks of what was added since the last flush; AUC of the window."""
        self._bin_pending()
        self._reduce(self._counts)
        self._reduce(self._sums)
        # Old counts end at zero, not as denormal numbers, which are a hundred times slower.
        torch.threshold_(self._history.mul_(self.KEEP), self._FORGOTTEN, 0.0).add_(self._counts)
        metrics = ScoreSums(*self._sums.tolist()).metrics(auc_of_counts(self._history))
        self._counts.zero_()
        self._sums.zero_()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """The window, for a checkpoint right after a flush."""
        return {"history": self._history}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes a window back."""
        self._history.copy_(state["history"])


class ValidationMetrics:
    """Metrics of a validation pass: AUC exact up to `EXACT_ROWS` rows a rank, binned beyond.

    With more rows on any rank, scores are counted in `BINS` bins of the logit, 3e-5 wide. For
    logits with a standard deviation of 1 or more, fewer than one pair in 10^5 then shares a bin,
    which bounds the error by 5e-6 (and in practice such pairs cancel).

    Args:
        device: device of logits and labels.
        reduce: sums a tensor over all ranks in place.
        rank: this rank.
        world_size: ranks.
    """

    EXACT_ROWS = 1 << 22
    BINS = 1 << 20

    def __init__(self, device: torch.device, reduce: Reduce, rank: int, world_size: int) -> None:
        self._device, self._reduce = device, reduce
        self._rank, self._world_size = rank, world_size
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._scores = Collected(2, device)
        self._counts: Tensor | None = None

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Takes one batch: logits [b] and labels [b]."""
        self._sums += sum_scores(logits, labels)
        self._scores.add(logits, labels)
        if self._scores.rows > self.EXACT_ROWS:
            self._bin_rows()

    def _bin_rows(self) -> Tensor:
        if self._counts is None:
            self._counts = torch.zeros(2, self.BINS, dtype=torch.int64, device=self._device)
        if self._scores.rows:
            bin_scores_(self._counts, *self._scores.all())
        self._scores.clear()
        return self._counts

    def result(self) -> BinaryMetrics:
        """Metrics over all ranks; every rank must call it once, and gets the same."""
        sizes = torch.zeros(self._world_size, 2, dtype=torch.int64, device=self._device)
        sizes[self._rank, 0] = self._scores.rows
        sizes[self._rank, 1] = self._counts is not None
        self._reduce(sizes)
        self._reduce(self._sums)
        auc = self._binned_auc() if sizes[:, 1].any() else self._exact_auc(sizes[:, 0].tolist())
        return ScoreSums(*self._sums.tolist()).metrics(auc)

    def _binned_auc(self) -> float:
        counts = self._bin_rows()
        self._reduce(counts)
        return auc_of_counts(counts)

    def _exact_auc(self, rows: list[int]) -> float:
        """Places this rank's scores in its slice of a zero buffer; the sum joins all ranks'."""
        joined = torch.zeros(2, sum(rows), device=self._device)
        start = sum(rows[:self._rank])
        joined[:, start:start + self._scores.rows] = self._scores.all()
        self._reduce(joined)
        return exact_auc(joined[0], joined[1])
