"""Set before torch is loaded: idle OpenMP threads that spin make tests beside another busy process 5 to 8 times slower."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
