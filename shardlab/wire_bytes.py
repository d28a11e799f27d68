"""Bytes of the exchange: the arithmetic that planner and runtime share.

Ids travel as rows of their shard, in the fewest bytes that its last row needs. Rows and gradients
travel in cells, one per (asking rank, shard): encoded rows one behind the other, filled up to whole
words so that the next cell's fp32 rows are aligned.
"""

from __future__ import annotations

from shardlab.storage_bytes import payload_bytes

#: Cells begin at whole words.
WORD_BYTES = 4
#: A number of a message's head: batch size, bag length, bytes of a length, weighted; then counts.
HEAD_NUMBER_BYTES = 4
HEAD_NUMBERS = 4
#: Gradient codecs that cannot hold every fp32 exponent -> log2 of the largest magnitude that the
#: scaled gradients of a message may reach. fp16 saturates at 65504; the scales of the others at 56
#: (fp8: 32), which times 448, 57344, 127 and 7 is 2^13.8, 2^20.8, 2^12.8 and 2^8.6.
SCALED_GRADIENTS = {"fp16": 15, "fp8": 13, "fp8_e5m2": 20, "int8": 12, "int4": 8}
#: Gradients of hot rows are added up as fp32, with one number a row beside them: who touched it.
FP32_BYTES, HOT_MARKS = 4, 1
#: In front of a message of gradients with such a codec: the scale, fp32.
SCALE_BYTES = 4
#: Gradients of the dense part travel in spans of so many elements, each with a power of two of its
#: own, a byte -> log2 of what the largest of a span may reach. bf16 takes any.
SPAN_ELEMENTS, POWER_BYTES = 256, 1
SPAN_LIMITS = {**SCALED_GRADIENTS, "bf16": 15}


def id_bytes(rows: int) -> int:
    """Bytes of an id of a shard with so many rows: 1 up to 256 rows, 2 up to 65536, ..."""
    return max(1, ((rows - 1).bit_length() + 7) // 8)


def cell_bytes(vectors: int, vector_bytes: int) -> int:
    """Bytes of a cell of ``vectors`` encoded rows of ``vector_bytes`` each."""
    return -(-vectors * vector_bytes // WORD_BYTES) * WORD_BYTES


def span_bytes(codec: str) -> int:
    """Bytes of an encoded span of dense gradients."""
    return payload_bytes(codec, SPAN_ELEMENTS) + POWER_BYTES


def dense_element_bytes(codec: str) -> float:
    """Bytes that a dense gradient's element takes on the wire, in one direction."""
    return FP32_BYTES if codec == "fp32" else span_bytes(codec) / SPAN_ELEMENTS


def ring_bytes(size: int, world_size: int) -> int:
    """Bytes that a rank sends where so many are added up over all in a ring, rounded up."""
    return -(-2 * (world_size - 1) * size // world_size)
