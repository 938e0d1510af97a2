"""Unreadable records and files: errors, or skipped and counted, depending on data.on_error."""

import dataclasses
import errno

from moejax.errors import UserError

_NAMED = 3
"""Number of messages of skipped records that are kept."""

_OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EIO)
"""Errors of the operating system that concern a single file and not the whole machine."""


class Damaged(UserError):
  """A record or the rest of a file cannot be read. The message gives file and line."""


@dataclasses.dataclass
class Skipped:
  """Counts skipped records."""

  count: int = 0
  """Number of skipped records. The rest of a file counts as one record."""
  first: list[str] = dataclasses.field(default_factory=list)
  """The messages of the first skipped records."""

  def add(self, damaged: Damaged) -> None:
    """Counts a record."""
    self.count += 1
    if len(self.first) < _NAMED:
      self.first.append(str(damaged))

  def warning(self) -> str:
    """A warning with the number of skipped records and the first messages."""
    more = f"; and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
    what = "unreadable record was" if self.count == 1 else "unreadable records were"
    return f"{self.count:,} {what} skipped (data.on_error=skip): {'; '.join(self.first)}{more}"


def unreadable(place: str, error: OSError) -> UserError:
  """The error for a file that the operating system cannot read."""
  kind = Damaged if error.errno in _OF_THE_FILE else UserError
  return kind(f"{place} cannot be read ({error.strerror or error}); make it readable or remove it from the sources")
