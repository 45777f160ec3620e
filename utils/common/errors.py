"""How a script ends when it cannot do what was asked: with one message, without a traceback."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """A run that started well cannot continue. The message says why, and what has been saved. Exit code 1."""


class LoaderError(RunError):
    """The processes that load clips have died or hang. Everything learned up to then is sound."""
