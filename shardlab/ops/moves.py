"""Moves rows with their optimiser states between blocks, from one precision to another.

What a cache level does to fill a slot and to write it back. Source: own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.ops.records import MoveEnd
from shardlab.ops.registry import address, check_tensor, face_of, native


def move_rows(source: MoveEnd, target: MoveEnd, segments: Tensor, key: int = 0,
              rows: Tensor | None = None) -> None:
    """Copies records, payload and state, and converts them where the ends' codecs differ.

    Equal codecs copy bytes. Else a record is decoded and encoded as the target's encoding says.

    Args:
        source: where records come from.
        target: where they go; no two go to the same place.
        segments: int64 [K, 4] on CPU: (source block, target block, start, count): records
            [start, start + count) of both lists of places. Both blocks have the same columns and
            kinds of state.
        key: of the random bits, `shardlab.codecs.rounding_key`.
        rows: int64 [n], row of the whole table of every record; None: the target's row start +
            place.

    Raises:
        TypeError: places or rows that a kernel would misread.
        ValueError: blocks without encodings.
    """
    for name, end in (("source", source), ("target", target)):
        check_tensor(f"{name}.places", end.places, torch.int64)
        if end.blocks.encodings is None:
            raise ValueError(f"move_rows: the {name}'s blocks have no encodings; build them with "
                             "Blocks.build")
    if rows is not None:
        check_tensor("rows", rows, torch.int64)
    device = target.arena.device
    face = face_of("move_rows", device.type) if source.arena.device == device else "reference"
    if face == "native":
        ends = [[address(end.arena), address(end.blocks.table), address(end.blocks.encodings),
                 address(end.places)] for end in (source, target)]
        native().move_rows(*ends, address(segments), segments.shape[0],  # type: ignore[union-attr]
                           key, address(rows), torch.get_num_threads())
    elif face == "triton":
        from shardlab.ops.triton import encoded as kernels

        kernels.move_rows(source, target, segments, key, rows)
    else:
        move_rows_reference(source, target, segments, key, rows)


def move_rows_reference(source: MoveEnd, target: MoveEnd, segments: Tensor, key: int = 0,
                        rows: Tensor | None = None) -> None:
    """Plain-torch face of `move_rows`; the ends may lie on different devices."""
    for source_block, target_block, start, count in segments.tolist():
        old, new = source.part(source_block, start, count), target.part(target_block, start, count)
        words = new.words(key, None if rows is None else rows[start:start + count])
        device = new.arena.device
        if old.encoding.codec == new.encoding.codec:
            payloads = old.blocks.payloads(old.arena, old.block)[old.places]
            new.blocks.payloads(new.arena, new.block)[new.places] = payloads.to(device)
        else:
            new.write_rows(old.read_rows().to(device), words)
        if old.encoding.state_codec == new.encoding.state_codec:
            states = old.blocks.states(old.arena, old.block)[old.places]
            new.blocks.states(new.arena, new.block)[new.places] = states.to(device)
        else:
            new.write_states(old.read_states().to(device), words)
