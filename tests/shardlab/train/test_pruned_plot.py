"""The picture of pruned tables."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from shardlab.train.pruned_plot import write_pruned_plot


def _record(step, present):
    return {"kind": "pruned", "step": step, "present": {"a & b": present, "c": 1},
            "rows_by_chunks": {"1": 3, "2": present}, "bytes": 100 * step}


def test_every_table_is_a_line(tmp_path):
    metrics, target = tmp_path / "metrics.jsonl", tmp_path / "pruned.svg"
    records = [_record(10, 5), {"kind": "train", "step": 10}, _record(20, 9)]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_pruned_plot(metrics, target)
    tree = ElementTree.parse(target)
    texts = [node.text for node in tree.iter() if node.text]
    assert {"a & b", "c", "1 chunks", "2 chunks", "held", "step 10", "20"} <= set(texts)
    lines = [node for node in tree.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 5


def test_nothing_is_drawn_without_pruned_tables(tmp_path):
    metrics, target = tmp_path / "metrics.jsonl", tmp_path / "pruned.svg"
    metrics.write_text('{"kind": "train", "step": 1}\n')
    write_pruned_plot(metrics, target)
    assert not target.exists()
