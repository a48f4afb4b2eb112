"""Ids, tokens and namespaces: pure values without torch, SGLang or any other room of ours."""
