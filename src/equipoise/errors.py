"""The exceptions Equipoise raises on purpose.

Every message names the file or field, the value found and the mend: the command line prints it without a
traceback. `exit_code` is what the process ends with: 2 where the input is wrong, 1 for a fault while running.
"""


class EquipoiseError(Exception):
    """Base of every error raised on purpose; a fault while running unless a subclass says otherwise."""

    exit_code = 1


class ConfigError(EquipoiseError):
    """A recipe, an override, a command-line argument or the model it names is wrong."""

    exit_code = 2


class DataError(EquipoiseError):
    """A data file or a row in it is wrong."""

    exit_code = 2


class RewardError(EquipoiseError):
    """A scorer failed, or returned something that is not one finite number or None for each completion."""


class CheckpointError(EquipoiseError):
    """A checkpoint cannot be written, or cannot be trusted when read."""
