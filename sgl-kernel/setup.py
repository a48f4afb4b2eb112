"""Builds the library with the C++ compiler alone. The rest is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "engram_kernel._native",
            sources=["csrc/api.cpp", "csrc/hash.cpp", "csrc/rows.cpp"],
            depends=["csrc/hash.h", "csrc/remainder.h", "csrc/rows.h"],
            language="c++",
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                "-pthread",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",  # wide vectors are passed inside one file alone
            ],
            extra_link_args=["-pthread"],
        )
    ]
)
