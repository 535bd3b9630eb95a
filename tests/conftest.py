"""Before torch is imported: OpenMP threads that wait sleep, so that the suite also runs well on a shared machine.

``KTLIB_TEST_EXTENSION`` names another build of the extension to test (``make sanitize``).
"""

import importlib.util
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if extension := os.environ.get("KTLIB_TEST_EXTENSION"):
    import torch  # noqa: F401  its OpenMP runtime first

    spec = importlib.util.spec_from_file_location("ktlib._kernels", extension)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
