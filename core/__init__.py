"""What every part may use: errors that name their cause, atomic files, the command line's options."""
