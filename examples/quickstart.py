"""The README's quick start: a DLRM over four tables, on generated clicks.

    python examples/quickstart.py
"""

from torch.nn.functional import binary_cross_entropy_with_logits as bce

import shardlab as sl

spec = sl.data.SourceSpec("synthetic_criteo", {"C1": 1_460, "C3": 1_000_000, "C9": 3, "C14": 27})
tables = [sl.EmbeddingBagConfig(n, embedding_dim=8, name=f) for f, n in spec.features.items()]
model = sl.models.DLRM(sl.EmbeddingBagCollection(tables), 13, bottom_mlp=[64, 8], top_mlp=[64])
model, optimizer = sl.shard(model, optimizer=sl.optim.RowWiseAdagrad(lr=0.05))
for batch in (b.to(model.groups.device) for b in sl.data.build_reader(spec, 1024, stop=204_800)):
    loss = bce(model(batch.dense, batch.sparse), batch.labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f}, tables {model.collections()['ebc'].tier_bytes().total:,} bytes")
