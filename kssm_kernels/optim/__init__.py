"""The sign-split EMA optimizer, and the controller that freezes and thaws groups of weights beside it."""

from kssm_kernels.optim.freeze import FreezeController, Petal
from kssm_kernels.optim.sign_split import SignSplitEMA

__all__ = ["FreezeController", "Petal", "SignSplitEMA"]
