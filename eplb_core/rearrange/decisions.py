"""Where the ranks of a rearranger decide: at the store, or, if they are all of one host, in memory that they share."""

from __future__ import annotations

from collections.abc import Sequence

from eplb_core.control.agreement import not_all_answered
from eplb_core.control.call import Call
from eplb_core.control.commit_record import Record
from eplb_core.control.journal import JournalFile, meet_at_journal
from eplb_core.control.journal_record import JournalRecord
from eplb_core.errors import ControlPlaneError

JOURNAL_AFTER = 2
"""After how many rearrangements that moved something ranks look for a journal; rearrangers of tests make fewer."""

_HAS, _CANNOT = 254, 255  # in a note; what is lower counts rearrangements


class Decisions:
    """What one rank knows of the journal of the ranks of one communicator.

    Ranks whose calls have ended in different ways may know different things. So each says what it knows before every
    rearrangement, and what they do follows from what all of them have said.

    Args:
        timeout_s: how long to wait for the slowest rank, in seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._files: tuple[JournalFile, ...] | None = None
        self._known = 0

    @property
    def note(self) -> bytes:
        """What to tell the other ranks."""
        return bytes([self._known])

    @property
    def have_journal(self) -> bool:
        """Whether this rank has a journal."""
        return self._files is not None

    def journal(self, call: Call, notes: Sequence[bytes]) -> Record | None:
        """Return where a rearrangement that changes something is decided; None for the store, on all ranks.

        Args:
            call: the rearrangement.
            notes: what all ranks have said before it.

        Raises:
            HandshakeError: a rank did not come to make the journal. Nothing was moved.
        """
        said = [note[0] for note in notes]
        if _CANNOT in said:
            self._known, self._files = _CANNOT, None
        elif set(said) != {_HAS}:
            if max(said) < JOURNAL_AFTER:
                self._known = min(self._known + 1, _HAS - 1)
                return None
            self._make(call)
        if self._files is None:
            return None
        journal = self._files[call.number % len(self._files)]
        return JournalRecord(journal, call.name, call.rank, call.world_size, self._timeout_s)

    def clear(self, call: Call) -> None:
        """Empty the journal of the call after this one: all ranks have come to this one, so nobody reads it."""
        if call.rank == 0 and self._files is not None:
            self._files[(call.number + 1) % len(self._files)].clear()

    def _make(self, call: Call) -> None:
        self._known, self._files = JOURNAL_AFTER, None  # if this fails here, all make another one the next time
        try:
            self._files = meet_at_journal(call, self._timeout_s)
        except ControlPlaneError as error:
            raise not_all_answered(error, call.world_size) from error
        self._known = _CANNOT if self._files is None else _HAS
