"""Batches that were announced, and lookups whose updates are still to come.

What decides is the order of calls in the program, never time: which rows of a batch travel early
follows from the batches that were open when it was announced. All ranks run the same program, so
they decide alike.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from shardlab.comm import Groups, Work
from shardlab.sharded.clock import PhaseClock
from shardlab.sharded.exchange import Exchange
from shardlab.sharded.inputs import Batch, InputReader
from shardlab.sharded.lookup import Lookup
from shardlab.sharded.urgent import Parting


@dataclass(eq=False)
class Announced:
    """A batch that comes.

    Attributes:
        features: the object that the model will pass.
        serial: its number.
        knows: numbers of the batches whose updates it allows for.
        found: the batch and its lookup, once the ranks have exchanged them.
        job: number of the job that finds them, for its right of way.
        in_front: number of the batch in front, if that job tells its urgent gradients.
        told: how the gradients of that batch part, and what is known of this one's lookup before
            its early rows are here.
        stale: its rows may lack the last update.
        outdated: an update came that it does not allow for; its rows are read anew.
        late: its late rows, once they are on their way.
    """

    features: Any
    serial: int
    knows: frozenset[int]
    found: Future[tuple[Batch, Lookup | None]]
    job: int
    in_front: int | None
    told: Future[tuple[Parting | None, Lookup]]
    stale: bool = False
    outdated: bool = False
    late: Work | None = None


@dataclass
class Announcements:
    """The open batches of one collection.

    Attributes:
        exchange: of the collection.
        reader: of its features.
        groups: the ranks.
        clock: is told what the other thread did.
        parts: gradients travel in two parts where the next batch is announced (`urgent`).
    """

    exchange: Exchange
    reader: InputReader
    groups: Groups
    clock: PhaseClock
    parts: bool = False
    _coming: list[Announced] = field(default_factory=list)
    _open: dict[int, Lookup] = field(default_factory=dict)
    _due: set[int] = field(default_factory=set)
    _serial: int = 0
    _stale: bool = False
    _update: tuple[int, Future[None]] | None = None
    _spared: int | None = None

    @property
    def behind(self) -> bool:
        """Whether gradients travel, and rows are stepped, behind the next batch's training.

        So it is with stale rows: nobody reads them before the batch after the next is looked up,
        and the other thread does both, in this order.
        """
        return self._stale and self.groups.worker is not None

    def update_behind(self, update: Callable[[], None], spared: int | None = None) -> None:
        """Changes rows in the other thread, behind what was announced and sent before.

        Args:
            update: changes them.
            spared: number of the batch that may be looked up meanwhile; None: any announced one.
        """
        self.finish_update()  # at most one is under way, and its error is seen

        def run() -> None:
            lap = self.clock.other_thread().lap
            update()
            lap("update")

        job = 0 if self.groups.worker is None else self.groups.worker.right_of_way.number()
        self._update, self._spared = (job, self._run(run)), spared

    def finish_update(self) -> None:
        """Waits until the other thread has changed its rows."""
        update, self._update, self._spared = self._update, None, None
        if update is not None:
            self._give_way(update[0])  # and not what a later backward sends
            update[1].result()

    def _give_way(self, job: int | None = None) -> None:
        """Before waiting for the other thread: lets its jobs up to this one pass; None: all."""
        if self.groups.worker is not None:
            self.groups.worker.right_of_way.give(job)

    def announce(self, features: Any, stale: bool) -> None:
        """Starts to exchange a batch's ids and early rows; every rank calls it."""
        self._stale = stale
        earlier = list(self._coming)
        opened = dict(self._open)
        knows = frozenset(opened) | {one.serial for one in earlier}
        way = None if self.groups.worker is None else self.groups.worker.right_of_way
        job = 0 if way is None else way.number()
        if not earlier or stale:  # no batch in front is still to be looked up, or has late rows
            self._give_way()

        in_front = self._in_front(stale)
        told: Future[tuple[Parting | None, Lookup]] = Future()

        def before_rows(parting: Parting | None, lookup: Lookup) -> None:
            told.set_result((parting, lookup))
            if way is not None:
                way.wait(job)

        def look() -> tuple[Batch, Lookup | None]:
            ahead = self.clock.other_thread()
            batch = self.reader.read(features)
            lookups = opened | {one.serial: lookup for one in earlier
                                if (lookup := one.found.result()[1])}
            return batch, self.exchange.look_ahead(
                batch, None if stale else [*lookups.values()], ahead.lap, before_rows,
                None if in_front is None else lookups[in_front])

        def run() -> tuple[Batch, Lookup | None]:
            try:
                return look()
            except BaseException as error:
                if not told.done():
                    told.set_exception(error)  # whoever waits for it sees it
                raise

        self._serial += 1
        self._coming.append(Announced(features, self._serial, knows, self._run(run), job,
                                      in_front, told, stale))

    def _in_front(self, stale: bool) -> int | None:
        """Number of the batch that is looked up before the one that is announced now.

        None where its gradients do not travel in parts.
        """
        if stale or not self.parts or self.groups.worker is None:
            return None
        return next((one.serial for one in self._coming[-1:]), next(reversed(self._open), None))

    def _next(self, serial: int) -> Announced | None:
        """The batch that is looked up next, if it tells this one's urgent gradients."""
        coming = self._coming[0] if self._coming else None
        return coming if coming is not None and coming.in_front == serial else None

    def parting(self, serial: int) -> Parting | None:
        """How the gradients of a batch part that are here now; waits until that is known.

        None: all are urgent. Every rank calls it.

        Raises:
            BoundsError: the batch behind it has an id outside its table.
        """
        coming = self._next(serial)
        if coming is None:
            return None
        self._give_way(coming.job)
        with self.clock.waiting():
            return coming.told.result()[0]

    def sparing(self) -> int | None:
        """Number of the next batch, if one batch is due and the next one tells what is urgent."""
        coming = self._next(next(iter(self._due))) if len(self._due) == 1 else None
        return None if coming is None else coming.serial

    def send_late(self) -> None:
        """After an update: late rows of the next batch leave before its forward asks for them.

        Every rank calls it.

        Raises:
            BoundsError: the next batch has an id outside its table.
        """
        coming = self._coming[0] if self._coming else None
        if coming is None or coming.in_front is None or coming.outdated:
            return
        self._give_way(coming.job)
        lookup = coming.told.result()[1]
        if lookup.early is not None:
            coming.late = self.exchange.start_late(lookup.early)

    def _run(self, job: Callable[[], Any]) -> Future[Any]:
        if self.groups.worker is not None:
            return self.groups.worker.submit(job)
        future: Future[Any] = Future()
        future.set_result(job())
        return future

    def take(self, features: Any) -> tuple[int, Batch, Lookup | None]:
        """A batch's number, the batch, and what is known of its lookup; waits for that."""
        known = next((one for one in self._coming if one.features is features), None)
        if known is None:
            self.settle()
            self._serial += 1
            return self._serial, self.reader.read(features), None
        self._coming.remove(known)
        if self._spared not in (None, known.serial):
            self.finish_update()
        self._give_way(known.job)
        with self.clock.waiting():
            batch, lookup = known.found.result()
        if lookup is not None and lookup.sent is not None:
            self.exchange.wire += lookup.sent
        if known.outdated and lookup is not None:
            if known.late is not None:
                known.late.wait()
            lookup = replace(lookup, early=None, sent=None)
        elif lookup is not None:
            lookup = replace(lookup, late=known.late)
        return known.serial, batch, lookup

    def opened(self, serial: int, lookup: Lookup) -> None:
        """This batch was looked up, and an update of its rows may follow."""
        self._open[serial] = lookup

    def due(self, serial: int) -> None:
        """This batch's gradients are there."""
        self._due.add(serial)

    def before_update(self) -> None:
        """The rows of all due batches are about to change."""
        for one in self._coming:
            if one.stale and self.behind:
                continue  # read by the other thread, before the update that follows there
            if one.stale:
                self._give_way(one.job)
                one.found.result()  # its rows are those before this update, on every rank
            elif one.late is not None or not self._due <= one.knows:
                one.outdated = True
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """No update of an open batch will follow."""
        self._open.clear()
        self._due.clear()

    def rows_changed(self) -> None:
        """Rows changed other than by an update: a checkpoint was loaded, or caches were emptied."""
        self.settle()
        for one in self._coming:
            one.outdated = True

    def change_exchange(self, exchange: Exchange, *, parts: bool) -> None:
        """Codecs change; what is here, and how gradients part, follows from the old ones."""
        self.rows_changed()
        self.exchange, self.parts = exchange, parts
        for one in self._coming:
            one.in_front = None

    def settle(self) -> None:
        """Waits until the other thread has done all that was announced."""
        self._give_way()
        for one in self._coming:
            one.found.exception()
        self.finish_update()

    def forget(self) -> None:
        """Drops announced batches that will not be looked up."""
        self.settle()
        for one in self._coming:
            if one.late is not None:
                one.late.wait()
        self._coming.clear()
