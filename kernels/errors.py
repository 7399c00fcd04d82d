"""The one error of this folder."""


class KernelInputError(ValueError):
    """An operator was given something it does not compute: one line, given and expected."""
