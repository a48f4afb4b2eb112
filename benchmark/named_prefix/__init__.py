"""Time to the first token of conversations that begin with a long prefix."""
