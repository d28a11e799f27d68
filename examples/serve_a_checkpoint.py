"""Save behind training, save what changed, look inside, and serve int8 rows on a CPU.

    python examples/serve_a_checkpoint.py

The same from a shell: `shardlab inspect`, `shardlab compact`, `shardlab export`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import shardlab as sl
from shardlab.inspection import table_stats
from shardlab.train import CheckpointReader, CheckpointWriter, SaveOptions, compact

ROWS = {"C1": 1_460, "C3": 20_000, "C14": 27}


def main() -> None:
    """Trains, saves twice, merges, exports, and compares what is served with what was trained."""
    groups = sl.comm.init()
    tables = [sl.EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=16)
              for name, rows in ROWS.items()]
    torch.manual_seed(0)
    model, optimizer = sl.shard(
        sl.models.DLRM(sl.EmbeddingBagCollection(tables), 13, bottom_mlp=[32, 16], top_mlp=[32]),
        optimizer=sl.optim.RowWiseAdagrad(lr=0.05), groups=groups)
    reader = sl.data.build_reader(sl.data.SourceSpec("synthetic_criteo", ROWS), batch_size=256,
                                  start=0, stop=5_120)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(own)
        writer = CheckpointWriter(model, optimizer, groups,
                                  SaveOptions(background=True, incremental=True))
        writer.save(folder / "step-0")          # training goes on while this is written
        for batch in reader:
            optimizer.zero_grad()
            logits = model(batch.dense, batch.sparse)
            binary_cross_entropy_with_logits(logits, batch.labels).backward()
            optimizer.step()
        newest = writer.save(folder / "step-20")
        writer.finish()
        full, changed = (sum(file.stat().st_size for file in path.iterdir())
                         for path in (folder / "step-0", newest))
        print(f"what changed in 20 steps is {changed / full:.0%} of a full checkpoint")
        compact(newest)                          # step-20 no longer needs step-0

        reader_of = CheckpointReader(newest)
        stats = table_stats(reader_of, reader_of.table("C3"))
        print(f"C3: {stats.dead_rows:,} of {stats.rows:,} rows never got a gradient")

        sl.interop.export(newest, folder / "served", "safetensors", quantize="int8")
        served = sl.inference.load(folder / "served")
        ids, offsets = served.split(batch.sparse)
        exported = torch.export.export(served, (ids, offsets))
        with torch.no_grad():
            pooled = torch.cat(list(exported.module()(ids, offsets).values()), 1)
            trained = model.collections()["ebc"](batch.sparse).values()
        print(f"served int8 rows differ by at most {float((pooled - trained).abs().max()):.1e}")
    sl.comm.shutdown()


if __name__ == "__main__":
    main()
