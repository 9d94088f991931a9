"""Fake-quant for any ``nn.Module``: tracing, planning, interception, calibration. Imports no lightning.

A module goes through four steps: ``tracing`` (which ops it runs) -> ``planning`` (what is quantized, and why) ->
``region`` (puts the plan into effect, and has states) -> ``region.calibration`` (derives the scales).
``region.insertion.insert`` does all steps but the last. The public names are in the top-level package.
"""
