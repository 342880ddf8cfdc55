"""What holds for the whole run of the tests."""

from __future__ import annotations

import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that. The tests of Ctrl-C
# need the handler that Python has otherwise.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
