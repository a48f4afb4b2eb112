"""Tokens of prompts that are computed again."""
