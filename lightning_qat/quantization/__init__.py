"""Fake-quant for any ``nn.Module``: tracing, planning, interception, calibration. Imports no lightning.

The way of a module: ``tracing`` (what ops there are) -> ``plan`` (what is quantized, and why) -> ``region`` (the plan
in effect, with its states) -> ``calibration`` (scales). ``insertion.insert`` does the first three. The public names are
in the top-level package.
"""
