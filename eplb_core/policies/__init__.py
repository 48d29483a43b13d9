"""From loads to a placement: what a policy is, and the one that is built in."""

from eplb_core.policies.base import BalancePolicy as BalancePolicy
