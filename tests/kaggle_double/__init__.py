"""A loopback stand-in for Kaggle's API that the real, unmodified `kaggle` client talks to; nothing leaves this
computer.
"""

from __future__ import annotations

from .double import Double
from .faults import FAULTS
from .world import Settings

__all__ = ["FAULTS", "Double", "Settings"]
