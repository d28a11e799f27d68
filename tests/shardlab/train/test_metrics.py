"""Metrics against torchmetrics and against hand-made cases."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from shardlab.train.metrics import (
    BinaryMetrics,
    ValidationMetrics,
    WindowMetrics,
    auc_of_counts,
    bin_scores_,
    exact_auc,
    label_entropy,
)

CPU = torch.device("cpu")
AUC_TOLERANCE = 1e-6  # what the validation AUC promises
BINNED_TOLERANCE = 5e-6  # half the share of pairs in one of 2^20 bins; see ValidationMetrics


def alone(_: Tensor) -> None:
    """The sum over the only rank."""


def clicks(rows: int, seed: int = 0, decimals: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits around -1 and labels that follow them; rounded logits repeat."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, generator=generator) - 1.0
    labels = (torch.rand(rows, generator=generator) < torch.sigmoid(logits)).float()
    return (logits if decimals is None else logits.round(decimals=decimals)), labels


def rank_auc(logits: Tensor, labels: Tensor) -> float:
    """AUC by its definition, over all pairs: sklearn's roc_auc_score in fp64."""
    positives, negatives = logits[labels == 1].double(), logits[labels == 0].double()
    difference = positives[:, None] - negatives[None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


@pytest.mark.parametrize("decimals", [None, 1, 0], ids=["distinct", "ties", "many_ties"])
def test_exact_auc_equals_pair_count(decimals: int | None) -> None:
    logits, labels = clicks(2000, decimals=decimals)
    assert exact_auc(logits, labels) == pytest.approx(rank_auc(logits, labels), abs=1e-12)
    torchmetrics = binary_auroc(logits.sigmoid().double(), labels.long())
    assert exact_auc(logits, labels) == pytest.approx(float(torchmetrics), abs=AUC_TOLERANCE)


@pytest.mark.parametrize(("labels", "auc"), [([0, 0, 1, 1], 1.0), ([1, 1, 0, 0], 0.0),
                                             ([0, 1, 0, 1], 0.75), ([1], math.nan), ([], math.nan)],
                         ids=["perfect", "inverted", "mixed", "one_class", "no_rows"])
def test_exact_auc_of_small_sets(labels: list[int], auc: float) -> None:
    found = exact_auc(torch.arange(len(labels)).float(), torch.tensor(labels).float())
    assert found == pytest.approx(auc, nan_ok=True)


def test_all_scores_equal_is_a_coin() -> None:
    assert exact_auc(torch.zeros(10), torch.arange(10) % 2) == 0.5


def test_bin_scores_counts_by_label_and_keeps_what_lies_outside() -> None:
    counts = torch.zeros(2, 32)
    logits = torch.tensor([-100.0, -16.0, 0.0, 0.5, 15.99, 100.0, math.nan, math.inf])
    bin_scores_(counts, logits, torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1]))
    assert counts.sum() == 8
    assert counts[0].nonzero().flatten().tolist() == [0, 16, 31]
    assert counts[1].nonzero().flatten().tolist() == [0, 16, 31]
    assert counts[1, 31] == 2


def test_binned_auc_counts_pairs_of_a_bin_half() -> None:
    assert auc_of_counts(torch.tensor([[1.0, 1.0], [0.0, 2.0]])) == pytest.approx(0.75)


def test_label_entropy() -> None:
    assert label_entropy(0.5) == pytest.approx(math.log(2))
    assert label_entropy(0.0) == label_entropy(1.0) == 0.0


def test_validation_metrics_against_definitions() -> None:
    logits, labels = clicks(3001)
    metrics = ValidationMetrics(CPU, alone, rank=0, world_size=1)
    for start in range(0, 3001, 500):
        metrics.add(logits[start:start + 500], labels[start:start + 500])
    found = metrics.result()
    probabilities = logits.double().sigmoid()
    loss = torch.nn.functional.binary_cross_entropy(probabilities, labels.double())
    rate = float(labels.double().mean())
    assert found.rows == 3001
    assert found.auc == pytest.approx(rank_auc(logits, labels), abs=AUC_TOLERANCE)
    assert found.logloss == pytest.approx(float(loss), rel=1e-6)
    assert found.ne == pytest.approx(float(loss) / label_entropy(rate), rel=1e-6)
    assert found.calibration == pytest.approx(float(probabilities.mean()) / rate, rel=1e-6)
    assert found.label_rate == pytest.approx(rate)


def test_validation_of_no_rows_is_undefined() -> None:
    metrics = ValidationMetrics(CPU, alone, rank=0, world_size=1)
    metrics.add(torch.empty(0), torch.empty(0))
    found = metrics.result()
    assert found.rows == 0
    assert all(math.isnan(value) for value in
               (found.auc, found.logloss, found.ne, found.calibration))


def test_validation_beyond_the_exact_rows_is_binned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ValidationMetrics, "EXACT_ROWS", 1000)
    logits, labels = clicks(20_000)
    metrics = ValidationMetrics(CPU, alone, rank=0, world_size=1)
    for start in range(0, 20_000, 700):
        metrics.add(logits[start:start + 700], labels[start:start + 700])
    assert metrics.result().auc == pytest.approx(exact_auc(logits, labels), abs=BINNED_TOLERANCE)


def joint_result(parts: list[tuple[Tensor, Tensor]]) -> list[BinaryMetrics]:
    """Every rank's result; ranks run in threads and meet at a barrier in each sum."""
    world = len(parts)
    meet, board = Barrier(world), [torch.empty(0)] * world

    def run(rank: int) -> BinaryMetrics:
        def reduce(tensor: Tensor) -> None:
            board[rank] = tensor.clone()
            meet.wait()
            tensor.copy_(sum(board))
            meet.wait()

        metrics = ValidationMetrics(CPU, reduce, rank, world)
        metrics.add(*parts[rank])
        return metrics.result()

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


@pytest.mark.parametrize("exact_rows", [10_000, 300], ids=["exact", "binned_on_one_rank"])
def test_validation_over_uneven_ranks_equals_one(monkeypatch: pytest.MonkeyPatch,
                                                 exact_rows: int) -> None:
    monkeypatch.setattr(ValidationMetrics, "EXACT_ROWS", exact_rows)
    logits, labels = clicks(600)
    cuts = [0, 500, 600, 600]  # the third rank has no row
    parts = [(logits[a:b], labels[a:b]) for a, b in pairwise(cuts)]
    results = joint_result(parts)
    tolerance = AUC_TOLERANCE if exact_rows == 10_000 else 1e-4  # one pair of 600 rows is 1e-5
    for found in results:
        assert found.rows == 600
        assert found.auc == pytest.approx(rank_auc(logits, labels), abs=tolerance)


def test_window_reports_the_interval_and_a_running_auc() -> None:
    window = WindowMetrics(CPU, alone)
    first, second = clicks(4000, seed=1), clicks(4000, seed=2)
    window.add(*first)
    assert window.flush().auc == pytest.approx(exact_auc(*first), abs=1e-4)
    window.add(second[0][:1000], second[1][:1000])
    window.add(second[0][1000:], second[1][1000:])
    found = window.flush()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(*second)
    assert found.rows == 4000
    assert found.logloss == pytest.approx(float(loss), rel=1e-6)
    assert abs(found.auc - exact_auc(*second)) > 1e-6  # the first interval still speaks
    assert found.auc == pytest.approx(exact_auc(
        torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])), abs=0.01)


def test_window_bins_early_when_many_rows_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clicks(5000)
    plain = WindowMetrics(CPU, alone)
    plain.add(*data)
    monkeypatch.setattr(WindowMetrics, "_MAX_PENDING", 100)
    early = WindowMetrics(CPU, alone)
    for start in range(0, 5000, 50):
        early.add(data[0][start:start + 50], data[1][start:start + 50])
    assert early.flush().auc == plain.flush().auc


def test_window_state_continues_bit_for_bit() -> None:
    window, resumed = WindowMetrics(CPU, alone), WindowMetrics(CPU, alone)
    window.add(*clicks(100))
    window.flush()
    resumed.load_state_dict(window.state_dict())
    for other in (window, resumed):
        other.add(*clicks(100, seed=3))
    assert window.flush() == resumed.flush()


def test_window_forgets_old_counts_entirely() -> None:
    window = WindowMetrics(CPU, alone)
    window.add(*clicks(100))
    for _ in range(250):
        window.flush()
    assert not window.state_dict()["history"].any()
