"""Everything SIA raises on purpose.

    SiaError                    exit 2: the user can mend it; printed without a traceback
    ├── ConfigError             a key, an option or a value
    ├── TaskError               a task folder, its data or its verifier
    ├── TargetError             the sandbox or the environment of the target
    ├── MetaBackendError        what proposes
    │   └── BadProposal         one proposal was unusable; counted, the run goes on
    ├── BudgetExceeded          a call was refused: the run ends with what it has
    ├── ProviderError           a model provider or its key
    ├── WeightsError            an update of the weights: its job, its data, its adapter
    ├── RunDirectoryError       a run directory that cannot be made, read or written
    │   └── RunDirectoryInUse   somebody else holds it
    └── NoScoredAttempt         exit 1: the run ended without a single score

A message says what happened, with the values, and ends in the command that helps.
Anything else that is raised is a bug and keeps its traceback.
"""


class SiaError(Exception):
    """A failure with a message for the user; `exit_code` is what the process returns."""

    exit_code = 2


class ConfigError(SiaError):
    """A configuration that names an unknown key or option, or holds a value out of range."""


class TaskError(SiaError):
    """A task folder that breaks its contract, or data that is not on this machine."""


class TargetError(SiaError):
    """The target cannot be started at all: no sandbox works, or its environment cannot be built."""


class MetaBackendError(SiaError):
    """The meta backend cannot go on."""


class BadProposal(MetaBackendError):
    """One proposal is unusable. It is counted as a failed candidate; the run goes on."""


class BudgetExceeded(SiaError):
    """A step needs a model call that the budget does not allow; nothing of the step counts."""


class ProviderError(SiaError):
    """A provider that cannot be used: no key, no price, no recording."""


class WeightsError(SiaError):
    """An update of the weights cannot be made; the parent's adapter is as it was."""


class RunDirectoryError(SiaError):
    """A run directory cannot be created, read or written."""


class RunDirectoryInUse(RunDirectoryError):
    """The run directory exists already, or another process is writing to it."""


class NoScoredAttempt(SiaError):
    """The run ended and not one attempt was scored."""

    exit_code = 1
