"""Trains FOLDS (none named: all) on Kaggle into /kaggle/working/<name of the experiment>; Kaggle itself ends a session
after 12 hours.
"""

from bootstrap import start

CONFIG = "baseline"
FOLDS = []
OVERRIDES = []
SESSION_HOURS = 11.5
RESUME = False
BUILD_ID = ""
ACCELERATOR = "t4x2"

if __name__ == "__main__":
    start(
        "train",
        BUILD_ID,
        lambda kernel: kernel.train(CONFIG, FOLDS, OVERRIDES, SESSION_HOURS, ACCELERATOR, resume=RESUME),
    )
