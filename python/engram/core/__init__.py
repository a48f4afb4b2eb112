"""Ids, tokens, namespaces and bounded waits, without torch, SGLang or any other room of ours."""
