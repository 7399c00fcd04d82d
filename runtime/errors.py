"""Errors a user can meet: one line each (given, expected, the command that fixes it) and an exit code.

Exit codes: 0 ok, 1 some items failed, 2 usage or bad input, 3 environment, 4 engine mismatch,
5 parity, 130 interrupted.
"""

from __future__ import annotations


class WsiRtError(Exception):
    """Base of every error raised on purpose. `str(error)` is the one line the CLI prints."""

    exit_code = 1


class InputError(WsiRtError):
    """Bad usage or bad input: a flag, a file, a question, a checkpoint."""

    exit_code = 2


class SlideError(InputError):
    """A slide that cannot be read, has no usable geometry, or holds no tissue."""


class FeatureFileError(InputError):
    """A `.pt` or `.h5` file that is malformed, of the wrong shape, or not safe to load."""


class CheckpointError(InputError):
    """A checkpoint with missing, unexpected or misshapen tensors, or a layout we cannot read."""


class MachineError(WsiRtError):
    """The environment lacks something: a package, a GPU, disk space, a writable folder."""

    exit_code = 3


class EngineMismatchError(WsiRtError):
    """A bundle that was edited, is incomplete, or was built for something else."""

    exit_code = 4


class ParityError(WsiRtError):
    """An engine whose numbers differ from the reference by more than its gate allows."""

    exit_code = 5
