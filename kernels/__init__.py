"""Custom operators, one folder per operator; imports nothing of ours.

`__version__` must exist: several transformers releases probe a top-level module called `kernels`
and crash on one without a version when the repository root is on `sys.path`.
"""

__version__ = "0.1.0"
