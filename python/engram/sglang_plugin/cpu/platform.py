"""Entry point of the `sglang.srt.platforms` group."""


def activate() -> str | None:
    """Return the platform class to use, or None to leave the choice to SGLang."""
    return None
