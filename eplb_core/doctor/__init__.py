"""What works on this machine, and what a plugin's check returns."""

from eplb_core.doctor.checks import Finding as Finding
from eplb_core.doctor.checks import Severity as Severity
