"""What SignSplitEMA and its FreezeController do and do not do, beside other optimizers: docs/optimizer.md."""
