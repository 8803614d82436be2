"""What stops a long computation, and when."""

import signal
from typing import Any

from lossguard.progress import STOPPING, STOPS, stopping_at_interrupt


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
