"""The commands, one file each: `add_options` adds the options of a command to its parser, and `run` runs it."""
