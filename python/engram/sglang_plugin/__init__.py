"""The seam to SGLang: the only room of Engram that imports `sglang`."""
