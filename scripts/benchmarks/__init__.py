"""Benchmarks against named rivals: `scripts/bench.sh`, or `python -m benchmarks` with this folder's parent on
PYTHONPATH.

One process, one thread: on few cores, threads that wait for each other would be most of what is measured. The variables
only work before the first import of a numerical library, so they stand here.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
    os.environ[_name] = "1"
