"""From a collective that failed to an error that names phase, collective and rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shardlab.comm.shared_memory import PeerError
from shardlab.comm.watch import ENDED, SILENT, UNREACHABLE
from shardlab.errors import ExchangeError

if TYPE_CHECKING:
    from shardlab.comm.groups import Groups

#: What gloo and torch say when a peer is gone or late; other RuntimeErrors are no faults of ranks.
_SIGNS = ("gloo", "connection closed", "connection reset", "timed out", "socket", "broken pipe",
          "nccl")
_COMPUTES = "computes"


@contextmanager
def naming(groups: Groups, phase: str, collective: str) -> Iterator[None]:
    """What is done inside fails as an `ExchangeError` where a peer is to blame.

    Args:
        groups: the ranks.
        phase: part of the step, such as ``rows``.
        collective: what is waited for, such as ``all_to_all``.

    Raises:
        ExchangeError: a rank ended, stalled or cannot be reached.
    """
    if groups.watch is None:
        yield
        return
    groups.watch.doing(f"waits in {phase}, {collective}")
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ExchangeError) or not _is_fault(error):
            raise
        raise ExchangeError(_explain(error, groups, phase, collective)) from error
    finally:
        groups.watch.doing(_COMPUTES)


def _is_fault(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, PeerError) or any(sign in text for sign in _SIGNS)


def _explain(error: RuntimeError, groups: Groups, phase: str, collective: str) -> str:
    assert groups.watch is not None
    ranks = groups.members or range(groups.world_size)  # as the job counts them
    among = f"of ranks {list(groups.members)}" if groups.members else f"of {groups.world_size}"
    start = f"{phase}: {collective} failed on rank {groups.job_rank} {among}: "
    if isinstance(error, PeerError) and error.text:
        return f"{start}{error.text}; all ranks must run the same job and version"
    answers = groups.watch.ask([rank for rank in ranks if rank != groups.job_rank])
    if isinstance(error, PeerError):
        answers |= dict.fromkeys((ranks[peer] for peer in error.ended), ENDED)
        late = {rank: f"{answers[rank]} and is {groups.timeout_s:g} s late"
                for rank in (ranks[peer] for peer in error.late)
                if answers[rank] not in (ENDED, SILENT, UNREACHABLE)}
        answers |= late
    else:
        late = {}
    guilty = {rank: answer for rank, answer in answers.items()
              if rank in late or answer in (ENDED, SILENT, UNREACHABLE)}
    found = "; ".join(f"rank {rank} {answer}" for rank, answer in (guilty or answers).items())
    limit = f" within {groups.timeout_s:g} s" if "time" in str(error).lower() or \
        (isinstance(error, PeerError) and error.late) else ""
    reason = f"no answer{limit}; " if limit else ""
    return (f"{start}{reason}{found}; look at that rank's messages, or raise exchange.timeout_s if "
            "it was only slow")
