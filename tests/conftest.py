"""Before torch is imported: OpenMP threads that wait sleep, so that the suite also runs well on a shared machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
