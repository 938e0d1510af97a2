"""The one exception that is the user's to mend."""


class UserError(ValueError):
  """A mistake in what the user gave: one line with the value, the limit and the remedy. Exit code 2."""
