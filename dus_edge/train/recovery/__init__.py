"""What a run of healing measured: its log, and the curve of its recovery."""
