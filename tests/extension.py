"""``KTLIB_TEST_EXTENSION`` names another build of the extension to test (``make sanitize``): import before ktlib."""

import importlib.util
import os
import sys

if path := os.environ.get("KTLIB_TEST_EXTENSION"):
    import torch  # noqa: F401  its OpenMP runtime first

    spec = importlib.util.spec_from_file_location("ktlib._kernels", path)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
