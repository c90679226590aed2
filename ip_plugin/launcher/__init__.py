"""Run code that knows nothing of the interspace in the interspace: `switched_on`, and the command `ip-plugin run`."""

from .switch import switch_off, switch_on, switched_on

__all__ = ["switch_off", "switch_on", "switched_on"]
