"""Set before torch is loaded. The tests' networks are so small that a second thread makes them slower, and waiting threads must not spin."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
