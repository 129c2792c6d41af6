"""What every test process starts with."""

from __future__ import annotations

import signal

# A shell that starts tests with `&` makes them ignore Ctrl-C, and what they start inherits that: tests of being stopped
# would see nothing stop.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
