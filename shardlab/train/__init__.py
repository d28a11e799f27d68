"""Training: the loop, its metrics, the run folder, checkpoints.

A job is run by every rank alike:

    groups = shardlab.comm.init()
    run = open_run_folder("runs/mine", resume="auto", groups=groups)
    if groups.rank == 0:
        run.write_job(job_yaml)
        run.write_plan(plan.to_json())
    model, optimizer = shardlab.shard(MyModel(ebc), plan, optimizer=..., groups=groups)
    schedule = build_schedule(optimizer, "cosine", warmup_steps=100, steps=10_000)
    summary = Trainer(model, optimizer, groups, train_reader, validation_reader, run,
                      TrainOptions(epochs=1, checkpoint_every=1000), schedule).run()
    if groups.rank == 0:
        rich.console.Console().print(summary.table())
    sys.exit(summary.exit_code)
"""

from shardlab.train.checkpoint import load, save
from shardlab.train.checkpoint_reader import CheckpointReader
from shardlab.train.checkpoint_writer import CheckpointWriter, SaveOptions
from shardlab.train.options import TrainOptions
from shardlab.train.retention import compact, latest, prune, verify
from shardlab.train.run_folder import RunFolder, open_run_folder
from shardlab.train.schedule import build_schedule
from shardlab.train.summary import Summary
from shardlab.train.trainer import Trainer

__all__ = ["CheckpointReader", "CheckpointWriter", "RunFolder", "SaveOptions", "Summary",
           "TrainOptions", "Trainer", "build_schedule", "compact", "latest", "load",
           "open_run_folder", "prune", "save", "verify"]
