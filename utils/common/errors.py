"""How a script ends when it cannot do what was asked; both are told as one message, without a traceback."""


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """A run that began well cannot go on: the message says why, and what is left of it. Exit code 1."""


class LoaderError(RunError):
    """The processes that load clips have died or hang: what was learnt before is sound."""
