"""As for tests of scoring: the platform is readied, and no process group is left behind."""

from tests.scoring.conftest import leave_no_process_group

__all__ = ["leave_no_process_group"]
