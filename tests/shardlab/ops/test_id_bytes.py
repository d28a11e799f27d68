"""Ids in bytes: every width, both faces, and what their last row needs."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.id_bytes import pack_bytes, unpack_bytes
from shardlab.ops.registry import native
from shardlab.wire_bytes import cell_bytes, id_bytes
from tests.shardlab.ops.cases import face

FACES = ["reference", *(["native"] if native() else [])]


@pytest.mark.parametrize("which", FACES)
def test_ids_come_back(which):
    pieces, back, parts, first, start = [], [], [], 0, 0
    for width in range(1, 8):
        last = 256**width - 1
        ids = torch.tensor([0, 1, last // 3, last - 1, last]) + 1000 * width
        parts.append(ids)
        pieces.append([start, 5, 1000 * width, first, width])
        back.append([first, 5, width, start])
        first, start = first + 5 * width, start + 5
    pieces.append([start, 0, 0, first, 3])
    with face(which):
        packed = pack_bytes(torch.cat(parts), torch.tensor(pieces), first)
        found = unpack_bytes(packed, torch.tensor(back), start)
    expected = torch.cat([part - 1000 * (i + 1) for i, part in enumerate(parts)])
    assert torch.equal(found, expected)
    assert packed[:5].tolist() == [0, 1, 85, 254, 255]  # one byte an id, in order
    assert packed[5 + 8:5 + 10].tolist() == [255, 255]  # little-endian


def test_no_ids():
    none = torch.empty(0, dtype=torch.int64)
    assert pack_bytes(none, torch.empty(0, 5, dtype=torch.int64), 0).numel() == 0


@pytest.mark.parametrize(("rows", "expected"), [
    (1, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (2**24, 3), (2**24 + 1, 4), (2**32, 4),
    (2**32 + 1, 5), (2**40, 5)])
def test_bytes_of_an_id_hold_the_last_row(rows, expected):
    assert id_bytes(rows) == expected


def test_cells_end_at_whole_words():
    assert [cell_bytes(n, 65) for n in range(5)] == [0, 68, 132, 196, 260]


def test_misread_ids_are_refused():
    with pytest.raises(TypeError, match=r"ids: expected a contiguous torch.int64 tensor"):
        pack_bytes(torch.tensor([1], dtype=torch.int32), torch.empty(0, 5, dtype=torch.int64), 0)
