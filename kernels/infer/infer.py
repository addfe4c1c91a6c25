"""Segments test.csv on Kaggle with every attached run into /kaggle/working/submission.csv; a code competition allows 9
hours.
"""

from bootstrap import start

OVERRIDES = []
SESSION_HOURS = 8.5
BUILD_ID = ""
WEIGHTS_ID = ""
ACCELERATOR = "t4x2"

if __name__ == "__main__":
    start("infer", BUILD_ID, lambda kernel: kernel.infer(OVERRIDES, SESSION_HOURS, ACCELERATOR, weights=WEIGHTS_ID))
