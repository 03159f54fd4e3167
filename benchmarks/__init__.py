"""What densreg measures of itself: README.md says how. Installed as densreg.benchmarks."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts the memory, is chatty
