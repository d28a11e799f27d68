"""The peers' columns of tbe_cpu.py: nn.EmbeddingBag, one by table or all in one, and FBGEMM."""

from __future__ import annotations

import numpy as np
from tbe_cases import LEARNING_RATE, Case, Step


def torch_optimizer(name: str, parameters):
    import torch

    return {
        "sgd": lambda: torch.optim.SGD(parameters, lr=LEARNING_RATE),
        "adagrad": lambda: torch.optim.Adagrad(parameters, lr=LEARNING_RATE),
        "adam": lambda: torch.optim.SparseAdam(parameters, lr=LEARNING_RATE),
    }[name]()


class TorchLoop(Step):
    """One nn.EmbeddingBag(sparse=True) per table."""

    optimizers = ("sgd", "adagrad", "adam")

    def __init__(self, case, dtype, optimizer):
        import torch

        torch.manual_seed(0)
        self.torch = torch
        self.bags = [torch.nn.EmbeddingBag(rows, case.dim, mode="sum", sparse=True,
                                           _weight=torch.empty(rows, case.dim).uniform_(-.01, .01))
                     for rows in case.rows]
        self.offsets = torch.arange(0, case.batch * case.pooling, case.pooling)
        self.optimizer = torch_optimizer(optimizer, [bag.weight for bag in self.bags])
        self.grads = [torch.randn(case.batch, case.dim) * 1e-2 for _ in case.rows]

    def prepare(self, ids):
        return list(self.torch.from_numpy(ids))

    def forward(self, batch):
        return [bag(ids, self.offsets) for bag, ids in zip(self.bags, batch)]

    def backward(self, output):
        self.torch.autograd.backward(output, self.grads)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def touch_state(self):
        for state in self.optimizer.state.values():
            for value in state.values():
                if hasattr(value, "mul_") and value.numel() > 1:
                    value.add_(0)


class TorchMerged(TorchLoop):
    """All tables in one nn.EmbeddingBag; ids are shifted by the table's first row (in forward)."""

    def __init__(self, case, dtype, optimizer):
        super().__init__(Case((sum(case.rows),), case.dim, case.batch * len(case.rows),
                              case.pooling), dtype, optimizer)
        starts = np.concatenate([[0], np.cumsum(case.rows)[:-1]])
        self.shift = self.torch.from_numpy(starts).unsqueeze(1)

    def prepare(self, ids):
        return self.torch.from_numpy(ids)

    def forward(self, batch):
        return [self.bags[0]((batch + self.shift).view(-1), self.offsets)]


class Fbgemm(Step):
    """SplitTableBatchedEmbeddingBagsCodegen on ComputeDevice.CPU (defaults, bounds check on)."""

    dtypes = ("fp32", "fp16", "fp16_sr")
    optimizers = ("sgd", "rowwise_adagrad", "adagrad")
    bounds_check = "WARNING"

    def __init__(self, case, dtype, optimizer):
        import torch

        torch.manual_seed(0)
        self.torch = torch
        self.table = build_fbgemm(case, dtype.split("_")[0], optimizer,
                                  stochastic=dtype.endswith("_sr"), bounds=self.bounds_check)
        self.table.init_embedding_weights_uniform(-0.01, 0.01)
        bags = len(case.rows) * case.batch
        self.offsets = torch.arange(0, bags * case.pooling + 1, case.pooling)
        self.grad = torch.randn(case.batch, len(case.rows) * case.dim) * 1e-2

    def prepare(self, ids):
        return self.torch.from_numpy(ids).view(-1)

    def forward(self, batch):
        return self.table(batch, self.offsets)

    def backward(self, output):
        output.backward(self.grad.to(output.dtype))

    def touch_state(self):
        for name in ("momentum1_host", "momentum2_host"):
            state = getattr(self.table, name, None)
            if state is not None and state.numel():
                state.data.add_(0)


class FbgemmNoBoundsCheck(Fbgemm):
    dtypes = ("fp32",)
    optimizers = ("rowwise_adagrad",)
    bounds_check = "NONE"


def build_fbgemm(case: Case, dtype: str, optimizer: str, stochastic: bool = False,
                 bounds: str = "WARNING"):
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        BoundsCheckMode,
        EmbeddingLocation,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    kinds = {"sgd": EmbOptimType.EXACT_SGD, "adagrad": EmbOptimType.EXACT_ADAGRAD,
             "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
    kind = kinds[optimizer] if optimizer in kinds else EmbOptimType[optimizer]
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, case.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in case.rows],
        optimizer=kind, weights_precision=SparseType(dtype), learning_rate=LEARNING_RATE,
        eps=1e-8, stochastic_rounding=stochastic, bounds_check_mode=BoundsCheckMode[bounds])


FRAMEWORKS: dict[str, type[Step]] = {
    "torch_loop": TorchLoop,
    "torch_merged": TorchMerged,
    "fbgemm": Fbgemm,
    "fbgemm_nobounds": FbgemmNoBoundsCheck,
}
