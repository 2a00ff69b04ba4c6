"""What holds for every test: no network, no access to the user's model cache, one thread.

The Hub variables are read when huggingface_hub is imported, so they are set before anything else. A test that
talks to a server of its own starts a subprocess with its own values.
"""

import os
import tempfile
from importlib.util import find_spec


_CACHE = tempfile.TemporaryDirectory(prefix="transdiff-tests-")
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch  # noqa: E402


# The models here are tiny: several threads only wait for each other.
torch.set_num_threads(1)

# `make test-browser` installs what those need.
collect_ignore = [] if find_spec("selenium") else ["browser"]
