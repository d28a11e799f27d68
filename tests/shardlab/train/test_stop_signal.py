"""Stop signals are noted while the run goes on, and the former handlers come back."""

from __future__ import annotations

import os
import signal
import threading

from shardlab.train.stop_signal import StopSignal


def test_signals_are_noted_and_handlers_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert stop.received == set()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == {signal.SIGINT, signal.SIGTERM}
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_other_threads_take_no_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> None:
        with StopSignal():
            assert signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
