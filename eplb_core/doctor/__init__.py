"""Finds out what works on this machine, and takes the checks of plugins."""

from eplb_core.doctor.checks import Finding as Finding
from eplb_core.doctor.checks import Severity as Severity
