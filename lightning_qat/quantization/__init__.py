"""Fake-quant for any ``nn.Module``: tracing, planning, interception, calibration. Imports no lightning.

The way of a module: ``tracing`` (what ops there are) -> ``planning`` (what is quantized, and why) -> ``region`` (the
plan in effect, with its states) -> ``region.calibration`` (scales). ``region.insertion.insert`` does all but the last.
The public names are in the top-level package.
"""
