"""Coverage-guided fuzzing of whatever reads what others wrote: see ``fuzz.__main__``."""
