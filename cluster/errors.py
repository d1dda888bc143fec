"""The two errors a user may see: one line that names the thing and the fix, and an exit code."""

from cluster.exit_codes import FENCED


class UsageError(Exception):
    """Bad arguments, config or input named by the user. Exit code 2. The message is one line: what, where, how to fix it."""

    exit_code = 2


class RunFailure(Exception):
    """The command ran and failed, or a check found faults. Exit code 1. The message is one line."""

    exit_code = 1


class Fenced(RunFailure):
    """A later start of the same run has taken its directory over: this one writes nothing more, and is not tried again."""

    exit_code = FENCED
