"""Rows of pruned tables in checkpoints: only those that are present, with what they are worth.

A `TableChunk` of a pruned table lists the rows of a range that have chunks. Weights and state are
those that any storage takes (absent chunks are what they read as, a per-row state is the mean of
the row's chunks). What only a pruned table takes lies beside them: which chunks are present, their
utilities, their own per-row states, the row that absent chunks share, with its states, and, in the
first chunk of a store's first shard, the sketch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.codecs import rounding_key
from shardlab.errors import CheckpointError
from shardlab.ops.chunk_index import ChunkRows
from shardlab.ops.chunk_marks import MARK
from shardlab.ops.records import Records
from shardlab.storage.base import TableChunk
from shardlab.storage.chunk_replay import fill_absent, mean_of_chunks
from shardlab.storage.chunk_start import chunk_numbers
from shardlab.storage.chunk_stores import NO_BUDGET, pruned_spec
from shardlab.storage.pruned_state import PrunedState
from shardlab.storage.rows import STATE_NAMES
from shardlab.storage_bytes import OPTIMIZER_STATE

_FP32_BYTES = 4
#: What readers need of every chunk: when it was decided on, and what absent rows read as.
_NOTED = ("threshold", "decided_at", "absent", "absent_states")
#: Rows that are filled up at a time, where a checkpoint lists the present ones.
_DENSE_ROWS = 1 << 14


@dataclass(frozen=True)
class RowContent:
    """What rows hold.

    Attributes:
        codes: int16 [n, chunks]: bits of utilities, -1 for absent chunks.
        weights: fp32 [n, columns].
        states: fp32 [n, chunks, elements].
    """

    codes: Tensor
    weights: Tensor
    states: Tensor

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return self.codes.nbytes + self.weights.nbytes + self.states.nbytes

    def pick(self, some: Tensor | slice) -> RowContent:
        """Some of the rows."""
        return RowContent(self.codes[some], self.weights[some], self.states[some])

    @staticmethod
    def cat(parts: Sequence[RowContent]) -> RowContent:
        """One behind the other; there is one at least."""
        if len(parts) == 1:
            return parts[0]
        return RowContent(torch.cat([one.codes for one in parts]),
                          torch.cat([one.weights for one in parts]),
                          torch.cat([one.states for one in parts]))


class ChunkFiles:
    """Streams the rows of pruned shards out and in.

    Args:
        pruned: whose rows.

    Attributes:
        pruned: whose rows.
    """

    def __init__(self, pruned: PrunedState) -> None:
        self.pruned = pruned
        self._loading = False
        self._identities: dict[int, int] = {}

    def settle(self) -> None:
        """Ends a load: chunks are moved together, as they were when they were saved."""
        if self._loading:
            self._loading = False
            for store in range(len(self.pruned.stores)):
                self.pruned.compact(store)

    # ------------------------------------------------------------------ out
    def chunks(self, max_bytes: int) -> Iterator[TableChunk]:
        """Ranges of rows that tile every shard; see `Storage.chunks`."""
        pruned = self.pruned
        for store in range(len(pruned.stores)):
            pruned.compact(store)
        for block, local in enumerate(pruned.shards):
            found, head = pruned.index.list_rows(block), self.head(block)
            step = max(1, max_bytes // (_FP32_BYTES * self.elements(block)))
            starts = [0, *found.rows[step::step].tolist()]
            for i, first in enumerate(starts):
                last = starts[i + 1] if i + 1 < len(starts) else local.shard.rows
                part = slice(i * step, min((i + 1) * step, found.rows.numel()))
                content = self.read(block, found.places[part], found.utilities[part])
                yield self.chunk(block, (first, last), found.rows[part], content,
                                 self.note(head) if i else head)

    def elements(self, block: int) -> int:
        """fp32 elements of a row of a shard and its state."""
        pruned = self.pruned
        per_column, per_row = OPTIMIZER_STATE[pruned.optimizer]
        return (1 + per_column) * pruned.shards[block].shard.columns \
            + per_row * pruned.pools.chunks(block)

    def read(self, block: int, places: Tensor, utilities: Tensor) -> RowContent:
        """Rows whose chunks lie at ``places`` int32 [n, chunks], with their utilities."""
        pools, (count, chunks) = self.pruned.pools, places.shape
        at = places.reshape(-1).long()
        here = (at >= 0).nonzero()[:, 0]
        records = Records(pools.arena, pools.blocks, block, at[here].to(pools.arena.device))
        parts = []
        for part in (records.read_rows().cpu(), records.read_states().cpu()):
            whole = torch.zeros(count * chunks, part.shape[1])
            parts.append(whole.index_copy_(0, here, part))
        codes = torch.where(places >= 0, utilities & (MARK - 1), -1).to(torch.int16)
        return RowContent(codes, parts[0].view(count, chunks * pools.width(block)),
                          parts[1].view(count, chunks, -1 if count else parts[1].shape[1]))

    def chunk(self, block: int, span: tuple[int, int], rows: Tensor, content: RowContent,
              head: dict[str, Tensor]) -> TableChunk:
        """A chunk of a table.

        Args:
            block: number of the shard.
            span: range of the shard's rows that it speaks of.
            rows: int64 [n], ascending, of the shard: those that are there.
            content: of them.
            head: `head`, or `note` of it.
        """
        pruned, local = self.pruned, self.pruned.shards[block]
        shard, width = local.shard, pruned.pools.width(block)
        per_column, per_row = OPTIMIZER_STATE[pruned.optimizer]
        weights, extra = content.weights, {"utilities": content.codes, **head}
        if "absent" in head:
            weights = fill_absent(weights, content.codes, head["absent"])
        if per_row:
            extra["row_states"] = content.states[:, :, per_column * width:].reshape(
                rows.numel(), pruned.pools.chunks(block) * per_row).contiguous()
        return TableChunk(local.table.name, shard.row_start + span[0], shard.col_start,
                          weights, self._split(content.states, width), False,
                          rows - span[0], span[1] - span[0], extra)

    def head(self, block: int) -> dict[str, Tensor]:
        """What a shard's first chunk tells of it, and, once for every store, of the store."""
        pruned = self.pruned
        store = int(pruned.index.blocks[block, 0])
        told = {"threshold": pruned.thresholds[block:block + 1].clone(),
                "decided_at": torch.tensor([pruned.since[store]]),
                "scale": pruned.scale[block:block + 1].clone(),
                "measured": pruned.measured[block:block + 1].clone(),
                "admitted": pruned.admitted[block:block + 1].clone(),
                "evicted": pruned.evicted[block:block + 1].clone(),
                "sketch_of": torch.tensor([self._identity(store)])}
        absent = pruned.absent.records(block)
        if absent is not None:
            told |= {"absent": absent.read_rows().cpu().flatten(),
                     "absent_states": absent.read_states().cpu()}
        if block == pruned.stores[store].blocks[0]:
            numbers = pruned.index.numbers(store)
            told |= {"sketch": pruned.index.sketch(store).clone(),
                     "budget": torch.tensor([numbers.budget]),
                     "refused": torch.tensor([numbers.refused])}
        return told

    @staticmethod
    def note(head: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the other chunks of a shard repeat of its head."""
        return {name: head[name] for name in _NOTED if name in head}

    def _split(self, states: Tensor, width: int) -> dict[str, Tensor]:
        """States [n, chunks, elements] by name: [n, columns], or [n], means of present chunks."""
        pruned, count = self.pruned, states.shape[0]
        per_column, _ = OPTIMIZER_STATE[pruned.optimizer]
        parts: dict[str, Tensor] = {}
        for number, name in enumerate(STATE_NAMES[pruned.optimizer]):
            if number < per_column:
                part = states[:, :, number * width:(number + 1) * width]
                parts[name] = part.reshape(count, states.shape[1] * width).contiguous()
            else:
                part = states[:, :, per_column * width + number - per_column]
                parts[name] = mean_of_chunks(part)
        return parts

    def _identity(self, store: int) -> int:
        """A number for what a sketch counts: the store's shards and size."""
        if store in self._identities:
            return self._identities[store]
        pruned = self.pruned
        plan = pruned.stores[store]
        parts = [(block, pruned.shards[block].table.name, vars(pruned.shards[block].shard))
                 for block in plan.blocks]
        found = zlib.crc32(repr((parts, plan.shape.layout)).encode())
        self._identities[store] = found
        return found

    # ------------------------------------------------------------------ in
    def begin_load(self) -> None:
        """Drops all chunks and what is known of absent ones."""
        pruned = self.pruned
        pruned.forget_changes()
        for store in range(len(pruned.stores)):
            none = torch.full((len(pruned.shards),), float("inf"))
            pruned.index.decide(store, 0.0, none, 0)
            pruned.index.compact(store, tight=True)
            pruned.index.sketch(store).zero_()
        pruned.index.take_losses()
        self._loading = True

    def load_chunk(self, chunk: TableChunk) -> None:
        """Writes the cells that lie in this storage's shards; see `Storage.load_chunk`.

        Raises:
            CheckpointError: the chunk's state is not this optimiser's; its absent rows share one,
                which this storage cannot hold.
        """
        wanted = STATE_NAMES[self.pruned.optimizer]
        if chunk.state and set(chunk.state) != set(wanted):
            raise CheckpointError(f"table {chunk.table!r}: checkpoint holds optimiser state "
                                  f"{sorted(chunk.state)}, {self.pruned.optimizer} needs "
                                  f"{sorted(wanted)}")
        for block, local in enumerate(self.pruned.shards):
            if local.table.name != chunk.table:
                continue
            shard = local.shard
            for part in self._as_read(block, chunk):
                top = max(shard.row_start, part.row_start)
                bottom = min(shard.row_end, part.row_start + part.num_rows)
                left = max(shard.col_start, part.col_start)
                right = min(shard.col_end, part.col_start + part.weights.shape[1])
                if top < bottom and left < right:
                    self._load(block, part, (top, bottom), (left, right))

    def _as_read(self, block: int, chunk: TableChunk) -> Iterator[TableChunk]:
        """A chunk as a shard can take it: with all rows, where no other way tells absent ones."""
        local = self.pruned.shards[block]
        spec = pruned_spec(local)
        if spec.shares_absent or not chunk.extra.get("absent", torch.zeros(1)).any():
            yield chunk
        elif spec.is_full:
            yield from chunk.dense(_DENSE_ROWS)
        else:
            raise CheckpointError(f"table {chunk.table!r}: absent rows of the checkpoint share a "
                                  "row, and read as zeros here; set absent: shared")

    def _load(self, block: int, chunk: TableChunk, rows: tuple[int, int],
              columns: tuple[int, int]) -> None:
        """Takes in the chunks of a rectangle of the table."""
        pruned, local = self.pruned, self.pruned.shards[block]
        width, shard = pruned.pools.width(block), local.shard
        if columns[0] % width or columns[1] % width:
            raise CheckpointError(f"table {chunk.table!r}: the checkpoint cuts columns at "
                                  f"{columns}, which are no multiples of chunks of {width}")
        present = torch.arange(chunk.weights.shape[0]) if chunk.present is None else chunk.present
        some = ((present + chunk.row_start >= rows[0])
                & (present + chunk.row_start < rows[1])).nonzero().flatten()
        first = (columns[0] - shard.col_start) // width
        count = (columns[1] - columns[0]) // width
        source = slice(columns[0] - chunk.col_start, columns[1] - chunk.col_start)
        weights = chunk.weights[some, source].reshape(-1, width)
        utilities, here = self._utilities(chunk, some, source, weights.view(some.numel(), count,
                                                                            width))
        places = torch.full((some.numel(), pruned.pools.chunks(block)), -1, dtype=torch.int32)
        places[:, first:first + count] = here.to(torch.int32) - 1
        codes = torch.zeros_like(places, dtype=torch.int16)
        codes[:, first:first + count] = utilities
        ids = present[some] + chunk.row_start - shard.row_start
        taken = self._insert(block, ids, places, codes, exact="utilities" in chunk.extra)
        at = taken[:, first:first + count].reshape(-1).long()
        kept = (at >= 0).nonzero().flatten()
        states = self._states(chunk, some, source, width).flatten(0, 1)
        self._write(block, ids, (first, count), kept, (at, weights, states))
        self._take_absent(block, chunk, source, first)
        self._take_store(block, chunk)

    def _utilities(self, chunk: TableChunk, some: Tensor, source: slice,
                   weights: Tensor) -> tuple[Tensor, Tensor]:
        """(codes int16 [n, chunks], which are present) of some rows and columns."""
        count, width = weights.shape[1:]
        saved = chunk.extra.get("utilities")
        grain = None if saved is None else chunk.weights.shape[1] // saved.shape[1]
        if saved is not None and grain == width:
            codes = saved[some, source.start // width:source.stop // width]
            return codes.clamp(min=0), codes >= 0
        reads = chunk.extra.get("absent", torch.zeros(chunk.weights.shape[1]))
        return (torch.zeros(weights.shape[0], count, dtype=torch.int16),
                (weights != reads[source].view(count, width)).any(2))

    def _insert(self, block: int, ids: Tensor, places: Tensor, codes: Tensor, *,
                exact: bool) -> Tensor:
        """Places; a pruned checkpoint's chunks all come in, others while there is room."""
        index, store = self.pruned.index, int(self.pruned.index.blocks[block, 0])
        budget = index.numbers(store).budget
        if exact:
            index.set_budget(store, NO_BUDGET)
        taken = index.insert(block, ChunkRows(ids, places, codes))
        index.set_budget(store, budget)
        return taken

    def _states(self, chunk: TableChunk, some: Tensor, source: slice, width: int) -> Tensor:
        """fp32 [n, chunks, elements]: states of some rows and columns; zeros where unknown."""
        pruned, count = self.pruned, (source.stop - source.start) // width
        per_column, per_row = OPTIMIZER_STATE[pruned.optimizer]
        states = torch.zeros(some.numel(), count, per_column * width + per_row)
        for number, name in enumerate(STATE_NAMES[pruned.optimizer] if chunk.state else ()):
            value = chunk.state[name]
            if number < per_column:
                states[:, :, number * width:(number + 1) * width] = \
                    value[some, source].reshape(-1, count, width)
            else:
                states[:, :, per_column * width + number - per_column] = value[some, None]
        saved = chunk.extra.get("row_states")
        if saved is not None and per_row and chunk.extra["utilities"].shape[1] * width \
                == chunk.weights.shape[1]:
            each = saved.view(saved.shape[0], saved.shape[1] // per_row, per_row)
            states[:, :, per_column * width:] = \
                each[some, source.start // width:source.stop // width]
        return states

    def _write(self, block: int, ids: Tensor, across: tuple[int, int], kept: Tensor,
               values: tuple[Tensor, Tensor, Tensor]) -> None:
        """Encodes weights and states of the chunks ``kept`` into their places."""
        pools, (first, count) = self.pruned.pools, across
        at, weights, states = values
        if not kept.numel():
            return
        device = pools.arena.device
        records = Records(pools.arena, pools.blocks, block, at[kept].to(device))
        numbers = chunk_numbers(pools, block, ids).view(ids.numel(), -1)
        mine = numbers[:, first:first + count].reshape(-1)[kept].to(device)
        words = records.words(rounding_key(self.pruned.clock.seed, self.pruned.clock.step),
                              mine)
        records.write_rows(weights[kept].to(device), words)
        if states.shape[1]:
            records.write_states(states[kept].to(device), words)

    def _take_absent(self, block: int, chunk: TableChunk, source: slice, first: int) -> None:
        """Takes over what absent chunks read as; states only if chunks are as wide there."""
        pruned, width = self.pruned, self.pruned.pools.width(block)
        absent = pruned.absent.records(block)
        if absent is None or "absent" not in chunk.extra:
            return
        values = chunk.extra["absent"][source].view(-1, width)
        states, elements = chunk.extra["absent_states"], absent.read_states().shape[1]
        if chunk.state and states.shape[0] * width == chunk.weights.shape[1]:
            states = states[source.start // width:source.stop // width]
        else:
            states = torch.zeros(values.shape[0], elements)
        pruned.absent.write(block, pruned.clock.seed, first, values, states)

    def _take_store(self, block: int, chunk: TableChunk) -> None:
        """Takes over what decisions left; what counts for a store only if its shards are these."""
        pruned, extra = self.pruned, chunk.extra
        store = int(pruned.index.blocks[block, 0])
        if "threshold" in extra:
            pruned.thresholds[block] = extra["threshold"][0]
            pruned.since[store] = int(extra["decided_at"])
        if "sketch_of" not in extra or int(extra["sketch_of"]) != self._identity(store):
            return
        for name, kept in (("scale", pruned.scale), ("measured", pruned.measured),
                           ("admitted", pruned.admitted), ("evicted", pruned.evicted)):
            if name in extra:
                kept[block] = extra[name][0]
        if "refused" in extra:
            pruned.index.set_refused(store, int(extra["refused"]))
        if "sketch" in extra:
            pruned.index.sketch(store).copy_(extra["sketch"])
            pruned.index.set_budget(store, int(extra["budget"]))
