"""What can go wrong in a lab beyond a wrong argument, which is a ``ValueError``."""


class LabError(RuntimeError):
    """The machine or the kernel refuses something; the message says what helps."""


class LeftoverError(LabError):
    """A namespace of the wanted name is there already."""


class DeadlineError(LabError):
    """Commands were still running at their deadline and have been ended."""
