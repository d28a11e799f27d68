"""The tensor-train storage: bytes, starts, checkpoints, precision, and what an update promises."""

from __future__ import annotations

import math

import pytest
import torch

import shardlab as sl
from shardlab.errors import CheckpointError, ConfigError
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train import materialise
from shardlab.ops.tensor_train_svd import decompose
from shardlab.ops.unique import Segments, unique_segments
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage import LocalShard, StorageOptions, TableChunk, build_storage
from shardlab.storage.tensor_train_init import TAIL_VARIANCE, core_scale
from shardlab.storage_bytes import OPTIMIZER_STATE, tier_bytes
from shardlab.table_plan import Shard, build_table_plan

CPU = torch.device("cpu")
STORAGE = {"kind": "tensor_train", "rank": 6}
#: Row factors of the paper for 10,131,227 rows, of which the first has 185 digits in use.
PAPER = {"kind": "tensor_train", "rank": 16, "row_factors": [200, 220, 250],
         "column_factors": [2, 2, 4]}


def table_of(rows=1000, columns=16, **changes):
    return EmbeddingBagConfig(num_embeddings=rows, embedding_dim=columns, name="t",
                              storage={**STORAGE, **changes})


def storage_of(table, optimizer="adagrad", seed=1, kind=ShardingType.TABLE_WISE, ranks=(0,),
               rank=0):
    plan = build_table_plan(table, kind, list(ranks))
    shards = [LocalShard(table, shard, plan.storage, plan.replicated) for shard in plan.shards
              if shard.rank == rank]
    return build_storage(shards, StorageOptions(optimizer, seed, CPU))


def step_of(kind="adagrad", **changes):
    return StepParameters(kind, lr=0.1, eps=1e-8, beta1=0.9, beta2=0.999, bias1=0.1, bias2=0.001,
                          **changes)


def uniques_of(ids, rows, columns):
    chunks = torch.tensor([[0, 0, len(ids), 0, columns]])
    return unique_segments(torch.tensor(ids, dtype=torch.int64), chunks,
                           Segments(torch.tensor([rows]), torch.tensor([0])))


def update(storage, ids, grads, step=None):
    table = storage.shards[0].shard
    storage.update(uniques_of(ids, table.rows, table.columns), None, grads.reshape(-1),
                   step or step_of(storage.optimizer))


def rows_of(storage):
    """All rows of the only shard."""
    (chunk,) = storage.chunks(1 << 20)
    return torch.cat([part.weights for part in chunk.dense(333)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZER_STATE))
def test_bytes_are_what_is_allocated_and_planned(dtype, optimizer):
    table = table_of(dtype=dtype)
    storage = storage_of(table, optimizer)
    spec = storage.shards[0].storage
    held = sum(memory.data.numel() for memory in storage.memories)
    assert storage.tier_bytes().hbm == held == tier_bytes(spec, 1000, 16, optimizer).total
    shape = spec.piece_shape(1000, 16)
    assert tier_bytes(spec, 1000, 16, "sgd").total == \
        shape.parameters * (4 if dtype == "fp32" else 2)


def test_digits_that_no_row_has_are_not_kept():
    table = EmbeddingBagConfig(num_embeddings=10_131_227, embedding_dim=16, name="t",
                               storage=PAPER)
    plan = build_table_plan(table, ShardingType.ROW_WISE, [0, 1])
    assert plan.storage.row_factors == (185, 220, 250)
    assert [shard.row_start for shard in plan.shards] == [0, 92 * 55_000]
    assert plan.storage.resolve(10_131_227, 16) == plan.storage


@pytest.mark.parametrize("init", ["isometric", "sampled_gaussian", "gaussian", "uniform"])
@pytest.mark.parametrize("rank", [8, 32])
def test_products_start_like_rows_of_a_plain_table(init, rank):
    table = table_of(rows=20_000, rank=rank, init=init)
    entries = rows_of(storage_of(table)).double()
    wanted = 1 / (3 * 20_000)
    assert entries.mean().abs() < 0.02 * math.sqrt(wanted)
    # Slices are few: the variance of a whole table varies by some percent with the draw.
    assert entries.var().item() == pytest.approx(wanted, rel=0.15)
    assert divergence(entries.view(-1) / math.sqrt(wanted)) < {
        "isometric": 0.02, "sampled_gaussian": 0.02, "uniform": 0.04, "gaussian": 0.12}[init]


def divergence(values):
    """KL divergence of a histogram of the values to a standard normal."""
    edges = torch.linspace(-4, 4, 81, dtype=torch.float64)
    found = torch.histc(values, 80, -4, 4) / values.numel()
    normal = torch.special.ndtr(edges).diff()
    inside = found > 0
    return float((found[inside] * (found[inside] / normal[inside]).log()).sum())


def test_sampled_start_is_closer_to_a_gaussian_than_the_others():
    found = {init: divergence(rows_of(storage_of(table_of(rows=20_000, rank=8, init=init)))
                              .double().view(-1) * math.sqrt(3 * 20_000))
             for init in ("sampled_gaussian", "gaussian", "uniform")}
    assert found["sampled_gaussian"] < found["uniform"] < found["gaussian"]


def test_the_published_scale_is_wrong_by_the_paths():
    """Scaling every core by (1/sqrt(3n))^(1/3) alone makes products larger by r1 r2 v^3."""
    table = table_of(rows=20_000, rank=8, init="sampled_gaussian")
    storage = storage_of(table)
    shape = storage.trains[0].cores.shape
    ours = core_scale(shape, 1 / 60_000) / math.sqrt(TAIL_VARIANCE)
    published = (1 / math.sqrt(60_000)) ** (1 / 3)
    factor = (published / ours) ** 6
    assert factor == pytest.approx(8 * 8 * TAIL_VARIANCE**3, rel=1e-3)
    measured = rows_of(storage).double().var().item() * factor
    assert measured > 1000 / 60_000


def test_start_needs_centred_bounds():
    table = EmbeddingBagConfig(num_embeddings=10, embedding_dim=4, name="t", storage=STORAGE,
                               weight_init_min=0.0, weight_init_max=1.0)
    with pytest.raises(ConfigError, match="starts centred on zero"):
        storage_of(table)


@pytest.mark.parametrize("kind", [ShardingType.ROW_WISE, ShardingType.COLUMN_WISE])
def test_shards_start_from_the_table(kind):
    table = table_of(columns=16)
    whole = rows_of(storage_of(table))
    for rank in (0, 1):
        storage = storage_of(table, kind=kind, ranks=(0, 1), rank=rank)
        shard = storage.shards[0].shard
        part = whole[shard.row_start:shard.row_end, shard.col_start:shard.col_end]
        torch.testing.assert_close(rows_of(storage), part, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", list(OPTIMIZER_STATE))
def test_every_slice_that_an_id_touches_moves(optimizer):
    """The public kernel leaves out slices beyond the core's width: here all move, and only they."""
    table = EmbeddingBagConfig(num_embeddings=11_000_000, embedding_dim=16, name="t",
                               storage={**PAPER, "rank": 8})
    storage = storage_of(table, optimizer)
    cores = storage.trains[0].cores
    before = [cores.read_core(core).clone() for core in range(3)]
    ids = sorted({i * 55_000 + (i % 220) * 250 + (i * 7 + 3) % 250 for i in range(1, 200)}
                 | {i * 250 + i for i in range(220)} | {10_999_999})
    generator = torch.Generator().manual_seed(0)
    update(storage, ids, torch.randn(len(ids), 16, generator=generator))
    digits = [torch.tensor(ids) // 55_000, torch.tensor(ids) // 250 % 220, torch.tensor(ids) % 250]
    for core, digit in enumerate(digits):
        moved = (cores.read_core(core) != before[core]).any(1)
        assert bool(moved[digit.unique()].all())
        assert int(moved.sum()) == digit.unique().numel()


def test_products_of_the_read_serve_the_update():
    """Same result whether the update finds the read's products or computes them."""
    ids = [3, 17, 18, 500, 999]
    grads = torch.ones(len(ids), 16)
    results = []
    for read in (True, False):
        storage = storage_of(table_of())
        if read:
            storage.read_scattered(uniques_of(ids, 1000, 16), None, torch.empty(len(ids) * 16))
        update(storage, ids, grads)
        results.append(rows_of(storage))
    assert torch.equal(*results)


def test_reads_give_rows_in_any_order_with_repetitions():
    storage = storage_of(table_of())
    whole = rows_of(storage)
    ids = torch.tensor([999, 0, 5, 5, 0, 7])
    out = torch.full((6 * 16,), torch.nan)
    segments = torch.tensor([[0, 0, 3, 48], [0, 3, 3, 0]])
    storage.read(segments, ids, out)
    assert torch.equal(out.view(6, 16), whole[[5, 0, 7, 999, 0, 5]])
    storage.read(torch.empty(0, 4, dtype=torch.int64), ids[:0], out[:0])


def test_an_update_without_ids_changes_nothing():
    storage = storage_of(table_of(), "adam")
    before = rows_of(storage)
    empty = uniques_of([], 1000, 16)
    storage.update(empty, None, torch.empty(0), step_of("adam"))
    assert torch.equal(rows_of(storage), before)


@pytest.mark.parametrize("optimizer", ["sgd", "row_wise_adagrad", "adam"])
def test_bf16_cores_follow_fp32_ones(optimizer):
    generator = torch.Generator().manual_seed(1)
    whole = {}
    for dtype in ("fp32", "bf16"):
        storage = storage_of(table_of(dtype=dtype, init="gaussian"), optimizer)
        for number in range(20):
            storage.begin_step(number + 1)
            ids = torch.unique(torch.randint(1000, (64,), generator=generator)).tolist()
            grads = 0.01 * torch.randn(len(ids), 16, generator=generator)
            update(storage, ids, grads)
        whole[dtype] = rows_of(storage)
        generator.manual_seed(1)
    # A bf16 core is off by up to 2^-8 of itself, three of them and 20 roundings by some percent.
    error = (whole["bf16"] - whole["fp32"]).norm() / whole["fp32"].norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZER_STATE))
def test_chunks_resume_bit_for_bit(dtype, optimizer):
    def train(storage, steps):
        generator = torch.Generator().manual_seed(9)
        for number in range(4):
            ids = torch.unique(torch.randint(1000, (50,), generator=generator)).tolist()
            grads = torch.randn(len(ids), 16, generator=generator)
            if number in steps:
                storage.begin_step(number + 1)
                update(storage, ids, grads)
        return rows_of(storage)

    table = table_of(dtype=dtype)
    whole = train(storage_of(table, optimizer), range(4))
    first = storage_of(table, optimizer)
    train(first, range(2))
    second = storage_of(table, optimizer, seed=1)
    second.begin_load()
    for chunk in first.chunks(1 << 20):
        second.load_chunk(chunk)
    assert torch.equal(train(second, range(2, 4)), whole)


@pytest.mark.parametrize("optimizer", ["adam", "row_wise_adagrad"])
def test_a_table_is_cut_anew(optimizer):
    table = table_of()
    parts = [storage_of(table, optimizer, kind=ShardingType.ROW_WISE, ranks=(0, 1), rank=rank)
             for rank in (0, 1)]
    whole, narrow = storage_of(table, optimizer, seed=5), storage_of(
        table, optimizer, seed=5, kind=ShardingType.COLUMN_WISE, ranks=(0, 1), rank=1)
    wanted = torch.cat([rows_of(part) for part in parts])
    for target in (whole, narrow):
        target.begin_load()
        for part in parts:
            for chunk in part.chunks(1 << 20):
                target.load_chunk(chunk)
    torch.testing.assert_close(rows_of(whole), wanted)
    torch.testing.assert_close(rows_of(narrow), wanted[:, 8:])


def test_rows_become_the_closest_cores():
    """A table that cores can express comes back; noise goes to what the bonds drop."""
    table = table_of()
    source = rows_of(storage_of(table, seed=7))
    target = storage_of(table)
    target.begin_load()
    for first in range(0, 1000, 300):
        target.load_chunk(TableChunk("t", first, 0, source[first:first + 300], {}))
    torch.testing.assert_close(rows_of(target), source, rtol=1e-4, atol=1e-4 * source.abs().max())


def test_rows_into_a_part_of_a_table_are_refused():
    part = storage_of(table_of(), kind=ShardingType.ROW_WISE, ranks=(0, 1))
    with pytest.raises(CheckpointError, match="load them with sharding table_wise, save, and cut"):
        part.load_chunk(TableChunk("t", 0, 0, torch.zeros(10, 16), {}))


def test_cores_of_another_rank_are_decomposed():
    small, large = storage_of(table_of(rank=4), seed=2), storage_of(table_of(rank=12))
    large.begin_load()
    for chunk in small.chunks(1 << 20):
        large.load_chunk(chunk)
    source = rows_of(small)
    torch.testing.assert_close(rows_of(large), source, rtol=1e-4, atol=1e-4 * source.abs().max())


def test_another_optimisers_state_is_refused():
    (chunk,) = storage_of(table_of(), "adam").chunks(1 << 20)
    with pytest.raises(CheckpointError, match=r"\['core0/exp_avg', 'core0/exp_avg_sq'\], adagrad"):
        storage_of(table_of(), "adagrad").load_chunk(chunk)


@pytest.mark.parametrize("cores", [2, 3, 4])
def test_decomposition_is_near_the_best(cores):
    """The error stays below the bound of the bonds' dropped singular values."""
    table = table_of(rows=300, columns=12, cores=cores, rank=5)
    shape = table.storage.resolve(300, 12).piece_shape(300, 12)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(300, 12, generator=generator)
    train = sl.ops.tensor_train.TensorTrain(shape, decompose(dense, shape))
    error = (materialise(train, torch.arange(300)) - dense).norm()
    assert error < dense.norm()
    bound = 0.0
    padded = torch.zeros(shape.padded_rows, 12)
    padded[:300] = dense
    tensor = padded.view(*shape.row_factors, *shape.column_factors)
    for bond in range(1, cores):
        axes = [*range(bond), *range(cores, cores + bond)]
        rest = [axis for axis in range(2 * cores) if axis not in axes]
        size = math.prod(shape.row_factors[:bond]) * math.prod(shape.column_factors[:bond])
        values = torch.linalg.svdvals(tensor.permute(axes + rest).reshape(size, -1))
        bound += float(values[shape.ranks[bond]:].square().sum())
    assert error <= math.sqrt(bound) * 1.001


def test_a_shard_of_another_cut_than_slices_is_refused():
    table = table_of(columns=12, column_factors=[2, 3, 2])
    local = LocalShard(table, Shard(0, 0, 1000, 0, 4), table.storage.resolve(1000, 12), False)
    with pytest.raises(ConfigError, match="cut at multiples of 6"):
        build_storage([local], StorageOptions("sgd", 0, CPU))
