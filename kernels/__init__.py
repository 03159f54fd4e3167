"""Triton kernels of densreg's operators, one file per operation.

There are none yet: every operator runs in plain torch (:mod:`densreg.ops`) on every device.
"""
