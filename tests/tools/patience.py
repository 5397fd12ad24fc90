"""How long a test waits for another process before it says that it hangs."""

WAIT = 600  # seconds for what takes a few, on machines that are busy: no test of speed
