"""Why a worker cannot go on."""


class MembershipError(RuntimeError):
    """This worker takes no part in the training any more."""


class WorkerEvicted(MembershipError):
    """The others went on without this worker, because it gave no sign of life or had no network. Its weights are of the
    past: start it again, and it gets theirs."""


class TrainingStopped(MembershipError):
    """Training cannot go on anywhere; the state at hand is that of the last step that all have made. To save it, see
    :meth:`commkit.Elastic.remaining`."""


class JoinRefused(MembershipError):
    """This worker has not the secret that the others share."""


class StoreLost(MembershipError):
    """The store through which workers agree cannot be reached: whoever hosts it has ended, or this worker has no network."""


class StepGivenUp(RuntimeError):
    """The step under way was given up by all workers; as far as they are concerned it never began."""
