"""GPT-2: fast bodies for a frozen teacher, and the student in its stock form."""
