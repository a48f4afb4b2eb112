"""Tokens that clients send and servers compute over conversations of many turns."""
