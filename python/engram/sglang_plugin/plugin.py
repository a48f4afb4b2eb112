"""Entry point of the `sglang.srt.plugins` group: called once in every SGLang process."""


def register() -> None:
    """Register Engram's hooks with SGLang."""
    from engram.sglang_plugin import cpu

    cpu.install()
