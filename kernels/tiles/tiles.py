"""Cuts the training slides on Kaggle, at the scale of CONFIG, into a tile store; training kernels attach this kernel's
output.
"""

from bootstrap import start

CONFIG = "baseline"
OVERRIDES = []
BUILD_ID = ""

if __name__ == "__main__":
    start("tiles", BUILD_ID, lambda kernel: kernel.tiles(CONFIG, OVERRIDES))
