"""TensorBoard events of a run, written where asked for and only then imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardlab.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class EventWriter:
    """Writes every number of a metrics record as a scalar ``<kind>/<name>`` at its step.

    Numbers of a mapping in the record are ``<kind>/<name>/<key>``.

    Args:
        folder: where the event files go.
        resumed_at: events of steps after this one, from a run that was cut off, are hidden.
        enabled: False imports and writes nothing.

    Raises:
        ConfigError: TensorBoard is not installed; names the extra that brings it.
    """

    _AXES = ("kind", "step", "epoch")

    def __init__(self, folder: Path, resumed_at: int, enabled: bool) -> None:
        self._writer: SummaryWriter | None = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("train.tensorboard: TensorBoard is not installed; run "
                              "pip install 'shardlab[tensorboard]', or set "
                              f"train.tensorboard=false ({error})") from error
        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record as `RunFolder.append_metrics` takes it."""
        if self._writer is None:
            return
        for name, value in record.items():
            if name in self._AXES:
                continue
            values = {f"{name}/{key}": item for key, item in value.items()} \
                if isinstance(value, dict) else {name: value}
            for path, number in values.items():
                if isinstance(number, (int, float)):
                    self._writer.add_scalar(f"{record['kind']}/{path}", number, record["step"])
