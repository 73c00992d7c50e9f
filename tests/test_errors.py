"""What we say of another library's error."""

import signal
import threading

import pytest

from reap.errors import first_line, undisturbed


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one", "one"),
        ("one\ntwo", "one"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
        ("is built from one of:\n(1) a file\n(2) a hub", "is built from one of: (1) a file"),
        ("announces:\n\n  more:\n  a   reason\nrest", "announces: more: a reason"),
        ("announces nothing:", "announces nothing"),
    ],
)  # fmt: skip
def test_an_announcement_keeps_what_it_announces(text, line):
    assert first_line(ValueError(text)) == line


def test_a_signal_waits_until_what_is_written_is_whole():
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.signal(number, signal.default_int_handler)
        written = []
        try:
            with pytest.raises(KeyboardInterrupt):
                with undisturbed():
                    signal.raise_signal(number)
                    signal.raise_signal(number)
                    written.append(number)
            assert signal.getsignal(number) is signal.default_int_handler
        finally:
            signal.signal(number, before)
        assert written == [number]
    with pytest.raises(ZeroDivisionError), undisturbed():
        raise ZeroDivisionError


def test_no_signal_comes_to_other_threads():
    done = []

    def work():
        with undisturbed():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
