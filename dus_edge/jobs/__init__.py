"""What each command does, without the command line: one module per job."""
