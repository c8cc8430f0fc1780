"""The engine: sequences, lanes, the scheduler, and the loop that steps them. Knows no HTTP and no model."""
