"""Programs to compare with, each run as a script by the interpreter that has it; see `protocol`."""
