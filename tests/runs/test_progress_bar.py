"""What stops a long computation, and when."""

import os
import signal
from typing import Any

import pytest

from lossguard.runs.progress_bar import STOPPING, STOPS, stopping_at_interrupt


def test_ctrl_c_is_heard_from_the_first_handler_on(monkeypatch, capfd) -> None:
    handle, before = signal.signal, [signal.getsignal(one) for one in STOPS]

    def interrupted(*given: Any) -> Any:
        monkeypatch.setattr(signal, "signal", handle)
        replaced = handle(*given)
        signal.raise_signal(signal.SIGINT)
        return replaced

    monkeypatch.setattr(signal, "signal", interrupted)
    with stopping_at_interrupt() as stopped:
        assert stopped()
    assert capfd.readouterr().err == STOPPING.decode()
    assert [signal.getsignal(one) for one in STOPS] == before


def test_an_ignored_signal_stays_ignored(monkeypatch) -> None:
    """As a shell has it for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping_at_interrupt() as stopped:
            signal.raise_signal(signal.SIGINT)
            assert not stopped()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("closed", [True, False])
def test_it_stops_where_nobody_reads_that_it_does(monkeypatch, closed) -> None:
    """Nothing is written if stderr is closed: its number may be that of another file."""

    def gone(*_: Any) -> int:
        assert not closed
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    if closed:
        monkeypatch.setattr("sys.stderr", None)
    with stopping_at_interrupt() as stopped:
        signal.raise_signal(signal.SIGTERM)
        assert stopped()
