"""hubmap_kit: from tissue slides to `submission.csv`, on Kaggle and off it.

Importing the package is cheap: no torch, no OpenCV. It only sets the switches that keep every later import off the
network.
"""

import os

__version__ = "0.1.0"

# Kernels run without internet. Albumentations asks PyPI for a newer version when imported (up to a minute of waiting
# offline), and the Hugging Face client retries for 20-50 s before it gives up; both must be told before their first
# import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# OpenMP threads that wait by spinning starve whatever else runs on the machine, and each other: beside two busy
# processes on two cores an epoch took about twice as long with the default. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
