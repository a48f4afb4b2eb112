"""Builds the library with the C++ compiler alone. The rest is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "engram_kernel._native",
            sources=["csrc/api.cpp", "csrc/hash.cpp", "csrc/rows.cpp"],
            depends=["csrc/hash.h", "csrc/remainder.h", "csrc/rows.h"],
            language="c++",
            # Without the two -fno options, which give up nothing that the hash relies on,
            # floor() is a call and the remainders do not vectorise.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-pthread",
                "-Wall",
                "-Wextra",
            ],
            extra_link_args=["-pthread"],
        )
    ]
)
